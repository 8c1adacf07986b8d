"""Phi-3.5-vision: config, prompt layout, model.

Source: microsoft/Phi-3.5-vision-instruct. The second-to-last layer of CLIP ViT-L/14-336, a 2x2 merge, learned
separators after every line of merged features, an MLP projector, and the Phi-3 decoder with LongRoPE. The HD
transform of images is in `crops.hd`. Every dimension comes from the config, so the tiny policy runs the same
code.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mstar_jax.crops import hd
from mstar_jax.crops.arrays import Crops
from mstar_jax.models import hf, names, processor, tokenizer
from mstar_jax.models.layers import Decoder, param
from mstar_jax.models.tokenizer import vocabulary
from mstar_jax.models.vision import Vit, VitConfig, gelu, merge, normalised, patchify
from mstar_jax.models.vlm import PolicyConfig, Remat, VisionLanguageModel
from mstar_jax.structs import Prefix

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
BOS, END, PLACEHOLDER = "<s>", "<|end|>", "<|image|>"
SPECIAL = ("<unk>", BOS, "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", END, "<|user|>", PLACEHOLDER)
STOPS = (END, "<|endoftext|>", "</s>")


@dataclasses.dataclass(frozen=True)
class Phi35Config(PolicyConfig):
    """Dimensions of the policy.

    Attributes:
      decoder, vision: the two transformers.
      num_crops: the most high-resolution crops of an image, in addition to its global view (officially 4).
    """

    num_crops: int = 4


class Phi35Vision(VisionLanguageModel):
    """The policy's parameters and forward pass."""

    def __init__(self, config: Phi35Config, rngs: nnx.Rngs):
        merged, width = 4 * config.vision.hidden_size, config.decoder.hidden_size
        self.config = config
        self.tower = Vit(config.vision, rngs)
        self.row_separator = param(rngs, (merged,), ("patch",), 0.02)  # sub_GN
        self.view_separator = param(rngs, (merged,), ("patch",), 0.02)  # glb_GN
        self.project_up = param(rngs, (merged, width), ("patch", "embed"), merged**-0.5)
        self.project_up_bias = param(rngs, (width,), ("embed",), 0.0)
        self.project_out = param(rngs, (width, width), ("mlp", "embed"), width**-0.5)
        self.project_out_bias = param(rngs, (width,), ("embed",), 0.0)
        self.decoder = Decoder(config.decoder, rngs)

    def normalised(self, crops: Crops[jax.Array]) -> jax.Array:
        """`Crops` with leading [B, C] as the tower reads them, views too: [B, C, S, S, 3]."""
        several = self.config.num_crops > 1  # one crop is its own view
        whole = with_views(crops) if several else crops.pixels
        there = crops.places[..., :1, None, None] > 0
        return normalised(whole, there, MEAN, STD, self.tower.patch[...].dtype)

    def image_features(self, pixels: Crops[jax.Array] | jax.Array, remat: Remat | None = None) -> jax.Array:
        """`Crops` with leading [B, C], or their normalised pixels -> [B, 2 + C * (M/2)**2, D]: the two
        separators, then the crops in order."""
        pixels = self.normalised(pixels) if isinstance(pixels, Crops) else pixels
        rows, crops = pixels.shape[:2]
        patches = patchify(pixels.reshape(rows * crops, *pixels.shape[2:]), self.config.vision.patch_size)
        features = merge(self.tower(patches, remat), 2)
        features = features.reshape(rows, -1, features.shape[-1])
        separators = jnp.stack([self.row_separator[...], self.view_separator[...]])
        separators = jnp.broadcast_to(separators, (rows, *separators.shape))
        x = jnp.concatenate([separators, features], axis=1)  # the separators are projected too
        x = gelu(x @ self.project_up[...] + self.project_up_bias[...])
        return x @ self.project_out[...] + self.project_out_bias[...]


def _taps(count: jax.Array, number: jax.Array, size: int) -> jax.Array:
    """What each pixel of one of `count` crops in a line adds to a view of all: float32[..., size, size].

    Row i of the matrix of crop `number` weighs its pixels for pixel i of the view, as PyTorch's bicubic
    interpolation does (a = -0.75, no antialiasing, clamped borders) for a whole-numbered scale.
    """
    count, number = (x[..., None, None].astype(jnp.float32) for x in (count, number))
    i, y = jnp.arange(size, dtype=jnp.float32)[:, None], jnp.arange(size, dtype=jnp.float32)
    centre = (i + 0.5) * count - 0.5
    place, last = y + number * size, count * size - 1
    distance = jnp.abs(place - centre)  # whole for an odd count; 0.5, 1.5 and so on for an even one
    weight = jnp.where(distance == 0, 1.0, 0.0)
    weight = jnp.where(distance == 0.5, 19 / 32, weight)
    weight = jnp.where(distance == 1.5, -3 / 32, weight)
    first_edge = (place == 0) & (centre == 0.5)  # the fourth pixel would be outside
    last_edge = (place == last) & (centre == last - 0.5)
    return weight + jnp.where(first_edge | last_edge, -3 / 32, 0.0)


@jax.named_scope("vision")
def with_views(crops: Crops[jax.Array]) -> jax.Array:
    """The pixels with the views that `crops.hd` leaves to the device: `Crops` with leading [B, C] ->
    float32[B, C, S, S, 3], values of 0 to 255 and a little beyond.

    They are sums of pixels times multiples of 1/1024, below 2**24 of these: exact in float32, in any order.
    Officially, normalised pixels are interpolated, which is the same up to rounding.
    """
    rows, columns, row, column = jnp.moveaxis(crops.places, -1, 0)
    size, slots = crops.pixels.shape[2], jnp.arange(crops.places.shape[1])
    left = (rows > 0) & ((rows % 2 == 0) | (columns % 2 == 0))  # to the device
    whole = row < 0
    view = slots - 1 - (row * columns + column)  # the slot of a crop's view
    own = (view[:, None] == slots[:, None]) & (left & ~whole)[:, None]
    exactly = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    x = crops.pixels.astype(jnp.float32)
    low = exactly("bciy,bcyxk->bcixk", _taps(rows, row, size), x)
    low = exactly("bcjx,bcixk->bcijk", _taps(columns, column, size), low)
    views = exactly("bvc,bcijk->bvijk", own.astype(jnp.float32), low)
    return jnp.where((whole & left)[..., None, None, None], views, x)


def feature_layout(rows: int, columns: int, side: int, first: int) -> np.ndarray:
    """The feature at each place of an image's span (`sub_glb` order).

    A row's feature table holds the row separator (0), the view separator (1), then side * side features per
    crop. A span is the mosaic of crops line by line, a row separator after each line, then the view
    separator, then the global view, again with a row separator after each line:

        c c c c | r
        c c c c | r        N = side^2 * (rows * columns + 1) + 1 + side * (rows + 1)
        v g g r g g r

    Args:
      rows, columns: grid of crops.
      side: merged features along one side of a crop (12 for the released model).
      first: table index of this image's global view.

    Returns:
      int32[N].
    """
    table = first + np.arange((1 + rows * columns) * side * side, dtype=np.int32).reshape(-1, side, side)
    mosaic = table[1:].reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(rows * side, -1)
    closed = [np.pad(lines, ((0, 0), (0, 1))).reshape(-1) for lines in (mosaic, table[0])]
    return np.concatenate([closed[0], [1], closed[1]]).astype(np.int32)


def without_control(text: str) -> str:
    """The text with a space in everything that the tokenizer would read as a control token."""
    for mark in ("<|", "<s>", "</s>", "<unk>"):
        text = text.replace(mark, "< " + mark[1:])
    return text


class Phi35Processor(processor.Processor[hd.HD]):
    """Text and images to arrays, see `structs.Processor`."""

    def __init__(self, config: Phi35Config, tokenizer: hf.Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = config.decoder.vocab_size
        known = vocabulary(tokenizer, (*STOPS, PLACEHOLDER), self.vocab_size)
        self.stop_ids = tuple(known[token] for token in STOPS)
        self.forbidden_ids = (known[PLACEHOLDER], *range(len(tokenizer), self.vocab_size))
        self.cut = hd.HD(config.num_crops, config.vision.image_size)

    @property
    def _side(self) -> int:
        return self.config.vision.side // 2

    def _parts(self, text: str, images: int) -> list[str]:
        """The text before, between and after the images. As in the official processor, each chunk is
        tokenised alone and begins with BOS, so an extra `<s>` follows every image."""
        texts = ["<|user|>\n"] + ["\n"] * images
        texts[-1] += without_control(text) + END + "\n<|assistant|>\n"
        return texts

    def prefix_shapes(
        self, texts: Sequence[str], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[int, int]]:
        """(prompt tokens, crops) of prompts without decoding an image; sizes are (width, height)."""
        parts = [self._parts(text, len(some)) for text, some in zip(texts, sizes, strict=True)]
        distinct = list(dict.fromkeys(itertools.chain.from_iterable(parts)))
        lengths = dict(zip(distinct, map(len, tokenizer.ids_of_all(self.tokenizer, distinct)), strict=True))
        return [
            self._shape(sum(lengths[part] for part in some), images)
            for some, images in zip(parts, sizes, strict=True)
        ]

    def _shape(self, tokens: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(prompt tokens, crops) of a prompt with so many tokens of text."""
        crops = 0
        for width, height in sizes:
            rows, columns = hd.hd_grid(width, height, self.cut.num_crops, self.cut.size)
            tokens += self._side**2 * (rows * columns + 1) + 1 + self._side * (rows + 1)
            crops += rows * columns + 1
        return tokens, crops

    def prefix(self, text: str, sizes: list[tuple[int, int]]) -> Prefix:
        """The prompt `<|user|>\\n<|image_1|>\\n{text}<|end|>\\n<|assistant|>\\n`, with complete image
        spans."""
        chunks = [self.tokenizer(part)["input_ids"] for part in self._parts(text, len(sizes))]
        first = 2  # feature of the next image: after the separators
        tokens: list[Sequence[int]] = [chunks[0]]
        index: list[Sequence[int]] = [[-1] * len(chunks[0])]
        for (width, height), chunk in zip(sizes, chunks[1:], strict=True):
            rows, columns = hd.hd_grid(width, height, self.cut.num_crops, self.cut.size)
            span = feature_layout(rows, columns, self._side, first).tolist()
            first += (1 + rows * columns) * self._side**2
            tokens += [[0] * len(span), chunk]
            index += [span, [-1] * len(chunk)]
        return Prefix(np.concatenate(tokens).astype(np.int32), np.concatenate(index).astype(np.int32))

    def encode_response(self, text: str) -> list[int]:
        """Ids of a response, ending in `<|end|>`."""
        ids = self.tokenizer(without_control(text), add_special_tokens=False)["input_ids"]
        return [*ids, self.stop_ids[0]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def length_limit(self, prefix_tokens: int) -> int:
        """The longest sequence. A cache that was computed with LongRoPE's short factors cannot be continued
        past the original context, where the long factors apply."""
        c = self.config.decoder
        return c.original_max_position if prefix_tokens <= c.original_max_position else c.max_position


def make_tokenizer(texts: Sequence[str], folder: str | os.PathLike, vocab_size: int) -> None:
    """Trains a small tokenizer with Phi's special tokens, see `tokenizer.make`."""
    tokenizer.make(
        texts,
        folder,
        vocab_size,
        special=SPECIAL,
        bos=BOS,
        eos="<|endoftext|>",
        unk="<unk>",
        rstrip=("<|assistant|>",),
    )


# ----------------------------------------------------------------------------------- the checkpoint
IMAGE = "model.vision_embed_tokens."
CLIP = VitConfig(
    hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, image_size=336, patch_size=14
)  # fixed in the official code, not in config.json
FIXED: dict[str, names.JSON] = {  # the only values of these keys in config.json that the model supports
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "img_processor": {"name": "clip_vision_model"},
}


def read_config(folder: pathlib.Path) -> Phi35Config:
    """The config in config.json and preprocessor_config.json, whose `num_crops` is officially 4.

    A policy of other sizes has a `vision_config` with CLIP's own keys in its config.json.
    """
    c, where = hf.read_json(folder / "config.json"), f"{folder}/config.json:"
    for part, wanted in FIXED.items():
        names.only(c.get(part) or {}, wanted, f"{where} {part}")
    decoder = names.decoder_config(c, where, ("default", "longrope", "su"), rope_theta=10000.0)
    vision = CLIP
    if "vision_config" in c:
        vision = names.vision_config(c["vision_config"], f"{where} vision_config", "quick_gelu")
    path = folder / "preprocessor_config.json"
    crops = {"num_crops": 4} | (hf.read_json(path) if path.exists() else {})
    names.check_numbers({"num_crops": crops["num_crops"]}, f"{path}:")
    return Phi35Config(decoder, vision, crops["num_crops"])


def config_files(config: Phi35Config, dtype: str) -> dict[str, names.JSON]:
    """config.json and preprocessor_config.json for a policy of these dimensions, as `read_config` reads
    them."""
    c, v = config.decoder, config.vision
    scaling = {"type": "su", "short_factor": c.short_factor, "long_factor": c.long_factor}
    return {
        "config.json": {
            "architectures": ["Phi3VForCausalLM"],
            "model_type": "phi3_v",
            "torch_dtype": dtype,
            **names.decoder_values(c),
            "rope_scaling": scaling if c.short_factor else None,
            "sliding_window": None,
            "embd_layer": dict(FIXED["embd_layer"]),
            "img_processor": {
                **FIXED["img_processor"],
                "image_dim_out": v.hidden_size,
                "num_img_tokens": (v.side // 2) ** 2,
            },
            "vision_config": names.vision_values(v),
        },
        "preprocessor_config.json": {"num_crops": config.num_crops},
    }


def table(config: Phi35Config) -> list[names.Tensor]:
    """The checkpoint's tensors."""
    c, v = config.decoder, config.vision
    d, f, h, g, n = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim
    split = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    rest = [entry for entry in names.llama(c, "model.") if entry.name.split(".")[-2] not in split]
    heads = (h + 2 * g, n, d)
    qkv = [
        names.Part(f"decoder.blocks.{name}", heads, np.s_[start:stop], (2, 0, 1))
        for name, start, stop in (("q", 0, h), ("k", h, h + g), ("v", h + g, h + 2 * g))
    ]
    gate_up = [
        names.Part(f"decoder.blocks.{name}", (2 * f, d), np.s_[start : start + f], (1, 0))
        for name, start in (("gate", 0), ("up", f))
    ]
    at = "model.layers.{}."
    rest += [
        names.Tensor(f"{at}self_attn.qkv_proj.weight", ((h + 2 * g) * n, d), tuple(qkv)),
        names.Tensor(f"{at}mlp.gate_up_proj.weight", (2 * f, d), tuple(gate_up)),
    ]
    merged, clip = 4 * v.hidden_size, f"{IMAGE}img_processor.vision_model."
    rest += names.patch_embedding(v, f"{clip}embeddings.patch_embedding", "tower")
    rest += [
        names.plain(f"{clip}embeddings.class_embedding", (v.hidden_size,), "tower.class_embedding"),
        names.plain(
            f"{clip}embeddings.position_embedding.weight",
            (v.side**2 + 1, v.hidden_size),
            "tower.position",
        ),
        names.plain(f"{IMAGE}sub_GN", (1, 1, 1, merged), "row_separator"),
        names.plain(f"{IMAGE}glb_GN", (1, 1, merged), "view_separator"),
    ]
    rest += names.norm(f"{clip}pre_layrnorm", v.hidden_size, "tower.pre_norm", bias=True)
    rest += names.norm(f"{clip}post_layernorm", v.hidden_size, "tower.post_norm", bias=True)
    rest += names.vit_blocks(v, f"{clip}encoder.layers.{{}}.", "tower.blocks.")
    rest += names.linear(f"{IMAGE}img_projection.0", merged, d, "project_up", bias=True)
    rest += names.linear(f"{IMAGE}img_projection.2", d, d, "project_out", bias=True)
    return rest


FAMILY = hf.Family(
    read_config, config_files, table, Phi35Vision, Phi35Processor, tokenizer.load, processor.square
)
