"""SmolVLM2, and SmolVLM and Idefics3, which are the same architecture: config, prompt layout, model.

Source: HuggingFaceTB/SmolVLM2-256M-Video-Instruct, transformers' SmolVLMForConditionalGeneration. SigLIP on
the tiles of an image and on the whole of it, a pixel shuffle and one projection, and Llama. How an image
becomes tiles is in `crops.splitting`. Every dimension comes from the config, so a tiny policy runs the same
code. Videos are not read.
"""

import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from flax import nnx
from PIL import Image
from transformers import PreTrainedTokenizerFast

from mstar_jax.crops import splitting
from mstar_jax.crops.arrays import Crops
from mstar_jax.crops.splitting import Layout
from mstar_jax.models import hf, names, processor, tokenizer
from mstar_jax.models.layers import Decoder, param
from mstar_jax.models.tokenizer import vocabulary
from mstar_jax.models.vision import Vit, merge, normalised, patchify, tanh_gelu
from mstar_jax.models.vlm import PolicyConfig, Remat, VisionLanguageModel
from mstar_jax.structs import Prefix

IMAGE, AROUND, GLOBAL, END = "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
OTHER_STOPS = ("<|im_end|>", "<|endoftext|>")  # SmolLM2's; Idefics3's Llama 3 has none of them
SPECIAL = (IMAGE, AROUND, END)  # Idefics3 spells the other marks in pieces
MARKS = r"<row_\d+_col_\d+>|" + re.escape(GLOBAL)
TEMPLATE = (  # the official chat template
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ ' ' if loop.first }}{{ part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
MEAN = STD = (0.5, 0.5, 0.5)
LARGEST = 4096  # pixels; officially, no image is resized to more


@dataclasses.dataclass(frozen=True)
class SmolVLMConfig(PolicyConfig):
    """Dimensions of the policy.

    Attributes:
      decoder, vision: the two transformers.
      num_crops: the most tiles of an image, in addition to the whole image (officially 16).
      scale_factor: patches along a side of the square that is merged into one feature.
      longest_edge: pixels; an image is first resized to this length of its longer side.
      split: whether images are cut into tiles; without, an image is the whole image alone.
      image_token_id: what stands for a feature in official prompts.
    """

    scale_factor: int = 4
    longest_edge: int = 2048
    split: bool = True
    image_token_id: int = 49190

    def __post_init__(self):
        if self.vision.side % self.scale_factor:
            raise ValueError(
                f"scale_factor = {self.scale_factor} does not divide the {self.vision.side} patches along a "
                f"side of an image (image_size {self.vision.image_size}, patch_size {self.vision.patch_size})"
            )
        if self.longest_edge > LARGEST:
            raise ValueError(f"longest_edge = {self.longest_edge}: at most {LARGEST} pixels are supported")

    @property
    def features(self) -> int:
        """Features of a tile: 64 for the smaller released models."""
        return (self.vision.side // self.scale_factor) ** 2


class SmolVLM(VisionLanguageModel):
    """The policy's parameters and forward pass.

    Patches have the tower's positions in their order. Officially these are rounded fractions of an image's
    side, which is the same for the 26, 27 or 32 patches a side of the released models. For some other numbers
    (19, 25, 29, ...) transformers' rounding gives two patches one position.
    """

    def __init__(self, config: SmolVLMConfig, rngs: nnx.Rngs):
        merged, width = config.scale_factor**2 * config.vision.hidden_size, config.decoder.hidden_size
        self.config = config
        self.tower = Vit(config.vision, rngs)
        self.project = param(rngs, (merged, width), ("patch", "embed"), merged**-0.5)
        self.decoder = Decoder(config.decoder, rngs)

    def normalised(self, crops: Crops[jax.Array]) -> jax.Array:
        """`Crops` with any leading dimensions as the tower reads them: [..., S, S, 3]."""
        there = crops.places[..., :1, None, None] > 0
        return normalised(crops.pixels, there, MEAN, STD, self.tower.patch[...].dtype)

    def image_features(self, pixels: Crops[jax.Array] | jax.Array, remat: Remat | None = None) -> jax.Array:
        """`Crops` with leading [B, C], or their normalised pixels -> [B, C * features, D]: the crops in
        order, each line by line."""
        c = self.config
        used = c.vision.side * c.vision.patch_size  # 378 of the 384 pixels of a tile of the 2.2B model

        def one(crop):  # one crop of every row at a time, since the attention scores of all C would be large
            crop = self.normalised(crop) if isinstance(crop, Crops) else crop
            patches = patchify(crop[:, :used, :used], c.vision.patch_size)
            return merge(self.tower(patches, remat), c.scale_factor) @ self.project[...]

        features = jnp.moveaxis(jax.lax.map(one, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), pixels)), 0, 1)
        return features.reshape(features.shape[0], -1, features.shape[-1])


# --------------------------------------------------------------------------------------- the prompt
def placeholder(cut: Layout, features: int) -> str:
    """The text that stands for an image in a prompt: the tiles with their places, one line per row, then the
    whole image."""
    span = IMAGE * features
    lines = [
        "".join(f"{AROUND}<row_{row}_col_{column}>{span}" for column in range(1, cut.columns + 1)) + "\n"
        for row in range(1, cut.rows + 1)
    ]
    return "".join([*lines, "\n" if lines else "", AROUND, GLOBAL, span, AROUND])


class SmolVLMProcessor(processor.Processor[splitting.Splitting]):
    """Text and images to arrays, see `structs.Processor`."""

    def __init__(self, config: SmolVLMConfig, tokenizer: PreTrainedTokenizerFast):
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = config.decoder.vocab_size
        known = vocabulary(tokenizer, SPECIAL, self.vocab_size)
        if (found := known[IMAGE]) != config.image_token_id:
            raise ValueError(f"{IMAGE} is {found}, config.json's image_token_id {config.image_token_id}")
        self.stop_ids = tuple(known[token] for token in (END, *OTHER_STOPS) if token in known)
        self.cut = splitting.Splitting(
            config.num_crops, config.vision.image_size, config.longest_edge, config.split
        )
        special = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        control = sorted({*SPECIAL, *special, *(token for token in known if re.fullmatch(MARKS, token))})
        self._control = re.compile("|".join([*map(re.escape, control), MARKS]))
        self._control_ids = frozenset(known[token] for token in control)
        forbidden = sorted(self._control_ids - set(self.stop_ids))
        self.forbidden_ids = (*forbidden, *range(len(tokenizer), self.vocab_size))
        try:
            written = self._rendered("?", 2)
        except (TypeError, jinja2.TemplateError) as error:  # it expects a text, not a list of parts
            written = repr(error)
        if written.count(IMAGE) != 2 or f"{IMAGE}?" not in written:
            raise ValueError(
                f"the chat template is not this policy's: of two images and '?' it makes {written}"
            )

    def _without_control(self, text: str) -> str:
        """The text with a space in what the tokenizer, or the official prompt, reads as a control token."""
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _rendered(self, text: str, images: int) -> str:
        """What the chat template writes, with `<image>` for each image."""
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _prompt(self, text: str, cuts: list[Layout], features: int) -> str:
        """The chat template's prompt; `<image>` stands for each of so many features of a crop."""
        parts = self._rendered(self._without_control(text), len(cuts)).split(IMAGE)
        images = (placeholder(cut, features) for cut in cuts)
        return "".join(itertools.chain(*itertools.zip_longest(parts, images, fillvalue="")))

    def prefix_shapes(
        self, texts: Sequence[str], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[int, int]]:
        """(prompt tokens, crops), no image decoded; sizes are (width, height). Features' tokens join none."""
        cuts = [[self.cut.layout(size) for size in some] for some in sizes]
        prompts = [self._prompt(text, some, 0) for text, some in zip(texts, cuts, strict=True)]
        marks = tokenizer.ids_of_all(self.tokenizer, prompts, add_special_tokens=False)
        crops = (sum(cut.crops for cut in some) for some in cuts)
        return [(len(ids) + n * self.config.features, n) for ids, n in zip(marks, crops)]

    def prefix(self, text: str, sizes: list[tuple[int, int]]) -> Prefix:
        """The official chat prompt, with images before the text and complete image spans."""
        prompt = self._prompt(text, [self.cut.layout(size) for size in sizes], self.config.features)
        tokens = np.array(self.tokenizer(prompt, add_special_tokens=False)["input_ids"], np.int32)
        places = tokens == self.config.image_token_id
        index = np.where(places, np.cumsum(places) - 1, -1)
        return Prefix(np.where(places, 0, tokens), index.astype(np.int32))

    def encode_response(self, text: str) -> list[int]:
        """Ids of a response, ending in `<end_of_utterance>`. A space follows the prompt's `Assistant:`."""
        text = self._without_control(text)
        spaced = text if not text or text[0].isspace() else f" {text}"
        return [*self.tokenizer(spaced, add_special_tokens=False)["input_ids"], self.stop_ids[0]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without control tokens; spaces are not cleaned up."""
        ids = [token for token in map(int, tokens) if token not in self._control_ids]
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def length_limit(self, prefix_tokens: int) -> int:
        """The longest sequence: the decoder's context."""
        return self.config.decoder.max_position


def load_tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer with its chat template, or the official one."""
    return tokenizer.load_with_template(folder, TEMPLATE)


# ----------------------------------------------------------------------------------- the checkpoint
# What the released files leave out: defaults of transformers' SmolVLMVisionConfig.
SIGLIP = {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "layer_norm_eps": 1e-6}
SIGLIP |= {"num_attention_heads": 16, "image_size": 224, "patch_size": 32}
# The only values of these keys that the model supports.
TEXT = {"model_type": "llama", "mlp_bias": False, "use_resampler": False}
IMAGES: names.JSON = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
IMAGES |= {"resample": int(Image.Resampling.LANCZOS), "rescale_factor": 1 / 255}
IMAGES |= {"image_mean": list(MEAN), "image_std": list(STD)}


def read_config(folder: pathlib.Path) -> SmolVLMConfig:
    """The config in config.json and, for the tiles, the image processor's file (`hf.read_images`),
    or what `vision_config` says of them.

    Raises:
      ValueError: it describes another architecture.
    """
    c, where = hf.read_json(folder / "config.json"), f"{folder}/config.json:"
    text, v = c["text_config"], SIGLIP | c["vision_config"]
    names.only(text, TEXT, f"{where} text_config")
    names.only(v, {"num_channels": 3}, f"{where} vision_config")
    if "tie_word_embeddings" in c:  # what text_config says is then not read
        text |= {"tie_word_embeddings": c["tie_word_embeddings"]}
    side = v["image_size"]
    images = {"size": {"longest_edge": 4 * side}, "do_image_splitting": True} | v
    images |= hf.read_images(folder, IMAGES | {"max_image_size": {"longest_edge": side}})
    longest, split = images["size"]["longest_edge"], images["do_image_splitting"]
    return SmolVLMConfig(
        names.language_config({"model_type": "llama", **text}, f"{where} text_config"),
        names.vision_config(
            v,
            f"{where} vision_config",
            "gelu_pytorch_tanh",
            activation=tanh_gelu,
            select_layer=-1,
            patch_bias=True,
            class_token=False,
            pre_norm=False,
        ),
        num_crops=math.ceil(longest / v["image_size"]) ** 2 if split else 0,
        scale_factor=c.get("scale_factor", 2),
        longest_edge=longest,
        split=split,
        image_token_id=c.get("image_token_id", 128257),
    )


def config_files(config: SmolVLMConfig, dtype: str) -> dict[str, names.JSON]:
    """config.json and the processor's files for a policy of these dimensions, as `read_config` and
    transformers read them."""
    return {
        "config.json": {
            "architectures": ["SmolVLMForConditionalGeneration"],
            "model_type": "smolvlm",
            "torch_dtype": dtype,
            "image_token_id": config.image_token_id,
            "scale_factor": config.scale_factor,
            "tie_word_embeddings": config.decoder.tie_word_embeddings,
            "text_config": {
                **names.decoder_values(config.decoder),
                "head_dim": config.decoder.head_dim,
                **TEXT,
            },
            "vision_config": {
                "model_type": "smolvlm_vision",
                **names.vision_values(config.vision),
            },
        },
        "preprocessor_config.json": {
            "image_processor_type": "SmolVLMImageProcessor",
            "processor_class": "SmolVLMProcessor",
            "do_convert_rgb": True,
            "do_image_splitting": config.split,
            "do_pad": True,
            "size": {"longest_edge": config.longest_edge},
            "max_image_size": {"longest_edge": config.vision.image_size},
            **IMAGES,
        },
        "processor_config.json": {"processor_class": "SmolVLMProcessor", "image_seq_len": config.features},
    }


def table(config: SmolVLMConfig) -> list[names.Tensor]:
    """The checkpoint's tensors."""
    v, at = config.vision, "model.vision_model."
    merged = config.scale_factor**2 * v.hidden_size
    position = f"{at}embeddings.position_embedding.weight"
    return [
        *names.llama(config.decoder, "model.text_model."),
        *names.patch_embedding(v, f"{at}embeddings.patch_embedding", "tower"),
        names.plain(position, (v.side**2, v.hidden_size), "tower.position"),
        *names.vit_blocks(v, at + "encoder.layers.{}.", "tower.blocks."),
        *names.norm(f"{at}post_layernorm", v.hidden_size, "tower.post_norm", bias=True),
        *names.linear(
            "model.connector.modality_projection.proj", merged, config.decoder.hidden_size, "project"
        ),
    ]


FAMILY = hf.Family(
    read_config, config_files, table, SmolVLM, SmolVLMProcessor, load_tokenizer, processor.square
)
