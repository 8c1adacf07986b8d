"""InternVL in the format of its original code, `internvl_chat`: InternVL2, 2.5, 3 and 3.5.

Source: OpenGVLab/InternVL2-2B, InternVL2_5-8B, InternVL3-8B, InternVL3_5-8B. The prompt is that of the code's
conversation templates, which is not the tokenizer's chat template.
"""

import dataclasses
import pathlib

import numpy as np

from mstar_jax.models import hf, names, processor
from mstar_jax.models.internvl import (
    CLOSE,
    END,
    OPEN,
    START,
    InternVL,
    InternVLConfig,
    InternVLProcessor,
    load_tokenizer,
    projector_table,
    tower_config,
    tower_table,
    tower_values,
)

TEMPLATES = {  # by their official names: the default system message, and what follows a message's end
    "internlm2-chat": (
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
        "是一个有用无害的人工智能助手。",
        "",
    ),
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
        "\n",
    ),
}


@dataclasses.dataclass(frozen=True)
class InternVLChatConfig(InternVLConfig):
    """Dimensions of the policy, and its prompt.

    Attributes:
      template: a key of `TEMPLATES`.
      system: the system message; None for the template's. InternVL3.5 thinks if the message asks for it.
    """

    template: str = "internlm2-chat"
    system: str | None = None


class InternVLChatProcessor(InternVLProcessor):
    """The processor of this format, see `structs.Processor`."""

    marks = ("<image>",)
    config: InternVLChatConfig

    def chunks(self, text: str, images: int) -> list[list[int]]:
        """Token ids before, between and after the images. The tokenizer may put one `<s>` before all."""
        default, after = TEMPLATES[self.config.template]
        system = default if self.config.system is None else self.config.system
        marks = [CLOSE + "\n" + OPEN] * (images - 1) + [CLOSE] if images else []
        head = f"{START}system\n{system}{END}{after}{START}" + (f"user\n{OPEN}" if images else "")
        chunks = [list(self.tokenizer(head)["input_ids"]), *map(self._ids, marks)]
        chunks[-1] += self._ids(("\n" if images else "user\n") + self.without_control(text))
        chunks[-1] += self._ids(f"{END}{after}{START}assistant\n")
        return chunks


# ----------------------------------------------------------------------------------- the checkpoint
FIXED: names.JSON = {  # the only values of these keys in config.json that the model supports
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "dynamic_image_size": True,
    "pad2square": False,
}
INTERNLM2: names.JSON = {"hidden_act": "silu", "bias": False}
TOWER = ("qkv_bias", "qk_normalization")
INTERNVIT: names.JSON = {"qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"}  # the defaults
TILES = {  # our field: the key in config.json
    "num_crops": "max_dynamic_patch",
    "min_crops": "min_dynamic_patch",
    "use_thumbnail": "use_thumbnail",
}
ROPES = ("default", "dynamic")


def read_config(folder: pathlib.Path) -> InternVLChatConfig:
    """The config in config.json.

    Raises:
      ValueError: it describes another architecture, such as an InternVL with another decoder.
    """
    c = hf.read_json(folder / "config.json")
    v, llm = INTERNVIT | c["vision_config"], c["llm_config"]
    where = f"{folder}/config.json:"
    names.only(c, FIXED | {"force_image_size": v["image_size"]}, where)
    template = names.chosen(c, "template", tuple(TEMPLATES), where)
    system = c.get("system_message")
    if not isinstance(system, str | None):
        raise ValueError(f"{where} system_message is {system!r}, not a text")
    if names.chosen(llm, "model_type", ("internlm2", "qwen2", "qwen3"), f"{where} llm_config") == "internlm2":
        names.only(llm, INTERNLM2, f"{where} llm_config")
        decoder = names.decoder_config(llm, f"{where} llm_config", ROPES)
    else:
        decoder = names.language_config(llm, f"{where} llm_config", ROPES)
    vision = tower_config(v, f"{where} vision_config", *TOWER, c["select_layer"])
    names.check_numbers({key: c[key] for key in TILES.values()}, where, ("use_thumbnail",))
    if c["min_dynamic_patch"] > c["max_dynamic_patch"]:
        raise ValueError(f"{where} min_dynamic_patch, {c['min_dynamic_patch']}, is above max_dynamic_patch")
    tiles = {ours: c[key] for ours, key in TILES.items()}
    return InternVLChatConfig(decoder, vision, **tiles, template=template, system=system)


def config_files(config: InternVLChatConfig, dtype: str) -> dict[str, names.JSON]:
    """config.json for a policy of these dimensions, as `read_config` reads it."""
    kind = names.language_type(config.decoder)
    if kind == "llama":
        llm = {"model_type": "internlm2", **names.decoder_values(config.decoder), **INTERNLM2}
    else:
        llm = names.language_values(config.decoder)
    architecture = {"llama": "InternLM2", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    return {
        "config.json": {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "torch_dtype": dtype,
            "select_layer": config.vision.select_layer,
            "force_image_size": config.vision.image_size,
            "template": config.template,
            "system_message": config.system,
            **{key: getattr(config, ours) for ours, key in TILES.items()},
            **FIXED,
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "model_type": "intern_vit_6b",
                **tower_values(config.vision, *TOWER),
            },
            "llm_config": {
                "architectures": [f"{architecture}ForCausalLM"],
                "rope_scaling": {"factor": 2.0, "type": "dynamic"},
                **llm,
            },
        }
    }


def table(config: InternVLChatConfig) -> list[names.Tensor]:
    """The checkpoint's tensors. InternViT concatenates all of q, k and v."""
    v, w = config.vision, config.vision.hidden_size
    qkv, ours = "vision_model.encoder.layers.{}.attn.qkv", "tower.blocks."
    weight = [names.Part(f"{ours}{part}", (3, w, w), np.s_[i], (1, 0)) for i, part in enumerate("qkv")]
    bias = [names.Part(f"{ours}{part}_bias", (3, w), np.s_[i]) for i, part in enumerate("qkv")]
    theirs = {"layers": "layers", "attention": "attn", "out": "proj", "norm1": "norm1", "norm2": "norm2"}
    theirs |= {"scale": "ls", "patch": "patch_embedding", "class": "class_embedding"}
    theirs |= {"position": "position_embedding"}
    return [
        *_decoder_table(config),
        *tower_table(v, "vision_model.", theirs),
        names.Tensor(f"{qkv}.weight", (3 * w, w), tuple(weight)),
        *([names.Tensor(f"{qkv}.bias", (3 * w,), tuple(bias))] if v.qkv_bias else []),
        *projector_table(config, "mlp1.0", "mlp1.1", "mlp1.3"),
    ]


def _decoder_table(config: InternVLChatConfig) -> list[names.Tensor]:
    """InternLM2 fuses q, k and v per key/value head: its queries, its key, its value."""
    c = config.decoder
    if names.language_type(c) != "llama":
        return names.llama(c, "language_model.model.", "language_model.lm_head")
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
    tied = c.tie_word_embeddings
    return out if tied else out + names.linear("language_model.output", d, c.vocab_size, "decoder.head")


FAMILY = hf.Family(
    read_config, config_files, table, InternVL, InternVLChatProcessor, load_tokenizer, processor.square
)
