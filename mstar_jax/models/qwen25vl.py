"""Qwen2.5-VL: its tower, which attends within windows in most layers, the model, and its checkpoints.

Source: Qwen/Qwen2.5-VL-7B-Instruct (arXiv 2502.13923), transformers' Qwen2_5_VLForConditionalGeneration.
Every dimension comes from the config, so a tiny policy runs the same code.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mstar_jax import sharding
from mstar_jax.crops.native import Crops
from mstar_jax.models import hf, names, native, qwen
from mstar_jax.models.layers import Decoder, param, rms_norm, rotate
from mstar_jax.models.vision import VitConfig, attention, gelu, merge, segmented, silu
from mstar_jax.models.vlm import Remat, VisionLanguageModel

EPS = 1e-6  # of the tower's norms; no key in config.json says so
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v [B, T, H, N] -> [B, T, H, N]


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig(native.QwenConfig):
    """Dimensions of the policy. A crop is a window of the tower's.

    Attributes:
      full_layers: the tower's layers, from 0, that attend to the whole image.
    """

    full_layers: tuple[int, ...] = (7, 15, 23, 31)


class Blocks(nnx.Module):
    """The tower's blocks, stacked over `layers`: RMSNorm, attention and a gated SiLU MLP, with biases."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs):
        n, d, f, h = config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads
        w, out = d // h, (2 * n) ** -0.5
        heads, bias = ("layers", "embed", "heads", "head_dim"), ("layers", "heads", "head_dim")
        self.norm1 = param(rngs, (n, d), ("layers", "embed"), 1.0)
        self.q = param(rngs, (n, d, h, w), heads, d**-0.5)
        self.k = param(rngs, (n, d, h, w), heads, d**-0.5)
        self.v = param(rngs, (n, d, h, w), heads, d**-0.5)
        self.q_bias = param(rngs, (n, h, w), bias, 0.0)
        self.k_bias = param(rngs, (n, h, w), bias, 0.0)
        self.v_bias = param(rngs, (n, h, w), bias, 0.0)
        self.o = param(rngs, (n, h, w, d), ("layers", "heads", "head_dim", "embed"), d**-0.5 * out)
        self.o_bias = param(rngs, (n, d), ("layers", "embed"), 0.0)
        self.norm2 = param(rngs, (n, d), ("layers", "embed"), 1.0)
        self.gate = param(rngs, (n, d, f), ("layers", "embed", "mlp"), d**-0.5)
        self.gate_bias = param(rngs, (n, f), ("layers", "mlp"), 0.0)
        self.up = param(rngs, (n, d, f), ("layers", "embed", "mlp"), d**-0.5)
        self.up_bias = param(rngs, (n, f), ("layers", "mlp"), 0.0)
        self.down = param(rngs, (n, f, d), ("layers", "mlp", "embed"), f**-0.5 * out)
        self.down_bias = param(rngs, (n, d), ("layers", "embed"), 0.0)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> jax.Array:
        """One block; `self` is one layer's slice. x [B, T, D] -> [B, T, D]."""
        h = rms_norm(x, self.norm1[...], EPS)
        q = jnp.einsum("btd,dhn->bthn", h, self.q[...]) + self.q_bias[...]
        k = jnp.einsum("btd,dhn->bthn", h, self.k[...]) + self.k_bias[...]
        v = jnp.einsum("btd,dhn->bthn", h, self.v[...]) + self.v_bias[...]
        h = attend(rotate(q, rope), rotate(k, rope), v)
        x = x + jnp.einsum("bthn,hnd->btd", h, self.o[...]) + self.o_bias[...]
        h = rms_norm(x, self.norm2[...], EPS)
        h = silu(h @ self.gate[...] + self.gate_bias[...]) * (h @ self.up[...] + self.up_bias[...])
        return x + h @ self.down[...] + self.down_bias[...]


class Tower(nnx.Module):
    """Patch embedding and blocks."""

    def __init__(self, config: Qwen25VLConfig, rngs: nnx.Rngs):
        v = config.vision
        inputs = 3 * native.FRAMES * v.patch_size**2
        self.config = config
        self.patch = param(rngs, (inputs, v.hidden_size), ("patch", "embed"), inputs**-0.5)
        self.blocks = Blocks(v, rngs)

    @jax.named_scope("vision")
    def __call__(self, crops: Crops[jax.Array], remat: Remat | None = None) -> jax.Array:
        """Crops with leading [B, C] -> [B, C * M * M, D], for M patches along the side of a crop."""
        c = self.config
        patches = native.patches_of(c, crops, self.patch[...].dtype)
        rope = native.axial_rope(c.vision, patches)
        segment, size = patches.segment, c.vision.side**2

        def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return segmented(q, k, v, segment)

        def within_windows(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            wq, wk, wv = (x.reshape(-1, size, *x.shape[2:]) for x in (q, k, v))
            return attention(wq, wk, wv, segment.reshape(-1, size) > 0).reshape(q.shape)

        def block(x, inputs):
            blocks, full = inputs
            x = sharding.constrain(x, ("batch", None, None))  # see layers.Decoder.hidden
            x = blocks(x, rope, lambda q, k, v: jax.lax.cond(full, whole, within_windows, q, k, v))
            return sharding.constrain(x, ("batch", None, None)), None

        if remat is not None:
            block = jax.checkpoint(block, policy=remat, prevent_cse=False)
        full = np.isin(np.arange(c.vision.num_layers), c.full_layers)
        x, _ = jax.lax.scan(block, patches.values @ self.patch[...], (self.blocks, full))
        return x


class Qwen25VL(VisionLanguageModel):
    """The policy's parameters and forward pass."""

    config: Qwen25VLConfig

    def __init__(self, config: Qwen25VLConfig, rngs: nnx.Rngs):
        v, d = config.vision.hidden_size, config.decoder.hidden_size
        square = config.merged**2 * v
        self.config = config
        self.tower = Tower(config, rngs)
        self.merge_norm = param(rngs, (v,), ("embed",), 1.0)
        self.project_up = param(rngs, (square, square), ("patch", "mlp"), square**-0.5)
        self.project_up_bias = param(rngs, (square,), ("mlp",), 0.0)
        self.project_out = param(rngs, (square, d), ("mlp", "embed"), square**-0.5)
        self.project_out_bias = param(rngs, (d,), ("embed",), 0.0)
        self.decoder = Decoder(config.decoder, rngs)

    def image_features(self, pixels: Crops[jax.Array], remat: Remat | None = None) -> jax.Array:  # type: ignore[override]
        """`Crops` with leading [B, C] -> [B, C * units**2, D]: crop by crop, each line by line."""
        c, rows = self.config, len(pixels.places)
        x = rms_norm(self.tower(pixels, remat), self.merge_norm[...], EPS)
        x = merge(x.reshape(-1, c.vision.side**2, x.shape[-1]), c.merged)
        x = gelu(x @ self.project_up[...] + self.project_up_bias[...])
        x = x @ self.project_out[...] + self.project_out_bias[...]
        return x.reshape(rows, -1, x.shape[-1])


# ----------------------------------------------------------------------------------- the checkpoint
def read_config(folder: pathlib.Path) -> Qwen25VLConfig:
    """The config in config.json, whose decoder is at its top or, as newer files have it, in `text_config`;
    and in the image processor's file (see `qwen.read_images`).

    Raises:
      ValueError: it describes another architecture.
    """
    c, where = hf.read_json(folder / "config.json"), f"{folder}/config.json:"
    text, v = c.get("text_config"), c["vision_config"]
    at = f"{where} text_config" if text else where
    text = {**(text or c)}
    text["tie_word_embeddings"] = c.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
    decoder = qwen.read_decoder(text, at, interleaved=False)
    tower = f"{where} vision_config"
    names.only(v, {"hidden_act": "silu", "out_hidden_size": decoder.hidden_size}, tower)
    qwen.check_tower(v, tower, (*qwen.SIZES, "window_size"))
    full = tuple(v["fullatt_block_indexes"])
    if not all(type(layer) is int and 0 <= layer < v["depth"] for layer in full):
        raise ValueError(f"{tower} fullatt_block_indexes is {list(full)}, not layers of the {v['depth']}")
    images = qwen.read_images(folder, v)
    vision = VitConfig(
        hidden_size=v["hidden_size"],
        intermediate_size=v["intermediate_size"],
        num_layers=v["depth"],
        num_heads=v["num_heads"],
        image_size=v["window_size"],
        patch_size=v["patch_size"],
        layer_norm_eps=EPS,
        activation=silu,
        select_layer=-1,
        class_token=False,
        pre_norm=False,
        post_norm=False,
    )
    return Qwen25VLConfig(
        decoder,
        vision,
        num_crops=-(-images["max_pixels"] // v["window_size"] ** 2),
        merged=v["spatial_merge_size"],
        image_token_id=c.get("image_token_id", Qwen25VLConfig.image_token_id),
        full_layers=full,
        **images,
    )


def config_files(config: Qwen25VLConfig, dtype: str) -> dict[str, names.JSON]:
    """config.json and the image processor's file for a policy of these dimensions, as `read_config` and
    transformers read them."""
    return {
        "config.json": {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "torch_dtype": dtype,
            "image_token_id": config.image_token_id,
            **qwen.decoder_values(config.decoder),
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "hidden_act": "silu",
                "window_size": config.vision.image_size,
                "fullatt_block_indexes": list(config.full_layers),
                **qwen.tower_values(config),
            },
        },
        "preprocessor_config.json": qwen.images_file(config, "Qwen2_5_VLProcessor"),
    }


def table(config: Qwen25VLConfig) -> list[names.Tensor]:
    """The checkpoint's tensors."""
    v, at, ours = config.vision, "visual.blocks.{}.", "tower.blocks."
    d, f, square = v.hidden_size, v.intermediate_size, config.merged**2 * v.hidden_size
    return [
        *names.llama(config.decoder, "model."),
        *qwen.patch_embedding(v, "visual.patch_embed.proj"),
        *qwen.fused(v, at, ours),
        *names.norm(f"{at}norm1", d, f"{ours}norm1"),
        *names.norm(f"{at}norm2", d, f"{ours}norm2"),
        *names.linear(f"{at}mlp.gate_proj", d, f, f"{ours}gate", bias=True),
        *names.linear(f"{at}mlp.up_proj", d, f, f"{ours}up", bias=True),
        *names.linear(f"{at}mlp.down_proj", f, d, f"{ours}down", bias=True),
        *names.norm("visual.merger.ln_q", d, "merge_norm"),
        *names.linear("visual.merger.mlp.0", square, square, "project_up", bias=True),
        *names.linear("visual.merger.mlp.2", square, config.decoder.hidden_size, "project_out", bias=True),
    ]


FAMILY = hf.Family(
    read_config, config_files, table, Qwen25VL, qwen.QwenProcessor, qwen.load_tokenizer, qwen.pixels
)
