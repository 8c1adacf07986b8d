"""InternVL 2 to 3.5: the model, and what prompts of both of its formats share.

Source: OpenGVLab's InternVL2-2B and its successors. InternViT on every 448 px tile, a 2x2 merge (pixel
shuffle v2), a LayerNorm and MLP projector, and a decoder: InternLM2, which is Llama with other names, Qwen2.5
or Qwen3. How an image becomes tiles is in `crops.tiles`. Every dimension comes from the config, so the tiny
policy runs the same code. Checkpoints have the format of the original code (`internvl_chat`) or that of
transformers (`internvl_hf`).
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerFast

from mstar_jax.crops import tiles
from mstar_jax.crops.arrays import Crops
from mstar_jax.models import hf, names, processor, tokenizer
from mstar_jax.models.layers import Decoder, layer_norm, param
from mstar_jax.models.tokenizer import vocabulary
from mstar_jax.models.vision import Vit, VitConfig, gelu, merge, normalised, patchify
from mstar_jax.models.vlm import PolicyConfig, Remat, VisionLanguageModel
from mstar_jax.structs import Prefix

IMAGE_MEAN, IMAGE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of red, green and blue in [0, 1]
PROJECTOR_EPS = 1e-5  # PyTorch's default; the tower's norms have their own
UNK, START, END = "<unk>", "<|im_start|>", "<|im_end|>"
OPEN, CLOSE, PLACEHOLDER = "<img>", "</img>", "<IMG_CONTEXT>"
REGIONS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
INTERNLM2 = (
    *(UNK, "<s>", "</s>", "<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>"),
    *(END, START, OPEN, CLOSE, PLACEHOLDER, *REGIONS),
)
QWEN = ("<|endoftext|>", START, END, OPEN, CLOSE, PLACEHOLDER, *REGIONS)


@dataclasses.dataclass(frozen=True)
class InternVLConfig(PolicyConfig):
    """Dimensions of the policy.

    Attributes:
      decoder, vision: the two transformers.
      num_crops: the most tiles of an image, in addition to its thumbnail (officially 12).
      min_crops: the fewest tiles of an image.
      use_thumbnail: whether an image of several tiles also has a thumbnail, the whole image in one tile.
    """

    num_crops: int = 12
    min_crops: int = 1
    use_thumbnail: bool = True

    @property
    def features(self) -> int:
        """Features of a tile: 256 for the released models."""
        return (self.vision.side // 2) ** 2


class InternVL(VisionLanguageModel):
    """The policy's parameters and forward pass."""

    def __init__(self, config: InternVLConfig, rngs: nnx.Rngs):
        merged, width = 4 * config.vision.hidden_size, config.decoder.hidden_size
        self.config = config
        self.tower = Vit(config.vision, rngs)
        self.project_norm = param(rngs, (merged,), ("patch",), 1.0)
        self.project_norm_bias = param(rngs, (merged,), ("patch",), 0.0)
        self.project_up = param(rngs, (merged, width), ("patch", "embed"), merged**-0.5)
        self.project_up_bias = param(rngs, (width,), ("embed",), 0.0)
        self.project_out = param(rngs, (width, width), ("mlp", "embed"), width**-0.5)
        self.project_out_bias = param(rngs, (width,), ("embed",), 0.0)
        self.decoder = Decoder(config.decoder, rngs)

    def normalised(self, crops: Crops[jax.Array]) -> jax.Array:
        """`Crops` with leading [B, C] as the tower reads them: [B, C, S, S, 3]."""
        there = crops.places[..., :1, None, None] > 0
        return normalised(crops.pixels, there, IMAGE_MEAN, IMAGE_STD, self.tower.patch[...].dtype)

    def image_features(self, pixels: Crops[jax.Array] | jax.Array, remat: Remat | None = None) -> jax.Array:
        """`Crops` with leading [B, C], or their normalised pixels -> [B, C * (M/2)**2, D]: the tiles in
        order, each line by line."""
        pixels = self.normalised(pixels) if isinstance(pixels, Crops) else pixels
        rows, count = pixels.shape[:2]
        patches = patchify(pixels.reshape(rows * count, *pixels.shape[2:]), self.config.vision.patch_size)
        x = merge(self.tower(patches, remat), 2)
        x = layer_norm(x, self.project_norm[...], self.project_norm_bias[...], PROJECTOR_EPS)
        x = gelu(x @ self.project_up[...] + self.project_up_bias[...])
        x = x @ self.project_out[...] + self.project_out_bias[...]
        return x.reshape(rows, -1, x.shape[-1])


# --------------------------------------------------------------------------------------- the prompt
class InternVLProcessor(processor.Processor[tiles.Tiles]):
    """Text and images to arrays, see `structs.Processor`; each format writes its own prompt (`chunks`)."""

    marks: tuple[str, ...] = ()  # text that the official code replaces by images or videos

    def __init__(self, config: InternVLConfig, tokenizer: hf.Tokenizer | PreTrainedTokenizerFast):
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = config.decoder.vocab_size
        self.cut = tiles.Tiles(
            config.min_crops, config.num_crops, config.vision.image_size, config.use_thumbnail
        )
        qwen = names.language_type(config.decoder) != "llama"
        control = [*(QWEN if qwen else INTERNLM2)]
        known = vocabulary(tokenizer, control, self.vocab_size)
        self.stop_ids = tuple(known[token] for token in (END, START, "<|endoftext|>" if qwen else "</s>"))
        images = (known[OPEN], known[CLOSE], known[PLACEHOLDER])
        self.forbidden_ids = (*images, *range(len(tokenizer), self.vocab_size))
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            control += [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        # pieces such as [UNUSED_TOKEN_145] have the ids of control tokens
        tokens = "|".join(
            rf"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in sorted({*control, *self.marks})
        )
        self._control = re.compile(rf"{tokens}|\[(?=UNUSED_TOKEN_\d+\])")

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def without_control(self, text: str) -> str:
        """The text with a space in everything that the tokenizer, or the official prompt, would read as a
        control token."""
        return self._control.sub(r"\g<0> ", text)

    def chunks(self, text: str, images: int) -> list[list[int]]:
        """Token ids before, between and after the features of images."""
        raise NotImplementedError

    def _tiles(self, width: int, height: int) -> int:
        return tiles.tile_count(*self.cut.grid(width, height), self.cut.thumbnail)

    def prefix_shapes(
        self, texts: Sequence[str], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[int, int]]:
        """(prompt tokens, tiles) of prompts without decoding an image; sizes are (width, height)."""
        return [self._shape(text, some) for text, some in zip(texts, sizes, strict=True)]

    def _shape(self, text: str, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        count = sum(self._tiles(*size) for size in sizes)
        return sum(map(len, self.chunks(text, len(sizes)))) + count * self.config.features, count

    def prefix(self, text: str, sizes: list[tuple[int, int]]) -> Prefix:
        """The official chat prompt, with complete image spans. Images precede the text, each as
        `<img>` features `</img>\\n`."""
        chunks = self.chunks(text, len(sizes))
        first = 0  # feature of the next image
        tokens: list[Sequence[int]] = [chunks[0]]
        index: list[Sequence[int]] = [[-1] * len(chunks[0])]
        for size, chunk in zip(sizes, chunks[1:], strict=True):
            length = self._tiles(*size) * self.config.features
            tokens += [[0] * length, chunk]
            index += [range(first, first + length), [-1] * len(chunk)]
            first += length
        return Prefix(np.concatenate(tokens).astype(np.int32), np.concatenate(index).astype(np.int32))

    def encode_response(self, text: str) -> list[int]:
        """Ids of a response, ending in `<|im_end|>`."""
        return [*self._ids(self.without_control(text)), self.stop_ids[0]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text up to the first stop id, without special tokens."""
        shown = itertools.takewhile(lambda token: token not in self.stop_ids, map(int, tokens))
        return str(self.tokenizer.decode(list(shown), skip_special_tokens=True))

    def length_limit(self, prefix_tokens: int) -> int:
        """The longest sequence: the trained context, within which the official dynamic RoPE scaling does
        nothing."""
        return self.config.decoder.max_position


def load_tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerFast | tokenizer.SentencePiece:
    """The fast tokenizer if the folder has one; officially InternLM2's is a sentencepiece model only."""
    sentencepiece = (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists()
    return tokenizer.SentencePiece(folder) if sentencepiece else tokenizer.load(folder)


# ----------------------------------------------------------------------------------- the checkpoint
NORMS = ("layer_norm", "rms_norm")


def tower_config(values: names.JSON, where: str, bias: str, qk_norm: str, layer: object) -> VitConfig:
    """InternViT's dimensions from config.json's values.

    Args:
      values: the values.
      where: the file, and the part of it, for messages.
      bias, qk_norm: the keys that say whether it has biases, and norms of queries and keys.
      layer: see `VitConfig.select_layer`.

    Raises:
      ValueError: another tower.
    """
    names.check_numbers({key: values[key] for key in (bias, qk_norm)}, where, (bias, qk_norm))
    norm = names.chosen(values, "norm_type", NORMS, where)
    names.only(values, {"use_moe": False}, where)  # the other keys of its experts then mean nothing
    read = {key: v for key, v in values.items() if key not in (bias, qk_norm) and "expert" not in key}
    return names.vision_config(
        read,
        where,
        "gelu",
        activation=gelu,
        select_layer=layer,
        patch_bias=True,
        pre_norm=False,
        post_norm=False,
        layer_scale=True,
        qkv_bias=values[bias],
        qk_norm=values[qk_norm],
        rms_norm=norm == "rms_norm",
    )


def tower_values(config: VitConfig, bias: str, qk_norm: str) -> names.JSON:
    """config.json's values for InternViT, as `tower_config` reads them."""
    kinds = {bias: config.qkv_bias, qk_norm: config.qk_norm, "norm_type": NORMS[config.rms_norm]}
    return {"num_channels": 3, "hidden_act": "gelu", **names.vision_values(config), **kinds}


def tower_table(config: VitConfig, at: str, theirs: dict[str, str]) -> list[names.Tensor]:
    """InternViT's tensors, but for its queries, keys and values.

    Args:
      config: its dimensions.
      at: what precedes `embeddings` and `encoder`.
      theirs: what the format calls its parts.
    """
    v, w = config, config.hidden_size
    block, ours = f"{at}encoder.{theirs['layers']}.{{}}.", "tower.blocks."
    attention = f"{block}{theirs['attention']}."
    out = [
        *names.patch_embedding(v, f"{at}embeddings.{theirs['patch']}", "tower"),
        names.plain(f"{at}embeddings.{theirs['class']}", (1, 1, w), "tower.class_embedding"),
        names.plain(f"{at}embeddings.{theirs['position']}", (1, v.side**2 + 1, w), "tower.position"),
        *names.linear(f"{attention}{theirs['out']}", w, w, f"{ours}o", bias=True),
        *names.linear(f"{block}mlp.fc1", w, v.intermediate_size, f"{ours}up", bias=True),
        *names.linear(f"{block}mlp.fc2", v.intermediate_size, w, f"{ours}down", bias=True),
        *names.norm(f"{block}{theirs['norm1']}", w, f"{ours}norm1", bias=not v.rms_norm),
        *names.norm(f"{block}{theirs['norm2']}", w, f"{ours}norm2", bias=not v.rms_norm),
        names.plain(f"{block}{theirs['scale']}1", (w,), f"{ours}scale1"),
        names.plain(f"{block}{theirs['scale']}2", (w,), f"{ours}scale2"),
    ]
    for name in "qk" if v.qk_norm else "":
        out += names.norm(f"{attention}{name}_norm", w, f"{ours}{name}_norm")
    return out


def projector_table(config: InternVLConfig, norm: str, up: str, out: str) -> list[names.Tensor]:
    """The projector's tensors, by the format's names."""
    merged, d = 4 * config.vision.hidden_size, config.decoder.hidden_size
    return [
        *names.norm(norm, merged, "project_norm", bias=True),
        *names.linear(up, merged, d, "project_up", bias=True),
        *names.linear(out, d, d, "project_out", bias=True),
    ]
