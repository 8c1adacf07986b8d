"""Names in checkpoints: config.json's keys for our fields, and which tensor holds which of our parameters.

Each checkpoint tensor is one line of its family's table: its name ("{}" stands for the layer), its shape, and
the parameters in it as views:

    Tensor("model.layers.{}.self_attn.qkv_proj.weight", (9216, 3072), (
        Part("decoder.blocks.q", view=(96, 96, 3072), take=np.s_[:32], order=(2, 0, 1)), ...))

`view` is a reshape, `take` a slice of it and `order` a transposition; a final reshape gives our parameter's
shape. Each of these can be inverted, so one table serves both reading and writing.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from mstar_jax import sharding
from mstar_jax.models.layers import DecoderConfig
from mstar_jax.models.vision import VitConfig

SIZES = {  # sizes of a transformer; our field: the key in config.json
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
VISION = SIZES | {name: name for name in ("image_size", "patch_size", "layer_norm_eps")}
DECODER = SIZES | {name: name for name in ("vocab_size", "rms_norm_eps", "rope_theta", "tie_word_embeddings")}
DECODER |= {"num_kv_heads": "num_key_value_heads", "max_position": "max_position_embeddings"}
DECODER |= {"original_max_position": "original_max_position_embeddings"}


JSON = dict[str, Any]  # values of a JSON object

# What files leave out: the defaults of transformers' config classes, by `model_type` of the decoder.
_LARGE: JSON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6}
_QWEN: JSON = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_QWEN |= {"num_key_value_heads": 32, "use_sliding_window": False}
DEFAULTS: dict[str, JSON] = {
    "llama": {**_LARGE, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "qwen2": {**_LARGE, **_QWEN},
    "qwen3": {**_LARGE, **_QWEN, "head_dim": 128},
}
ROPE_THETA = 10000.0  # their default of `rope_theta`


ROPES = {  # our types of RoPE: what config.json may say about each besides its type
    "default": (),
    "dynamic": ("factor",),  # does nothing within max_position_embeddings, and nothing longer is read
    "longrope": ("short_factor", "long_factor", "factor"),
}
ROPES["su"] = ROPES["longrope"]  # its older name
CONSTANTS = ("rms_norm_eps", "rope_theta", "layer_norm_eps")  # the other keys above are sizes and a flag
SETTINGS = re.compile(  # keys that change results
    r"attn|attention|rope|rotary|alibi|window|softcap|qk_|layer_types|activation|_act$"
    r"|multiplier|scaling|scale_emb|scale_depth|logit_scale|dim_model_base|clip_qkv|parallel_residual|experts"
)
KNOWN = {  # keys of this kind that are read, or that change no result
    *("num_attention_heads", "attention_dropout", "output_attentions", "use_flash_attn", "hidden_act"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("_attn_implementation_autoset", "_flash_attn_2_enabled", "rope_theta", "rope_scaling"),
    *("rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("partial_rotary_factor", "qkv_bias"),
}


def only(values: JSON, wanted: JSON, where: str) -> None:
    """Checks keys of which only one value is supported; a key that is missing or null has that value.

    Raises:
      ValueError: names `where` (the file and the part of it), the key and both values.
    """
    for key, value in wanted.items():
        if (found := values.get(key)) is not None and found != value:
            raise ValueError(f"{where} {key} is {found!r}, only {value!r} is supported")


def chosen(values: JSON, key: str, choices: Sequence[str], where: str) -> str:
    """The value of a key, which is one of the choices; else raises ValueError, as `only` does."""
    if (found := values.get(key)) not in choices:
        raise ValueError(f"{where} {key} is {found!r}, only {', '.join(map(repr, choices))} is supported")
    return str(found)


def check_numbers(values: JSON, where: str, flags: Sequence[str] = ("tie_word_embeddings",)) -> None:
    """Checks that sizes are positive whole numbers, constants positive numbers, and flags true or false.

    Raises:
      ValueError: names `where`, and every key that is none, with its value.
    """
    faults = []
    for key, value in values.items():
        if key in flags:
            fits, wanted = type(value) is bool, "true or false"
        elif key in CONSTANTS:
            fits, wanted = type(value) in (int, float) and 0 < value < math.inf, "a positive number"
        else:
            fits, wanted = type(value) is int and value > 0, "a positive whole number"
        if not fits:
            faults.append(f"{key} is {value!r}, not {wanted}")
    if faults:
        raise ValueError(f"{where} {'; '.join(faults)}")


def check_divides(values: JSON, whole: str, part: str, where: str) -> None:
    """Checks that one size is a multiple of another.

    Raises:
      ValueError: names `where`, both keys and their values.
    """
    if values[whole] % values[part]:
        raise ValueError(f"{where} {whole} is {values[whole]}, no multiple of {part}, {values[part]}")


def known_attention(values: JSON, where: str) -> None:
    """Refuses settings of attention, positions, activations and scales that the models do not have."""
    for key, value in values.items():
        if SETTINGS.search(key) and key not in KNOWN and value:
            raise ValueError(f"{where} {key} is {value!r}, a setting that this model does not have")


def rope(values: JSON, where: str, types: Sequence[str]) -> JSON:
    """What a decoder's config.json says about RoPE, as its older keys: transformers 5 writes
    `rope_parameters` instead of `rope_scaling`, with `rope_theta` inside.

    Raises:
      ValueError: its type is none of `types`, or it has a key that this type does not read.
    """
    given = [name for name in ("rope_parameters", "rope_scaling") if values.get(name)]
    key = given[0] if given else "rope_scaling"
    for name in given:
        if not isinstance(values[name], dict):
            raise ValueError(f"{where} {name} is {values[name]!r}, not an object")
    found = {k: v for k, v in (values.get(key) or {}).items() if v is not None}
    kind = _rope_kind(found)
    found = {name: value for name, value in found.items() if name not in ("rope_type", "type")}
    if kind not in types:
        raise ValueError(f"{where} {key}: type {kind!r} is not supported, only {', '.join(types)}")
    shared = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    if unknown := [name for name in found if name not in (*shared, *ROPES[kind])]:
        raise ValueError(f"{where} {key}: {', '.join(unknown)} is not read for type {kind!r}")
    merged = {k: v for k, v in values.items() if v is not None} | found
    only(merged, {"partial_rotary_factor": 1}, where)
    if len(given) == 2 and _rope_kind(values[given[0]]) != _rope_kind(values[given[1]]):
        raise ValueError(f"{where} {' and '.join(given)} give RoPE different types")
    if found.get("rope_theta") is not None:
        only({"rope_theta": values.get("rope_theta")}, {"rope_theta": found["rope_theta"]}, where)
    if ROPES[kind] is ROPES["longrope"]:
        contexts = ("max_position_embeddings", "original_max_position_embeddings")
        check_numbers({name: merged[name] for name in contexts}, where)
        factor = merged[contexts[0]] / merged[contexts[1]]
        only(found, {"factor": factor}, f"{where} {key}")
        merged |= {name: tuple(found[name]) for name in ("short_factor", "long_factor")}
    return merged


def _rope_kind(values: JSON) -> str:
    return values.get("rope_type") or values.get("type") or "default"


def decoder_config(
    values: JSON,
    where: str,
    ropes: Sequence[str] = ("default",),
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    **missing: float,
) -> DecoderConfig:
    """A decoder's dimensions from config.json's values.

    Args:
      values: the values.
      where: the file, and the part of it, for messages.
      ropes: the types of RoPE that the family has.
      qkv_bias, qk_norm: what the architecture has without a key that says so, see `DecoderConfig`.
      missing: values of keys that the family's files may leave out.

    Raises:
      ValueError: a setting that the decoder does not have, see `only`, `known_attention` and `rope`.
    """
    known_attention(values, where)
    values = rope(values, where, ropes)
    longest = values["max_position_embeddings"]
    only(values, {"hidden_act": "silu"}, where)
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if window is not None and window < longest:
        raise ValueError(f"{where} sliding_window is {window}, less than the context of {longest}")
    if other := set(values.get("layer_types", ())) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{where} layer_types has {', '.join(sorted(other))}, which is not supported")
    defaults = {
        "tie_word_embeddings": False,
        "original_max_position_embeddings": longest,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": values["num_attention_heads"],
        **missing,
    }
    read: JSON = {key: (defaults | values)[key] for key in DECODER.values()}
    check_numbers(read, where)
    if "head_dim" not in values:
        check_divides(read, "hidden_size", "num_attention_heads", where)
    check_divides(read, "num_attention_heads", "num_key_value_heads", where)
    fields: JSON = {field: read[key] for field, key in DECODER.items()}
    fields["head_dim"] = values.get("head_dim", fields["hidden_size"] // fields["num_heads"])
    check_numbers({"head_dim": fields["head_dim"]}, where)
    check_divides(fields | {"2": 2}, "head_dim", "2", where)
    for name in ("short_factor", "long_factor"):
        fields[name] = values.get(name)
        if fields[name] is not None and 2 * len(fields[name]) != fields["head_dim"]:
            raise ValueError(
                f"{where} {name} has {len(fields[name])} entries, not half of {fields['head_dim']}"
            )
        for factor in fields[name] or ():
            if type(factor) not in (int, float) or not 0 < factor < math.inf:
                raise ValueError(f"{where} {name} holds {factor!r}; its entries are positive numbers")
    return DecoderConfig(**fields, qkv_bias=qkv_bias, qk_norm=qk_norm)


def language_config(values: JSON, where: str, ropes: Sequence[str] = ("default",)) -> DecoderConfig:
    """The dimensions of a decoder whose architecture, a key of `DEFAULTS`, is named by `model_type`.

    Raises:
      ValueError: it is another architecture, or see `decoder_config`.
    """
    kind = chosen(values, "model_type", tuple(DEFAULTS), where)
    only(values, {"mlp_bias": False}, where)
    return decoder_config(
        DEFAULTS[kind] | values,
        where,
        ropes,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        rope_theta=ROPE_THETA,
    )


def language_type(config: DecoderConfig) -> str:
    """The `model_type` of a decoder that `language_config` reads."""
    return "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"


def language_values(config: DecoderConfig) -> JSON:
    """config.json's values for a decoder, as `language_config` reads them."""
    kind = language_type(config)
    return {"model_type": kind, **decoder_values(config), "head_dim": config.head_dim}


def decoder_values(config: DecoderConfig) -> JSON:
    """config.json's values for a decoder."""
    return {key: getattr(config, field) for field, key in DECODER.items()} | {"hidden_act": "silu"}


def vision_config(values: JSON, where: str, hidden_act: str, **ours: object) -> VitConfig:
    """A vision transformer's dimensions from config.json's values; `ours` are fields that have no key there,
    or replace its value.

    Raises:
      ValueError: another activation, or a setting that it does not have; the message begins with `where`.
    """
    known_attention(values, where)
    only(values, {"hidden_act": hidden_act, "num_channels": 3}, where)
    read = {key: values[key] for key in VISION.values() if key in values}
    check_numbers(read, where)
    check_divides(read, "hidden_size", "num_attention_heads", where)
    if read["patch_size"] > read["image_size"]:
        raise ValueError(f"{where} patch_size is {read['patch_size']}, more than image_size")
    made = VitConfig(**({field: read[key] for field, key in VISION.items() if key in read} | ours))
    first = -made.num_layers - 1  # what goes into the blocks
    if type(made.select_layer) is not int or not first <= made.select_layer < 0:
        raise ValueError(f"{where}: select_layer is {made.select_layer!r}, not one of -1 to {first}")
    return made


def vision_values(config: VitConfig) -> JSON:
    """config.json's values for a vision transformer."""
    return {key: getattr(config, field) for field, key in VISION.items()}


Index = slice | int | tuple[slice | int, ...]


class Part(NamedTuple):
    """One of our parameters inside a checkpoint tensor, see the module's docstring."""

    ours: str
    view: tuple[int, ...] | None = None
    take: Index = np.s_[:]
    order: tuple[int, ...] | None = None

    def extract(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Reads our parameter of this shape from the tensor; a view where numpy allows it."""
        part = tensor.reshape(self.view or tensor.shape)[self.take]
        return part.transpose(self.order or range(part.ndim)).reshape(shape)

    def insert(self, value: np.ndarray, tensor: np.ndarray) -> None:
        """Writes our parameter into the (contiguous) tensor."""
        place = tensor.reshape(self.view or tensor.shape)[self.take]
        place = place.transpose(self.order or range(place.ndim))
        place[...] = value.reshape(place.shape)


class Tensor(NamedTuple):
    """A checkpoint tensor; with "{}" in its name, one per layer."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def plain(name: str, shape: tuple[int, ...], ours: str) -> Tensor:
    """A tensor that equals our parameter up to its shape."""
    return Tensor(name, shape, (Part(ours),))


def linear(name: str, inputs: int, outputs: int, ours: str, bias: bool = False) -> list[Tensor]:
    """A PyTorch linear layer: its weight [out, in], which is [in, out] here (with or without a head axis),
    and its bias."""
    weight = Tensor(f"{name}.weight", (outputs, inputs), (Part(ours, order=(1, 0)),))
    return [weight, plain(f"{name}.bias", (outputs,), f"{ours}_bias")] if bias else [weight]


def norm(name: str, size: int, ours: str, bias: bool = False) -> list[Tensor]:
    """A norm: its weight, and its bias if it has one."""
    weight = plain(f"{name}.weight", (size,), ours)
    return [weight, plain(f"{name}.bias", (size,), f"{ours}_bias")] if bias else [weight]


def llama(c: DecoderConfig, prefix: str, head: str = "lm_head") -> list[Tensor]:
    """Llama's names, which other decoders share (Qwen2 and 3 too); `prefix` precedes `embed_tokens`."""
    d, f, h, g, n = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim
    at, ours = prefix + "layers.{}.", "decoder.blocks."
    table = [plain(f"{prefix}embed_tokens.weight", (c.vocab_size, d), "decoder.embedding")]
    for name, heads in (("q", h), ("k", g), ("v", g)):
        table += linear(f"{at}self_attn.{name}_proj", d, heads * n, ours + name, bias=c.qkv_bias)
    for name in "qk" if c.qk_norm else "":
        table += norm(f"{at}self_attn.{name}_norm", n, f"{ours}{name}_norm")
    table += linear(f"{at}self_attn.o_proj", h * n, d, ours + "o")
    table += linear(f"{at}mlp.gate_proj", d, f, ours + "gate")
    table += linear(f"{at}mlp.up_proj", d, f, ours + "up")
    table += linear(f"{at}mlp.down_proj", f, d, ours + "down")
    table += norm(f"{at}input_layernorm", d, ours + "input_norm")
    table += norm(f"{at}post_attention_layernorm", d, ours + "post_norm")
    table += norm(f"{prefix}norm", d, "decoder.norm")
    return table if c.tie_word_embeddings else table + linear(head, d, c.vocab_size, "decoder.head")


def patch_embedding(c: VitConfig, name: str, ours: str) -> list[Tensor]:
    """The convolution [out, 3, p, p] that embeds patches."""
    d, inputs = c.hidden_size, 3 * c.patch_size**2
    weight = Part(f"{ours}.patch", view=(d, inputs), order=(1, 0))
    table = [Tensor(f"{name}.weight", (d, 3, c.patch_size, c.patch_size), (weight,))]
    return table + ([plain(f"{name}.bias", (d,), f"{ours}.patch_bias")] if c.patch_bias else [])


def vit_blocks(c: VitConfig, at: str, ours: str) -> list[Tensor]:
    """The blocks of CLIP and SigLIP; `at` precedes `self_attn`."""
    d, f = c.hidden_size, c.intermediate_size
    table: list[Tensor] = []
    for name, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        table += linear(f"{at}self_attn.{theirs}", d, d, ours + name, bias=True)
    table += linear(f"{at}mlp.fc1", d, f, ours + "up", bias=True)
    table += linear(f"{at}mlp.fc2", f, d, ours + "down", bias=True)
    table += norm(f"{at}layer_norm1", d, ours + "norm1", bias=True)
    return table + norm(f"{at}layer_norm2", d, ours + "norm2", bias=True)


def tensors(table: Sequence[Tensor], model: nnx.Module) -> dict[str, Tensor]:
    """{checkpoint name: its entry of the table}, with a name for every layer.

    Args:
      table: the family's table.
      model: the model or its shapes; the first dimension of a block's parameters is the number of layers.
    """
    shapes = {name: leaf.shape for name, leaf in sharding.named(model).items()}
    out = {}
    for entry in table:
        if "{}" not in entry.name:
            out[entry.name] = entry
            continue
        for layer in range(shapes[entry.parts[0].ours][0]):
            out[entry.name.format(layer)] = entry
    return out


def layer_of(entry: Tensor, name: str) -> int | None:
    """The layer of the tensor called `name`; None if the entry is not per layer."""
    if "{}" not in entry.name:
        return None
    before, after = entry.name.split("{}")
    return int(name[len(before) : len(name) - len(after)])
