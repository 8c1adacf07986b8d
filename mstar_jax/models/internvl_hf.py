"""InternVL in transformers' format, `internvl`: InternVL2.5, 3 and 3.5 with names that end in -hf or -HF.

Source: OpenGVLab/InternVL3-8B-hf, InternVL3_5-8B-HF, transformers' InternVLForConditionalGeneration. The
prompt is that of the folder's chat template, which may open a `<think>` block. Videos are not read.
"""

import dataclasses
import pathlib
from typing import Any

import jinja2
from PIL import Image
from transformers import PreTrainedTokenizerFast

from mstar_jax.models import hf, names, processor, tokenizer
from mstar_jax.models.internvl import (
    CLOSE,
    IMAGE_MEAN,
    IMAGE_STD,
    OPEN,
    PLACEHOLDER,
    InternVL,
    InternVLConfig,
    InternVLProcessor,
    projector_table,
    tower_config,
    tower_table,
    tower_values,
)

TEMPLATE = (  # the official chat template, of images and texts
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class InternVLHFConfig(InternVLConfig):
    """Dimensions of the policy.

    Attributes:
      image_token_id: what stands for a feature in official prompts.
    """

    image_token_id: int = 151667


class InternVLHFProcessor(InternVLProcessor):
    """The processor of this format, see `structs.Processor`."""

    marks = ("<video>",)
    tokenizer: PreTrainedTokenizerFast

    def __init__(self, config: InternVLHFConfig, tokenizer: PreTrainedTokenizerFast):
        super().__init__(config, tokenizer)
        if (found := tokenizer.get_vocab()[PLACEHOLDER]) != config.image_token_id:
            raise ValueError(
                f"{PLACEHOLDER} is {found}, config.json's image_token_id {config.image_token_id}"
            )
        try:
            written = self._rendered("?", 2)
        except (TypeError, jinja2.TemplateError) as error:  # it expects a text, not a list of parts
            written = repr(error)
        if written.count(PLACEHOLDER) != 2 or "?" not in written.rpartition(PLACEHOLDER)[2]:
            raise ValueError(
                f"the chat template is not this policy's: of two images and '?' it makes {written}"
            )

    def _rendered(self, text: str, images: int) -> str:
        """What the chat template writes, with `<IMG_CONTEXT>` for each image."""
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def chunks(self, text: str, images: int) -> list[list[int]]:
        """Token ids before, between and after the features of images."""
        written = self._rendered(self.without_control(text), images)
        first, *others = written.replace(PLACEHOLDER, OPEN + PLACEHOLDER + CLOSE).split(PLACEHOLDER)
        begun = bool(self.tokenizer.bos_token) and first.startswith(str(self.tokenizer.bos_token))
        ids = self.tokenizer(first, add_special_tokens=not begun)["input_ids"]
        return [list(ids), *map(self._ids, others)]


def load_tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer with its chat template, or the official one."""
    return tokenizer.load_with_template(folder, TEMPLATE)


# ----------------------------------------------------------------------------------- the checkpoint
FIXED: names.JSON = {  # the only values of these keys that the model supports
    "downsample_ratio": 0.5,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
}
VISION: names.JSON = {
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
    "use_mean_pooling": True,  # there is no norm after the last block
}
IMAGES: names.JSON = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
IMAGES |= {"resample": int(Image.Resampling.BICUBIC), "rescale_factor": 1 / 255}
IMAGES |= {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
TOWER = ("attention_bias", "use_qk_norm")
# What files leave out: defaults of transformers' InternVLVisionConfig.
INTERNVIT: names.JSON = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
INTERNVIT |= {"num_attention_heads": 16, "image_size": 448, "patch_size": 14, "layer_norm_eps": 1e-6}
INTERNVIT |= {"attention_bias": False, "use_qk_norm": False, "norm_type": "layer_norm"}
QK_NORM_EPS = 1e-6  # whatever the tower's other norms have


def _side(value: Any) -> Any:
    """A side of a square that may be given as [side, side]; anything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 2 and value[0] == value[1] else value


def read_config(folder: pathlib.Path) -> InternVLHFConfig:
    """The config in config.json and, for the tiles, the image processor's file.

    Raises:
      ValueError: it describes another architecture.
    """
    c, where = hf.read_json(folder / "config.json"), f"{folder}/config.json:"
    text, v = c["text_config"], INTERNVIT | c["vision_config"]
    v |= {key: _side(v[key]) for key in ("image_size", "patch_size")}
    names.only(c, FIXED, where)
    names.only(v, VISION, f"{where} vision_config")
    if "tie_word_embeddings" in c:  # what text_config says is then not read
        text = text | {"tie_word_embeddings": c["tie_word_embeddings"]}
    decoder = names.language_config(text, f"{where} text_config", ("default", "dynamic"))
    vision = tower_config(v, f"{where} vision_config", *TOWER, c.get("vision_feature_layer", -1))
    if vision.qk_norm:
        names.only(v, {"layer_norm_eps": QK_NORM_EPS}, f"{where} vision_config")
    size = {"height": vision.image_size, "width": vision.image_size}
    images = {"min_patches": 1, "max_patches": 12} | hf.read_images(folder, IMAGES | {"size": size})
    tiles = {key: images[key] for key in ("min_patches", "max_patches")}
    names.check_numbers(tiles, f"{folder}: the image processor's")
    if tiles["min_patches"] > tiles["max_patches"]:
        raise ValueError(f"{folder}: min_patches, {tiles['min_patches']}, is above max_patches")
    out = InternVLHFConfig(
        decoder,
        vision,
        num_crops=tiles["max_patches"],
        min_crops=tiles["min_patches"],
        image_token_id=c.get("image_token_id", 151667),
    )
    names.only(c, {"image_seq_length": out.features}, where)
    return out


def config_files(config: InternVLHFConfig, dtype: str) -> dict[str, names.JSON]:
    """config.json and the processor's files for a policy of these dimensions, as `read_config` and
    transformers read them."""
    side = config.vision.image_size
    return {
        "config.json": {
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": "internvl",
            "torch_dtype": dtype,
            "image_token_id": config.image_token_id,
            "image_seq_length": config.features,
            "vision_feature_layer": config.vision.select_layer,
            "tie_word_embeddings": config.decoder.tie_word_embeddings,
            **FIXED,
            "text_config": names.language_values(config.decoder),
            "vision_config": {
                "model_type": "internvl_vision",
                **tower_values(config.vision, *TOWER),
                **VISION,
            },
        },
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "do_convert_rgb": True,
            "crop_to_patches": True,
            "min_patches": config.min_crops,
            "max_patches": config.num_crops,
            "size": {"height": side, "width": side},
            **IMAGES,
        },
        "processor_config.json": {
            "processor_class": "InternVLProcessor",
            "image_seq_length": config.features,
        },
    }


def table(config: InternVLHFConfig) -> list[names.Tensor]:
    """The checkpoint's tensors."""
    v, w = config.vision, config.vision.hidden_size
    theirs = {"layers": "layer", "attention": "attention", "out": "projection_layer", "scale": "lambda_"}
    theirs |= {"norm1": "layernorm_before", "norm2": "layernorm_after", "class": "cls_token"}
    theirs |= {"patch": "patch_embeddings.projection", "position": "position_embeddings"}
    out = names.llama(config.decoder, "language_model.model.", "language_model.lm_head")
    out += tower_table(v, "vision_tower.", theirs)
    for name in "qkv":
        at = f"vision_tower.encoder.layer.{{}}.attention.{name}_proj"
        out += names.linear(at, w, w, f"tower.blocks.{name}", bias=v.qkv_bias)
    at = "multi_modal_projector."
    return out + projector_table(config, f"{at}layer_norm", f"{at}linear_1", f"{at}linear_2")


FAMILY = hf.Family(
    read_config, config_files, table, InternVL, InternVLHFProcessor, load_tokenizer, processor.square
)
