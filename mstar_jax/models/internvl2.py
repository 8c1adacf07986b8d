"""InternVL2: config, image tiles, prompt layout, model.

Source: OpenGVLab/InternVL2-2B. InternViT-300M on every 448 px tile, a 2x2 merge (pixel shuffle v2), a
LayerNorm and MLP projector, and the InternLM2 decoder, which is Llama with other names. Every dimension comes
from the config, so the tiny policy runs the same code.
"""

import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from PIL import Image
from transformers import PreTrainedTokenizerFast

from mstar_jax.models import hf, names, tokenizer
from mstar_jax.models.layers import Decoder, layer_norm, param
from mstar_jax.models.tokenizer import vocabulary
from mstar_jax.models.vision import Vit, gelu, merge, patchify
from mstar_jax.models.vlm import PolicyConfig, Remat, VisionLanguageModel
from mstar_jax.structs import EncodedPrompt

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
PROJECTOR_EPS = 1e-5  # PyTorch's default; the tower's norms have their own
BOS, EOS, UNK, START, END = "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"
OPEN, CLOSE, PLACEHOLDER = "<img>", "</img>", "<IMG_CONTEXT>"
SPECIAL = (
    *(UNK, BOS, EOS, "<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>"),
    *(END, START, OPEN, CLOSE, PLACEHOLDER, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)
STOPS = (END, START, EOS)
SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)


@dataclasses.dataclass(frozen=True)
class InternVL2Config(PolicyConfig):
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


class InternVL2(VisionLanguageModel):
    """The policy's parameters and forward pass."""

    def __init__(self, config: InternVL2Config, rngs: nnx.Rngs):
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

    def image_features(self, pixels: jax.Array, remat: Remat | None = None) -> jax.Array:
        """pixels [B, C, S, S, 3] -> [B, C * (M/2)**2, D]: the tiles in order, each line by line."""
        rows, tiles = pixels.shape[:2]
        patches = patchify(pixels.reshape(rows * tiles, *pixels.shape[2:]), self.config.vision.patch_size)
        x = merge(self.tower(patches, remat), 2)
        x = layer_norm(x, self.project_norm[...], self.project_norm_bias[...], PROJECTOR_EPS)
        x = gelu(x @ self.project_up[...] + self.project_up_bias[...])
        x = x @ self.project_out[...] + self.project_out_bias[...]
        return x.reshape(rows, -1, x.shape[-1])


# ---------------------------------------------------------------------------------------- the tiles
@functools.lru_cache(maxsize=64)
def _grids(least: int, most: int) -> np.ndarray:
    """int64[N, 2]: every (columns, rows) with `least` to `most` tiles, the fewest tiles first."""
    pairs = itertools.product(range(1, most + 1), repeat=2)
    return np.array(sorted((c * r, c, r) for c, r in pairs if least <= c * r <= most))[:, 1:]


def tile_grid(width: int, height: int, least: int, most: int, size: int) -> tuple[int, int]:
    """(rows, columns) of tiles for an image.

    This is the grid whose aspect ratio is nearest to the image's. Among equally near ones (1x1, 2x2, ...) it
    is the largest that the image fills by more than half of its area, or the smallest if it fills none.

    Args:
      width, height: of the image, in pixels.
      least, most: bounds for the number of tiles.
      size: side of a tile, in pixels.
    """
    grids = _grids(min(least, most), most)
    distance = np.abs(width / height - grids[:, 0] / grids[:, 1])
    near = grids[distance == distance.min()]
    filled = near[width * height > 0.5 * size * size * near.prod(axis=1)]
    columns, rows = (filled[-1] if len(filled) else near[0]).tolist()
    return rows, columns


def tile_count(rows: int, columns: int, thumbnail: bool) -> int:
    """The number of tiles for this grid, including the thumbnail, which a single tile does not have."""
    return rows * columns + (thumbnail and rows * columns > 1)


def split_tiles(image: Image.Image, rows: int, columns: int, size: int, thumbnail: bool) -> np.ndarray:
    """Resizes an image to its grid and splits it into tiles.

    Args:
      image: RGB.
      rows, columns: from `tile_grid`.
      size: side of a tile in pixels (448 for the released model).
      thumbnail: whether a thumbnail follows if there are several tiles.

    Returns:
      float32[T, size, size, 3]: normalised tiles row by row, then the thumbnail.
    """
    whole = np.asarray(image.resize((size * columns, size * rows), Image.Resampling.BICUBIC))
    tiles = whole.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4).reshape(-1, size, size, 3)
    if tile_count(rows, columns, thumbnail) > len(tiles):
        small = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        tiles = np.concatenate([tiles, small[None]])
    return (tiles.astype(np.float32) / 255.0 - MEAN) / STD


# --------------------------------------------------------------------------------------- the prompt
_CONTROL = re.compile("|".join(f"<(?={re.escape(token[1:])})" for token in (*SPECIAL, "<image>")))


def without_control(text: str) -> str:
    """The text with a space in everything that the tokenizer, or the official prompt, would read as a control
    token."""
    return _CONTROL.sub("< ", text)


class InternVL2Processor:
    """Text and images to arrays, see `structs.Processor`."""

    def __init__(self, config: InternVL2Config, tokenizer: hf.Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = config.decoder.vocab_size
        known = vocabulary(tokenizer, SPECIAL, self.vocab_size)
        self.stop_ids = tuple(known[token] for token in STOPS)
        images = (known[OPEN], known[CLOSE], known[PLACEHOLDER])
        self.forbidden_ids = (*images, *range(len(tokenizer), self.vocab_size))
        self._bos = known[BOS]
        self._control = frozenset(known[token] for token in SPECIAL if token != UNK)

    @property
    def _features(self) -> int:
        """Features of a tile: 256 for the released model."""
        return (self.config.vision.side // 2) ** 2

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of text that is data. Pieces such as `[UNUSED_TOKEN_145]` have the ids of control tokens; these
        ids are removed."""
        return [token for token in self._ids(without_control(text)) if token not in self._control]

    def _chunks(self, text: str, images: int) -> list[list[int]]:
        """Token ids before, between and after the images. The system block ends without a newline, and a
        single `<s>` begins the prompt."""
        marks = [CLOSE + "\n" + OPEN] * (images - 1) + [CLOSE] if images else []
        head = f"{START}system\n{SYSTEM}{END}{START}" + (f"user\n{OPEN}" if images else "")
        chunks = [self._ids(chunk) for chunk in (head, *marks)]
        chunks[0].insert(0, self._bos)
        chunks[-1] += self._plain_ids(("\n" if images else "user\n") + text)
        chunks[-1] += self._ids(f"{END}{START}assistant\n")
        return chunks

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        c = self.config
        return tile_grid(width, height, c.min_crops, c.num_crops, c.vision.image_size)

    def prefix_shape(self, text: str, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """(prompt tokens, tiles) without decoding an image; sizes are (width, height)."""
        tiles = sum(tile_count(*self._grid(*size), self.config.use_thumbnail) for size in sizes)
        return sum(map(len, self._chunks(text, len(sizes)))) + tiles * self._features, tiles

    def encode(self, text: str, images: list[Image.Image]) -> EncodedPrompt:
        """The official chat prompt, with complete image spans. Images precede the text, each as
        `<img>` features `</img>\\n`."""
        chunks = self._chunks(text, len(images))
        size = self.config.vision.image_size
        first = 0  # feature of the next image
        tokens: list[Sequence[int]] = [chunks[0]]
        index: list[Sequence[int]] = [[-1] * len(chunks[0])]
        pixels = [np.zeros((0, size, size, 3), np.float32)]
        for image, chunk in zip(images, chunks[1:], strict=True):
            pixels.append(split_tiles(image, *self._grid(*image.size), size, self.config.use_thumbnail))
            length = len(pixels[-1]) * self._features
            tokens += [[0] * length, chunk]
            index += [range(first, first + length), [-1] * len(chunk)]
            first += length
        return EncodedPrompt(
            np.concatenate(tokens).astype(np.int32),
            np.concatenate(index).astype(np.int32),
            np.concatenate(pixels),
        )

    def encode_response(self, text: str) -> list[int]:
        """Ids of a response, ending in `<|im_end|>`."""
        return [*self._plain_ids(text), self.stop_ids[0]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text up to the first stop id, without special tokens."""
        shown = itertools.takewhile(lambda token: token not in self.stop_ids, map(int, tokens))
        return self.tokenizer.decode(list(shown), skip_special_tokens=True)

    def length_limit(self, prefix_tokens: int) -> int:
        """The longest sequence: the trained context, within which the official dynamic RoPE scaling does
        nothing."""
        return self.config.decoder.max_position


def load_tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerFast | tokenizer.SentencePiece:
    """The fast tokenizer if the folder has one; officially it has a sentencepiece model only."""
    fast = (folder / "tokenizer.json").exists()
    return tokenizer.load(folder) if fast else tokenizer.SentencePiece(folder)


# ----------------------------------------------------------------------------------- the checkpoint
FIXED: dict[str, names.JSON] = {  # the only values of these keys in config.json that the model supports
    "": {
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "template": "internlm2-chat",
        "dynamic_image_size": True,
        "pad2square": False,
    },
    "vision_config": {
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "qk_normalization": False,
        "qkv_bias": True,
    },
    "llm_config": {"model_type": "internlm2", "hidden_act": "silu", "bias": False},
}
TILES = {  # our field: the key in config.json
    "num_crops": "max_dynamic_patch",
    "min_crops": "min_dynamic_patch",
    "use_thumbnail": "use_thumbnail",
}


def read_config(folder: pathlib.Path) -> InternVL2Config:
    """The config in config.json.

    Raises:
      ValueError: it describes another architecture, such as an InternVL2 with another decoder.
    """
    c = hf.read_json(folder / "config.json")
    v, llm = c["vision_config"], c["llm_config"]
    where = f"{folder}/config.json:"
    for there, part in ((c, ""), (v, "vision_config"), (llm, "llm_config")):
        wanted = FIXED[part] | ({} if part else {"force_image_size": v["image_size"]})
        names.only(there, wanted, f"{where} {part}".rstrip())
    decoder = names.decoder_config(llm, f"{where} llm_config", ("default", "dynamic"))
    vision = names.vision_config(
        v,
        f"{where} vision_config",
        "gelu",
        activation=gelu,
        select_layer=c["select_layer"],
        patch_bias=True,
        pre_norm=False,
        post_norm=False,
        layer_scale=True,
    )
    names.check_numbers({key: c[key] for key in TILES.values()}, where, ("use_thumbnail",))
    if c["min_dynamic_patch"] > c["max_dynamic_patch"]:
        raise ValueError(f"{where} min_dynamic_patch, {c['min_dynamic_patch']}, is above max_dynamic_patch")
    return InternVL2Config(decoder, vision, **{ours: c[key] for ours, key in TILES.items()})


def config_files(config: InternVL2Config, dtype: str) -> dict[str, names.JSON]:
    """config.json for a policy of these dimensions, as `read_config` reads it."""
    return {
        "config.json": {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "torch_dtype": dtype,
            "select_layer": config.vision.select_layer,
            "force_image_size": config.vision.image_size,
            **{key: getattr(config, ours) for ours, key in TILES.items()},
            **FIXED[""],
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "model_type": "intern_vit_6b",
                "num_channels": 3,
                **names.vision_values(config.vision),
                **FIXED["vision_config"],
            },
            "llm_config": {
                "architectures": ["InternLM2ForCausalLM"],
                "rope_scaling": {"factor": 2.0, "type": "dynamic"},
                **names.decoder_values(config.decoder),
                **FIXED["llm_config"],
            },
        }
    }


def table(config: InternVL2Config) -> list[names.Tensor]:
    """The checkpoint's tensors. InternLM2 fuses q, k and v per key/value head (its queries, its key, its
    value); InternViT concatenates all of q, k and v."""
    c, v = config.decoder, config.vision
    d, f, h, g, n = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim
    group, at, ours = h // g, "language_model.model.layers.{}.", "decoder.blocks."
    heads = (g, group + 2, n, d)
    qkv = (
        names.Part(f"{ours}q", heads, np.s_[:, :group], (3, 0, 1, 2)),
        names.Part(f"{ours}k", heads, np.s_[:, group], (2, 0, 1)),
        names.Part(f"{ours}v", heads, np.s_[:, group + 1], (2, 0, 1)),
    )
    out = [
        names.plain("language_model.model.tok_embeddings.weight", (c.vocab_size, d), "decoder.embedding"),
        names.Tensor(f"{at}attention.wqkv.weight", ((h + 2 * g) * n, d), qkv),
        *names.linear(f"{at}attention.wo", h * n, d, f"{ours}o"),
        *names.linear(f"{at}feed_forward.w1", d, f, f"{ours}gate"),
        *names.linear(f"{at}feed_forward.w3", d, f, f"{ours}up"),
        *names.linear(f"{at}feed_forward.w2", f, d, f"{ours}down"),
        *names.norm(f"{at}attention_norm", d, f"{ours}input_norm"),
        *names.norm(f"{at}ffn_norm", d, f"{ours}post_norm"),
        *names.norm("language_model.model.norm", d, "decoder.norm"),
    ]
    if not c.tie_word_embeddings:
        out += names.linear("language_model.output", d, c.vocab_size, "decoder.head")
    w, merged, embeddings = v.hidden_size, 4 * v.hidden_size, "vision_model.embeddings."
    out += [
        *names.patch_embedding(v, f"{embeddings}patch_embedding", "tower"),
        names.plain(f"{embeddings}class_embedding", (1, 1, w), "tower.class_embedding"),
        names.plain(f"{embeddings}position_embedding", (1, v.side**2 + 1, w), "tower.position"),
    ]
    at, ours = "vision_model.encoder.layers.{}.", "tower.blocks."
    qkv_weight = [names.Part(f"{ours}{part}", (3, w, w), np.s_[i], (1, 0)) for i, part in enumerate("qkv")]
    qkv_bias = [names.Part(f"{ours}{part}_bias", (3, w), np.s_[i]) for i, part in enumerate("qkv")]
    out += [
        names.Tensor(f"{at}attn.qkv.weight", (3 * w, w), tuple(qkv_weight)),
        names.Tensor(f"{at}attn.qkv.bias", (3 * w,), tuple(qkv_bias)),
        *names.linear(f"{at}attn.proj", w, w, f"{ours}o", bias=True),
        *names.linear(f"{at}mlp.fc1", w, v.intermediate_size, f"{ours}up", bias=True),
        *names.linear(f"{at}mlp.fc2", v.intermediate_size, w, f"{ours}down", bias=True),
        *names.norm(f"{at}norm1", w, f"{ours}norm1", bias=True),
        *names.norm(f"{at}norm2", w, f"{ours}norm2", bias=True),
        names.plain(f"{at}ls1", (w,), f"{ours}scale1"),
        names.plain(f"{at}ls2", (w,), f"{ours}scale2"),
        *names.norm("mlp1.0", merged, "project_norm", bias=True),
        *names.linear("mlp1.1", merged, d, "project_up", bias=True),
        *names.linear("mlp1.3", d, d, "project_out", bias=True),
    ]
    return out


def pixels(config: InternVL2Config, crops: int) -> jax.ShapeDtypeStruct:
    """The pixels' shape for a prompt with this many tiles, thumbnails included."""
    return jax.ShapeDtypeStruct((crops, config.vision.image_size, config.vision.image_size, 3), "float32")


FAMILY = hf.Family(read_config, config_files, table, InternVL2, InternVL2Processor, load_tokenizer, pixels)
