"""What Qwen2.5-VL and Qwen3-VL share besides their images: prompts, and what their checkpoints say.

Source: transformers' Qwen2_5_VLProcessor. Videos are not read.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Sequence

import jax
import jinja2
import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from mstar_jax.crops.native import Crops, Native, rounded
from mstar_jax.models import hf, names, processor, tokenizer
from mstar_jax.models.layers import DecoderConfig
from mstar_jax.models.native import FRAMES, QwenConfig, feature_index, token_positions
from mstar_jax.models.tokenizer import vocabulary
from mstar_jax.models.vision import VitConfig
from mstar_jax.structs import Prefix

IMAGE, BEFORE, AFTER = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
START, END, EOS = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL = (START, END, BEFORE, AFTER, IMAGE)
TEMPLATE = (  # what the official chat templates write for text and images
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --------------------------------------------------------------------------------------- the prompt
class QwenProcessor(processor.Processor[Native]):
    """Text and images to arrays, see `structs.Processor`."""

    def __init__(self, config: QwenConfig, tokenizer: PreTrainedTokenizerFast):
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = config.decoder.vocab_size
        self.cut = config.cut
        known = vocabulary(tokenizer, SPECIAL, self.vocab_size)
        if (found := known[IMAGE]) != config.image_token_id:
            raise ValueError(f"{IMAGE} is {found}, config.json's image_token_id {config.image_token_id}")
        self.stop_ids = tuple(known[token] for token in (END, EOS) if token in known)
        added = tokenizer.added_tokens_decoder.values()  # <tool_call> and <think> are words like others
        control = {t.content for t in added if t.special or re.fullmatch(r"<\|\w+\|>", t.content)}
        control |= set(SPECIAL)
        self._control = re.compile("|".join(map(re.escape, sorted(control))))
        self._control_ids = frozenset(known[token] for token in control)
        forbidden = sorted(self._control_ids - set(self.stop_ids))
        self.forbidden_ids = (*forbidden, *range(len(tokenizer), self.vocab_size))
        try:
            written = self._rendered("?", 2)
        except (TypeError, jinja2.TemplateError) as error:  # it expects a text, not a list of parts
            written = repr(error)
        if written.count(IMAGE) != 2 or f"{AFTER}?" not in written:
            raise ValueError(
                f"the chat template is not this policy's: of two images and '?' it makes {written}"
            )

    def _without_control(self, text: str) -> str:
        """The text with a space in everything that the tokenizer would read as a control token."""
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _rendered(self, text: str, images: int) -> str:
        """What the chat template writes, with one `<|image_pad|>` for each image. A template that opens a
        `<think>` block does so at the end of the prompt; a response has to close it."""
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
        messages: list[names.JSON] = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _prompt(self, text: str, features: Sequence[int]) -> str:
        """The prompt with images of so many features."""
        parts = self._rendered(self._without_control(text), len(features)).split(IMAGE)
        images = (IMAGE * count for count in features)
        return "".join(itertools.chain(*itertools.zip_longest(parts, images, fillvalue="")))

    def prefix_shapes(
        self, texts: Sequence[str], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[int, int]]:
        """(prompt tokens, crops with padding), no image decoded; sizes are (width, height). Features' tokens
        join none."""
        cuts = [[self.cut.layout(size) for size in some] for some in sizes]
        prompts = [self._prompt(text, [0] * len(some)) for text, some in zip(texts, cuts, strict=True)]
        marks = tokenizer.ids_of_all(self.tokenizer, prompts, add_special_tokens=False)
        return [
            (len(ids) + sum(cut.features for cut in some), rounded(sum(cut.crops for cut in some)))
            for ids, some in zip(marks, cuts, strict=True)
        ]

    def prefix(self, text: str, sizes: list[tuple[int, int]]) -> Prefix:
        """The official chat prompt, with images before the text and complete image spans."""
        cuts = [self.cut.layout(size) for size in sizes]
        prompt = self._prompt(text, [cut.features for cut in cuts])
        tokens = np.array(self.tokenizer(prompt, add_special_tokens=False)["input_ids"], np.int32)
        places = tokens == self.config.image_token_id
        index = np.full(len(tokens), -1, np.int32)
        if cuts:
            firsts = itertools.accumulate((cut.crops for cut in cuts), initial=0)
            index[places] = np.concatenate([feature_index(self.config, *one) for one in zip(cuts, firsts)])
        return Prefix(np.where(places, 0, tokens), index, token_positions(places, cuts))

    def encode_response(self, text: str) -> list[int]:
        """Ids of a response, ending in `<|im_end|>`."""
        ids = self.tokenizer(self._without_control(text), add_special_tokens=False)["input_ids"]
        return [*ids, self.stop_ids[0]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without control tokens; spaces are not cleaned up."""
        ids = [token for token in map(int, tokens) if token not in self._control_ids]
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def length_limit(self, prefix_tokens: int) -> int:
        """The longest sequence: the decoder's context."""
        return self.config.decoder.max_position


def load_tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer with its chat template, which may be in chat_template.json; without one, with
    one that writes the official prompt without a system message."""
    found = tokenizer.load(folder)
    path = folder / "chat_template.json"
    if found.chat_template is None:
        found.chat_template = hf.read_json(path)["chat_template"] if path.exists() else TEMPLATE
    return found


# ----------------------------------------------------------------------------------- the checkpoint
# The only values of these keys that the model supports.
IMAGES: names.JSON = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
IMAGES |= {
    "resample": int(Image.Resampling.BICUBIC),
    "rescale_factor": 1 / 255,
    "temporal_patch_size": FRAMES,
}
TOWER = {"num_channels": 3, "in_channels": 3, "in_chans": 3, "temporal_patch_size": FRAMES}
SIZES = ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size")
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


def read_images(folder: pathlib.Path, vision: names.JSON) -> names.JSON:
    """QwenConfig's fields about images: from preprocessor_config.json or, as transformers 5 writes it, from
    `image_processor` in processor_config.json; what neither says is as in transformers.

    Args:
      folder: of the checkpoint.
      vision: config.json's `vision_config`, whose sizes of patches and features have to be the same.

    Raises:
      ValueError: a value that is not supported; the message names the file and the key.
    """
    wanted = IMAGES | {"patch_size": vision["patch_size"], "merge_size": vision["spatial_merge_size"]}
    found: names.JSON = dict(CLIP)
    for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", "")):
        if (folder / name).exists():
            values = hf.read_json(folder / name)
            values = (values.get(part) or {}) if part else values
            names.only(values, wanted, f"{folder}/{name}:")
            found |= {key: value for key, value in values.items() if value is not None}
    size = {"shortest_edge": QwenConfig.min_pixels, "longest_edge": QwenConfig.max_pixels}
    size |= found.get("size") or {}
    limits = {
        "min_pixels": found.get("min_pixels", size["shortest_edge"]),
        "max_pixels": found.get("max_pixels", size["longest_edge"]),
    }
    names.check_numbers(limits, f"{folder}: size of images:")
    return limits | {"mean": tuple(found["image_mean"]), "std": tuple(found["image_std"])}


def read_decoder(values: names.JSON, where: str, *, interleaved: bool) -> DecoderConfig:
    """A decoder with M-RoPE from config.json's values: with biases (Qwen2.5), or interleaved sections and
    norms of queries and keys (Qwen3).

    Raises:
      ValueError: a setting that the decoder does not have.
    """
    sections = None
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(found := values.get(name), dict):
            names.only(found, {"mrope_interleaved": interleaved}, f"{where} {name}")
            sections = found.get("mrope_section", sections)
            plain = {
                k: "default" if v == "mrope" else v for k, v in found.items() if not k.startswith("mrope")
            }
            values = values | {name: plain}
    config = names.decoder_config(values, where, qkv_bias=not interleaved, qk_norm=interleaved)
    if sections is None:
        raise KeyError("mrope_section")
    if len(sections) != 3 or min(sections) < 1 or 2 * sum(sections) != config.head_dim:
        raise ValueError(
            f"{where} mrope_section is {sections}, not three that add up to half of {config.head_dim}"
        )
    return dataclasses.replace(config, rope_sections=tuple(sections), rope_interleaved=interleaved)


def decoder_values(config: DecoderConfig) -> names.JSON:
    """config.json's values for a decoder with M-RoPE."""
    values = names.decoder_values(config)
    rope: names.JSON = {"rope_type": "default", "mrope_section": list(config.rope_sections or ())}
    rope |= {"mrope_interleaved": True} if config.rope_interleaved else {}
    return {**values, "rope_scaling": rope}


def check_tower(values: names.JSON, where: str, sizes: Sequence[str] = SIZES) -> None:
    """Checks a tower's values in config.json: sizes, and settings that it does not have.

    Raises:
      ValueError: the message begins with `where`.
    """
    names.only(values, TOWER, where)
    others = {k: v for k, v in values.items() if k not in ("window_size", "rope_parameters")}
    names.known_attention(others, where)
    axial = {"rope_type": "axial", "rope_theta": 10000.0}
    names.only(values.get("rope_parameters") or {}, axial, f"{where} rope_parameters:")
    names.check_numbers({name: values[name] for name in sizes}, where)
    names.check_divides(values, "hidden_size", "num_heads", where)


def tower_values(config: QwenConfig) -> names.JSON:
    """config.json's values for what `check_tower` checks."""
    v = config.vision
    found = (v.num_layers, v.hidden_size, v.intermediate_size, v.num_heads, v.patch_size, config.merged)
    tower = {"in_channels": 3, "temporal_patch_size": FRAMES, "out_hidden_size": config.decoder.hidden_size}
    return dict(zip(SIZES, found, strict=True)) | tower


def images_file(config: QwenConfig, kind: str) -> names.JSON:
    """preprocessor_config.json; `kind` is transformers' name of the processor."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": kind,
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        "patch_size": config.vision.patch_size,
        "merge_size": config.merged,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        **IMAGES,
    }


def fused(c: VitConfig, at: str, ours: str) -> list[names.Tensor]:
    """Names of a block's attention and norms, with queries, keys and values in one tensor."""
    d = c.hidden_size
    weight = [names.Part(f"{ours}{part}", (3, d, d), np.s_[i], (1, 0)) for i, part in enumerate("qkv")]
    bias = [names.Part(f"{ours}{part}_bias", (3, d), np.s_[i]) for i, part in enumerate("qkv")]
    return [
        names.Tensor(f"{at}attn.qkv.weight", (3 * d, d), tuple(weight)),
        names.Tensor(f"{at}attn.qkv.bias", (3 * d,), tuple(bias)),
        *names.linear(f"{at}attn.proj", d, d, f"{ours}o", bias=True),
    ]


def patch_embedding(c: VitConfig, name: str) -> list[names.Tensor]:
    """The convolution over two frames [out, 3, 2, p, p] that embeds patches."""
    d, inputs = c.hidden_size, 3 * FRAMES * c.patch_size**2
    weight = names.Part("tower.patch", (d, inputs), order=(1, 0))
    shape = (d, 3, FRAMES, c.patch_size, c.patch_size)
    table = [names.Tensor(f"{name}.weight", shape, (weight,))]
    return table + ([names.plain(f"{name}.bias", (d,), "tower.patch_bias")] if c.patch_bias else [])


def pixels(config: QwenConfig, crops: int) -> Crops[jax.ShapeDtypeStruct]:
    """The pixels' shapes for a prompt with this many crops."""
    side = config.vision.image_size
    values = jax.ShapeDtypeStruct((crops, side, side, 3), "uint8")
    return Crops(values, jax.ShapeDtypeStruct((crops, 5), "int32"))
