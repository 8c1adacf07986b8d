"""MiniCPM-Llama3-V-2.5: config, prompt layout, model, checkpoint.

Source: openbmb/MiniCPM-Llama3-V-2_5. SigLIP-400M (as in Idefics2) on images of any aspect ratio, a
resampler that compresses every image to 96 features by cross-attention, and Llama 3. How an image is divided
into slices is in `crops.slicing`. Every dimension comes from the config, so a tiny policy runs the same code.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerFast

from mstar_jax.crops import slicing
from mstar_jax.crops.slicing import Slices
from mstar_jax.models import hf, names, processor, tokenizer
from mstar_jax.models.layers import Decoder, layer_norm, param
from mstar_jax.models.tokenizer import vocabulary
from mstar_jax.models.vision import Vit, attention, normalised, tanh_gelu
from mstar_jax.models.vlm import PolicyConfig, Remat, VisionLanguageModel
from mstar_jax.structs import Prefix

BOS, EOS, END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
HEADER, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"
UNK, IMAGE, IMAGE_END, SLICE, SLICE_END = "<unk>", "<image>", "</image>", "<slice>", "</slice>"
MARKERS = (HEADER, HEADER_END, UNK, IMAGE, IMAGE_END, SLICE, SLICE_END)
SPECIAL = (BOS, EOS, END, *MARKERS)
# A special token that controls something, and not text: the official padding token is "!", the piece of id 0.
CONTROL = re.compile(r"<.+>|\[.+\]", re.DOTALL)
HEAD = 128  # width of the resampler's heads
EPS = 1e-6  # of the resampler's norms
MEAN = STD = (0.5,)  # of every channel


@dataclasses.dataclass(frozen=True)
class MiniCPMV25Config(PolicyConfig):
    """Dimensions of the policy.

    Attributes:
      decoder, vision: the two transformers.
      num_crops: the most slices of an image, in addition to the whole image (officially max_slice_nums, 9).
      query_num: features of an image or slice.
      scale_resolution: side in pixels of a square image that fills the encoder.
      corrected_mask: encode every image independently. Officially, the images of a conversation are padded to
        the longest one, the padding is attended to, and positions are those of the longest image. An image's
        features then depend on the other images, and the released weights were trained that way.
    """

    num_crops: int = 9
    query_num: int = 96
    scale_resolution: int = 448
    corrected_mask: bool = False

    def __post_init__(self):
        if self.decoder.hidden_size % HEAD:
            raise ValueError(
                f"hidden_size = {self.decoder.hidden_size}: the resampler needs a multiple of {HEAD}"
            )


def grid_positions(grid: jax.Array, length: int, width: int) -> jax.Array:
    """Sinusoidal position embeddings of patches: int32[B, 2] (rows, columns) -> float32[B, length, width].

    The first half of the width is for the column, the second for the row; in each, sines precede cosines.
    """
    columns = jnp.maximum(grid[:, 1:], 1)
    index = jnp.arange(length)[None, :]
    place = jnp.stack([index % columns, index // columns], axis=-1).astype(jnp.float32)
    quarter = np.arange(width // 4, dtype=np.float32) / np.float32(width // 4)
    angle = place[..., None] * (np.float32(1.0) / np.float32(10000.0) ** quarter)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(-1, length, width)


class Resampler(nnx.Module):
    """Learned queries that attend to the patches of one image."""

    def __init__(self, config: MiniCPMV25Config, rngs: nnx.Rngs):
        v, d, h = config.vision.hidden_size, config.decoder.hidden_size, config.decoder.hidden_size // HEAD
        self.query = param(rngs, (config.query_num, d), ("positions", "embed"), 0.02)
        self.query_norm = param(rngs, (d,), ("embed",), 1.0)
        self.query_norm_bias = param(rngs, (d,), ("embed",), 0.0)
        self.kv = param(rngs, (v, d), ("patch", "embed"), v**-0.5)
        self.kv_norm = param(rngs, (d,), ("embed",), 1.0)
        self.kv_norm_bias = param(rngs, (d,), ("embed",), 0.0)
        self.q = param(rngs, (d, h, HEAD), ("embed", "heads", "head_dim"), d**-0.5)
        self.k = param(rngs, (d, h, HEAD), ("embed", "heads", "head_dim"), d**-0.5)
        self.v = param(rngs, (d, h, HEAD), ("embed", "heads", "head_dim"), d**-0.5)
        self.q_bias = param(rngs, (h, HEAD), ("heads", "head_dim"), 0.0)
        self.k_bias = param(rngs, (h, HEAD), ("heads", "head_dim"), 0.0)
        self.v_bias = param(rngs, (h, HEAD), ("heads", "head_dim"), 0.0)
        self.o = param(rngs, (h, HEAD, d), ("heads", "head_dim", "embed"), d**-0.5)
        self.o_bias = param(rngs, (d,), ("embed",), 0.0)
        self.post_norm = param(rngs, (d,), ("embed",), 1.0)
        self.post_norm_bias = param(rngs, (d,), ("embed",), 0.0)
        self.project = param(rngs, (d, d), ("mlp", "embed"), d**-0.5)

    def __call__(self, x: jax.Array, grid: jax.Array) -> jax.Array:
        """Patches [B, L, V] of images with grids int32[B, 2] -> [B, query_num, D]."""
        x = layer_norm(x @ self.kv[...], self.kv_norm[...], self.kv_norm_bias[...], EPS)
        placed = x + grid_positions(grid, *x.shape[1:]).astype(x.dtype)  # for keys; values have no position
        query = layer_norm(self.query[...], self.query_norm[...], self.query_norm_bias[...], EPS)
        q = jnp.einsum("qd,dhn->qhn", query, self.q[...]) + self.q_bias[...]
        k = jnp.einsum("bld,dhn->blhn", placed, self.k[...]) + self.k_bias[...]
        v = jnp.einsum("bld,dhn->blhn", x, self.v[...]) + self.v_bias[...]
        own = jnp.arange(x.shape[1]) < grid.prod(axis=-1)[:, None]
        out = attention(jnp.broadcast_to(q, (x.shape[0], *q.shape)), k, v, own)
        out = jnp.einsum("bqhn,hnd->bqd", out, self.o[...]) + self.o_bias[...]
        return layer_norm(out, self.post_norm[...], self.post_norm_bias[...], EPS) @ self.project[...]


class MiniCPMV25(VisionLanguageModel):
    """The policy's parameters and forward pass."""

    def __init__(self, config: MiniCPMV25Config, rngs: nnx.Rngs):
        self.config = config
        self.tower = Vit(config.vision, rngs)
        self.resampler = Resampler(config, rngs)
        self.decoder = Decoder(config.decoder, rngs)

    def image_features(self, pixels: Slices[jax.Array], remat: Remat | None = None) -> jax.Array:  # type: ignore[override]
        """`Slices` with leading [B, C] -> [B, C * query_num, D], the images in order."""

        def one(crop):  # one image of every row at a time, since the attention scores of all C would be large
            place = jnp.arange(crop.patches.shape[1])
            attended, own = place < crop.attended[:, None], place < crop.grid.prod(axis=-1)[:, None]
            patches = normalised(crop.patches, own[..., None], MEAN, STD, self.tower.patch[...].dtype)
            x = self.tower(patches, remat, positions=crop.positions, mask=attended)
            return self.resampler(x, crop.grid)

        features = jax.lax.map(one, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), pixels))
        features = jnp.moveaxis(features, 0, 1)
        return features.reshape(features.shape[0], -1, features.shape[-1])


def placeholder(layout: slicing.Layout, query_num: int) -> str:
    """The text that stands for an image in a prompt: the whole image, then its slices, one line per grid
    row."""
    image = IMAGE + UNK * query_num + IMAGE_END
    lines = "\n".join([image * layout.columns] * layout.rows)
    return image + (SLICE + lines + SLICE_END if lines else "")


class MiniCPMV25Processor(processor.Processor[slicing.Slicing]):
    """Text and images to arrays, see `structs.Processor`."""

    def __init__(self, config: MiniCPMV25Config, tokenizer: PreTrainedTokenizerFast):
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = config.decoder.vocab_size
        known = vocabulary(tokenizer, SPECIAL, self.vocab_size)
        self.stop_ids: tuple[int, ...] = (known[END], known[EOS])
        self.unk_id = known[UNK]
        self.cut = slicing.Slicing(
            config.num_crops,
            config.scale_resolution,
            config.vision.patch_size,
            config.vision.side,
            config.corrected_mask,
        )
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.control = tuple(dict.fromkeys([*SPECIAL, *filter(CONTROL.fullmatch, added)]))
        self._control_ids = frozenset(known[token] for token in self.control)
        control_ids = sorted(self._control_ids - set(self.stop_ids))
        self.forbidden_ids = (*control_ids, *range(len(tokenizer), self.vocab_size))

    def _without_control(self, text: str) -> str:
        """The text with a space in everything that the tokenizer would read as a control token."""
        for token in self.control:
            text = text.replace(token, token[0] + " " + token[1:])
        return text

    def _prompt(self, text: str, layouts: list[slicing.Layout], features: int) -> str:
        """Llama 3's chat template with one BOS; `<unk>` stands for each of so many features of an image."""
        images = [placeholder(layout, features) for layout in layouts]
        content = "\n".join([*images, self._without_control(text)]).strip()
        return f"{BOS}{HEADER}user{HEADER_END}\n\n{content}{END}{HEADER}assistant{HEADER_END}\n\n"

    def prefix_shapes(
        self, texts: Sequence[str], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[int, int]]:
        """(prompt tokens, images and slices) of prompts without decoding an image; sizes are (width,
        height)."""
        layouts = [[self.cut.layout(size) for size in some] for some in sizes]
        prompts = [self._prompt(text, some, 0) for text, some in zip(texts, layouts, strict=True)]
        marks = tokenizer.ids_of_all(self.tokenizer, prompts, add_special_tokens=False)
        crops = [sum(layout.crops for layout in some) for some in layouts]
        # a feature's token joins no other
        return [(len(ids) + n * self.config.query_num, n) for ids, n in zip(marks, crops, strict=True)]

    def prefix(self, text: str, sizes: list[tuple[int, int]]) -> Prefix:
        """The official prompt, with images before the text."""
        prompt = self._prompt(text, [self.cut.layout(size) for size in sizes], self.config.query_num)
        tokens = np.array(self.tokenizer(prompt, add_special_tokens=False)["input_ids"], np.int32)
        places = tokens == self.unk_id
        index = np.where(places, np.cumsum(places) - 1, -1)
        return Prefix(np.where(places, 0, tokens), index.astype(np.int32))

    def encode_response(self, text: str) -> list[int]:
        """Ids of a response, ending in `<|eot_id|>`."""
        ids = self.tokenizer(self._without_control(text), add_special_tokens=False)["input_ids"]
        return [*ids, self.stop_ids[0]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without control tokens; spaces are not cleaned up."""
        ids = [token for token in map(int, tokens) if token not in self._control_ids]
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def length_limit(self, prefix_tokens: int) -> int:
        """The longest sequence: the decoder's context."""
        return self.config.decoder.max_position


# ----------------------------------------------------------------------------------- the checkpoint
def read_config(folder: pathlib.Path) -> MiniCPMV25Config:
    """The config in config.json.

    Its `slice_config` holds `max_slice_nums` and `scale_resolution`. `corrected_mask` is our own key, which
    official files do not have.
    """
    c, where = hf.read_json(folder / "config.json"), f"{folder}/config.json:"
    v = c["vision_config"]
    names.only(c, {"version": "2.5", "slice_mode": True, "use_image_id": False}, where)
    names.check_numbers({"num_hidden_layers": v["num_hidden_layers"]}, f"{where} vision_config")
    slices = c.get("slice_config") or {}
    decoder = names.decoder_config(c, where, rope_theta=500000.0)
    vision = names.vision_config(
        {"layer_norm_eps": 1e-6} | v,
        f"{where} vision_config",
        "gelu_pytorch_tanh",
        num_layers=v["num_hidden_layers"] - bool(c.get("drop_vision_last_layer", False)),
        activation=tanh_gelu,
        select_layer=-1,
        patch_bias=True,
        class_token=False,
        pre_norm=False,
    )
    sizes = {
        "query_num": c.get("query_num", 96),
        "max_slice_nums": slices.get("max_slice_nums", 9),
        "scale_resolution": slices.get("scale_resolution", 448),
        "corrected_mask": c.get("corrected_mask", False),
    }
    names.check_numbers(sizes, where, ("corrected_mask",))
    return MiniCPMV25Config(
        decoder,
        vision,
        query_num=sizes["query_num"],
        num_crops=sizes["max_slice_nums"],
        scale_resolution=sizes["scale_resolution"],
        corrected_mask=sizes["corrected_mask"],
    )


def config_files(config: MiniCPMV25Config, dtype: str) -> dict[str, names.JSON]:
    """config.json for a policy of these dimensions, as `read_config` reads it."""
    values: names.JSON = {
        "architectures": ["MiniCPMV"],
        "model_type": "minicpmv",
        "version": "2.5",
        "torch_dtype": dtype,
        **names.decoder_values(config.decoder),
        "rope_scaling": None,
        "attention_bias": False,
        "query_num": config.query_num,
        "image_size": config.scale_resolution,
        "patch_size": config.vision.patch_size,
        "batch_vision_input": True,
        "drop_vision_last_layer": False,
        "slice_mode": True,
        "slice_config": {
            "model_type": "minicpmv",
            "max_slice_nums": config.num_crops,
            "scale_resolution": config.scale_resolution,
            "patch_size": config.vision.patch_size,
        },
        "vision_config": {
            "model_type": "idefics2",
            **names.vision_values(config.vision),
        },
    }
    return {"config.json": values | ({"corrected_mask": True} if config.corrected_mask else {})}


def table(config: MiniCPMV25Config) -> list[names.Tensor]:
    """The checkpoint's tensors."""
    d, v, ours = config.decoder.hidden_size, config.vision, "resampler."
    rest = names.llama(config.decoder, "llm.model.", "llm.lm_head")
    rest += names.patch_embedding(v, "vpm.embeddings.patch_embedding", "tower")
    rest += [
        names.plain("vpm.embeddings.position_embedding.weight", (v.side**2, v.hidden_size), "tower.position"),
        names.plain("resampler.query", (config.query_num, d), f"{ours}query"),
        names.plain("resampler.proj", (d, d), f"{ours}project"),  # stored as [in, out], unlike a linear layer
    ]
    rest += names.vit_blocks(v, "vpm.encoder.layers.{}.", "tower.blocks.")
    rest += names.norm("vpm.post_layernorm", v.hidden_size, "tower.post_norm", bias=True)
    for theirs, norm in (("ln_q", "query_norm"), ("ln_kv", "kv_norm"), ("ln_post", "post_norm")):
        rest += names.norm(f"resampler.{theirs}", d, ours + norm, bias=True)
    rest += names.linear("resampler.kv_proj", v.hidden_size, d, f"{ours}kv")
    rest += names.linear("resampler.attn.out_proj", d, d, f"{ours}o", bias=True)
    weight = [names.Part(ours + n, (3, d, d), np.s_[i], (1, 0)) for i, n in enumerate("qkv")]
    bias = [names.Part(f"{ours}{n}_bias", (3, d), np.s_[i]) for i, n in enumerate("qkv")]
    return [
        *rest,
        names.Tensor("resampler.attn.in_proj_weight", (3 * d, d), tuple(weight)),
        names.Tensor("resampler.attn.in_proj_bias", (3 * d,), tuple(bias)),
    ]


def pixels(config: MiniCPMV25Config, crops: int) -> Slices[jax.ShapeDtypeStruct]:
    """The pixels' shapes for a prompt with this many images and slices, none of them very long."""
    length = slicing.padded_length(0, config.scale_resolution, config.vision.patch_size)
    return Slices(
        jax.ShapeDtypeStruct((crops, length, 3 * config.vision.patch_size**2), jnp.uint8),
        jax.ShapeDtypeStruct((crops, length), jnp.int32),
        jax.ShapeDtypeStruct((crops,), jnp.int32),
        jax.ShapeDtypeStruct((crops, 2), jnp.int32),
    )


FAMILY = hf.Family(read_config, config_files, table, MiniCPMV25, MiniCPMV25Processor, tokenizer.load, pixels)
