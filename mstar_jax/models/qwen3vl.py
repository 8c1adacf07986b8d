"""Qwen3-VL (dense): its tower, whose middle layers feed the decoder's first ones too, the model, checkpoints.

Source: Qwen/Qwen3-VL-4B-Instruct (arXiv 2511.21631), transformers' Qwen3VLForConditionalGeneration; DeepStack
is arXiv 2406.04334. Every dimension comes from the config, so a tiny policy runs the same code.
"""

import dataclasses
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from mstar_jax import sharding
from mstar_jax.crops.native import Crops
from mstar_jax.models import hf, names, native, qwen
from mstar_jax.models.layers import Decoder, layer_norm, param, rotate
from mstar_jax.models.vision import VitBlocks, VitConfig, gelu, merge, segmented, tanh_gelu
from mstar_jax.models.vlm import Remat, VisionLanguageModel

EPS = 1e-6  # of the tower's norms; no key in config.json says so


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig(native.QwenConfig):
    """Dimensions of the policy. A crop is one feature's pixels, since all layers attend to whole images.

    Attributes:
      positions: rows and columns of the table of position embeddings, which is stretched to an image.
      deep_layers: the tower's layers, from 0, ascending, whose outputs, made features, are added to
        what the first blocks of the decoder return.
    """

    positions: int = 48
    deep_layers: tuple[int, ...] = (8, 16, 24)

    def __post_init__(self):
        super().__post_init__()
        ordered = sorted({layer for layer in self.deep_layers if 0 <= layer < self.vision.num_layers})
        if not ordered or ordered != list(self.deep_layers) or len(ordered) > self.decoder.num_layers:
            raise ValueError(
                f"deepstack_visual_indexes is {list(self.deep_layers)}, not ascending layers of the tower's "
                f"{self.vision.num_layers}, at most as many as the decoder's {self.decoder.num_layers}"
            )


def stretched(table: jax.Array, patches: native.Patches, side: int) -> jax.Array:
    """Position embeddings [B, T, D] of patches: the table [side * side, D], whose corners lie on an image's,
    read bilinearly."""
    place = jnp.stack([patches.row, patches.column], axis=-1).astype(jnp.float32)
    last = jnp.maximum(patches.grid - 1, 1).astype(jnp.float32)
    place = jnp.clip(place * (side - 1) / last, 0, side - 1)
    low = jnp.floor(place).astype(jnp.int32)
    part = (place - low).astype(table.dtype)
    out = jnp.zeros((), table.dtype)
    for down, across in itertools.product((0, 1), (0, 1)):
        row, column = (jnp.minimum(low[..., i] + step, side - 1) for i, step in enumerate((down, across)))
        weight = (part[..., 0] if down else 1 - part[..., 0]) * (part[..., 1] if across else 1 - part[..., 1])
        out += table[row * side + column] * weight[..., None]
    return out


class Merger(nnx.Module):
    """Squares of patches become features: a norm, before or after the patches are put side by side, and an
    MLP. With `levels`, that many mergers in one, each for its own input."""

    def __init__(self, config: Qwen3VLConfig, rngs: nnx.Rngs, levels: int = 0):
        d = config.decoder.hidden_size
        square = config.merged**2 * config.vision.hidden_size
        lead, layers = ((levels,), ("layers",)) if levels else ((), ())
        width = square if levels else config.vision.hidden_size
        self.merged = config.merged
        self.norm = param(rngs, (*lead, width), (*layers, "embed"), 1.0)
        self.norm_bias = param(rngs, (*lead, width), (*layers, "embed"), 0.0)
        self.up = param(rngs, (*lead, square, square), (*layers, "patch", "mlp"), square**-0.5)
        self.up_bias = param(rngs, (*lead, square), (*layers, "mlp"), 0.0)
        self.out = param(rngs, (*lead, square, d), (*layers, "mlp", "embed"), square**-0.5)
        self.out_bias = param(rngs, (*lead, d), (*layers, "embed"), 0.0)

    def __call__(self, x: jax.Array, crops: int, level: int | None = None) -> jax.Array:
        """Patches [B, crops * M * M, V] -> features [B, crops * units**2, D]."""
        weights = (self.norm, self.norm_bias, self.up, self.up_bias, self.out, self.out_bias)
        norm, norm_bias, up, up_bias, out, out_bias = (w[...] if level is None else w[level] for w in weights)
        rows, _, width = x.shape
        if level is None:
            x = layer_norm(x, norm, norm_bias, EPS)
        x = merge(x.reshape(rows * crops, -1, width), self.merged)
        if level is not None:
            x = layer_norm(x, norm, norm_bias, EPS)
        x = gelu(x @ up + up_bias) @ out + out_bias
        return x.reshape(rows, -1, x.shape[-1])


class Tower(nnx.Module):
    """Patch and position embeddings, and blocks."""

    def __init__(self, config: Qwen3VLConfig, rngs: nnx.Rngs):
        v = config.vision
        inputs = 3 * native.FRAMES * v.patch_size**2
        self.config = config
        self.patch = param(rngs, (inputs, v.hidden_size), ("patch", "embed"), inputs**-0.5)
        self.patch_bias = param(rngs, (v.hidden_size,), ("embed",), 0.0)
        self.position = param(rngs, (config.positions**2, v.hidden_size), ("positions", "embed"), 0.5)
        self.blocks = VitBlocks(v, rngs)

    @jax.named_scope("vision")
    def __call__(self, crops: Crops[jax.Array], remat: Remat | None = None) -> list[jax.Array]:
        """Crops with leading [B, C] -> outputs [B, C * M * M, D] of the deep layers and of the last one, for
        M patches along the side of a crop."""
        c = self.config
        patches = native.patches_of(c, crops, self.patch[...].dtype)
        rope = native.axial_rope(c.vision, patches)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: None) -> jax.Array:
            return segmented(rotate(q, rope), rotate(k, rope), v, patches.segment)

        def block(x, blocks):
            x = sharding.constrain(x, ("batch", None, None))  # see layers.Decoder.hidden
            return sharding.constrain(blocks(x, None, attend), ("batch", None, None)), None

        if remat is not None:
            block = jax.checkpoint(block, policy=remat, prevent_cse=False)
        x = patches.values @ self.patch[...] + self.patch_bias[...]
        x += stretched(self.position[...], patches, c.positions)
        found = []
        ends = [layer + 1 for layer in c.deep_layers]
        for start, end in itertools.pairwise([0, *ends, c.vision.num_layers]):
            x, _ = jax.lax.scan(block, x, jax.tree.map(lambda w, s=start, e=end: w[s:e], self.blocks))
            found.append(x)
        return found


class Qwen3VL(VisionLanguageModel):
    """The policy's parameters and forward pass."""

    config: Qwen3VLConfig

    def __init__(self, config: Qwen3VLConfig, rngs: nnx.Rngs):
        self.config = config
        self.tower = Tower(config, rngs)
        self.merger = Merger(config, rngs)
        self.deep = Merger(config, rngs, len(config.deep_layers))
        self.decoder = Decoder(config.decoder, rngs)

    def image_features(self, pixels: Crops[jax.Array], remat: Remat | None = None) -> jax.Array:  # type: ignore[override]
        """`Crops` with leading [B, C] -> [B, C * units**2, (1 + n) * D]: crop by crop, each line by line; a
        feature for the decoder's input and one for after each of its first n blocks."""
        crops = pixels.places.shape[1]
        *deep, last = self.tower(pixels, remat)
        levels = [self.deep(x, crops, level) for level, x in enumerate(deep)]
        return jnp.concatenate([self.merger(last, crops), *levels], axis=-1)


# ----------------------------------------------------------------------------------- the checkpoint
def read_config(folder: pathlib.Path) -> Qwen3VLConfig:
    """The config in config.json, and in the image processor's file (see `qwen.read_images`).

    Raises:
      ValueError: it describes another architecture.
    """
    c, where = hf.read_json(folder / "config.json"), f"{folder}/config.json:"
    v, tower = c["vision_config"], f"{where} vision_config"
    text = {**c["text_config"]}
    text["tie_word_embeddings"] = c.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
    decoder = qwen.read_decoder(text, f"{where} text_config", interleaved=True)
    names.only(v, {"hidden_act": "gelu_pytorch_tanh", "out_hidden_size": decoder.hidden_size}, tower)
    qwen.check_tower(v, tower, (*qwen.SIZES, "num_position_embeddings"))
    side = math.isqrt(v["num_position_embeddings"])
    if side**2 != v["num_position_embeddings"]:
        raise ValueError(f"{tower} num_position_embeddings is {v['num_position_embeddings']}, no square")
    crop = v["patch_size"] * v["spatial_merge_size"]
    images = qwen.read_images(folder, v)
    vision = VitConfig(
        hidden_size=v["hidden_size"],
        intermediate_size=v["intermediate_size"],
        num_layers=v["depth"],
        num_heads=v["num_heads"],
        image_size=crop,
        patch_size=v["patch_size"],
        layer_norm_eps=EPS,
        activation=tanh_gelu,
        select_layer=-1,
        patch_bias=True,
        class_token=False,
        pre_norm=False,
        post_norm=False,
    )
    return Qwen3VLConfig(
        decoder,
        vision,
        num_crops=-(-images["max_pixels"] // crop**2),
        merged=v["spatial_merge_size"],
        image_token_id=c.get("image_token_id", Qwen3VLConfig.image_token_id),
        positions=side,
        deep_layers=tuple(v["deepstack_visual_indexes"]),
        **images,
    )


def config_files(config: Qwen3VLConfig, dtype: str) -> dict[str, names.JSON]:
    """config.json and the image processor's file for a policy of these dimensions, as `read_config` and
    transformers read them."""
    return {
        "config.json": {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "torch_dtype": dtype,
            "image_token_id": config.image_token_id,
            "tie_word_embeddings": config.decoder.tie_word_embeddings,
            "text_config": {
                "model_type": "qwen3_vl_text",
                "head_dim": config.decoder.head_dim,
                **qwen.decoder_values(config.decoder),
            },
            "vision_config": {
                "model_type": "qwen3_vl",
                "hidden_act": "gelu_pytorch_tanh",
                "num_position_embeddings": config.positions**2,
                "deepstack_visual_indexes": list(config.deep_layers),
                **qwen.tower_values(config),
            },
        },
        "preprocessor_config.json": qwen.images_file(config, "Qwen3VLProcessor"),
    }


def table(config: Qwen3VLConfig) -> list[names.Tensor]:
    """The checkpoint's tensors."""
    v, at, ours = config.vision, "model.visual.blocks.{}.", "tower.blocks."
    d, f, square = v.hidden_size, v.intermediate_size, config.merged**2 * v.hidden_size
    out = [
        *names.llama(config.decoder, "model.language_model."),
        *qwen.patch_embedding(v, "model.visual.patch_embed.proj"),
        names.plain("model.visual.pos_embed.weight", (config.positions**2, d), "tower.position"),
        *qwen.fused(v, at, ours),
        *names.norm(f"{at}norm1", d, f"{ours}norm1", bias=True),
        *names.norm(f"{at}norm2", d, f"{ours}norm2", bias=True),
        *names.linear(f"{at}mlp.linear_fc1", d, f, f"{ours}up", bias=True),
        *names.linear(f"{at}mlp.linear_fc2", f, d, f"{ours}down", bias=True),
    ]
    for name, mine, width in (("merger", "merger", d), ("deepstack_merger_list.{}", "deep", square)):
        out += names.norm(f"model.visual.{name}.norm", width, f"{mine}.norm", bias=True)
        out += names.linear(f"model.visual.{name}.linear_fc1", square, square, f"{mine}.up", bias=True)
        width = config.decoder.hidden_size
        out += names.linear(f"model.visual.{name}.linear_fc2", square, width, f"{mine}.out", bias=True)
    return out


FAMILY = hf.Family(
    read_config, config_files, table, Qwen3VL, qwen.QwenProcessor, qwen.load_tokenizer, qwen.pixels
)
