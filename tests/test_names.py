"""What config.json says of positions, activations and attention: read, or refused by name."""

import json

import pytest
import test_internvl2
import test_internvl3
import test_qwen3vl
import test_qwen25vl
import test_smolvlm
import tiny
import tiny_minicpm

from mstar_jax import models
from mstar_jax.models import hf, internvl_chat, internvl_hf, minicpmv25, phi35, qwen3vl, qwen25vl, smolvlm

FAMILIES = {
    "phi": (phi35, tiny.config()),
    "internvl": (internvl_chat, test_internvl2.CONFIG),
    "minicpm": (minicpmv25, tiny_minicpm.config()),
    "smolvlm": (smolvlm, test_smolvlm.CONFIG),
    "internvl3": (internvl_chat, test_internvl3.CHAT["qwen3"]),
    "internvl3-hf": (internvl_hf, test_internvl3.HF["qwen2"]),
    "qwen25vl": (qwen25vl, test_qwen25vl.CONFIG),
    "qwen3vl": (qwen3vl, test_qwen3vl.CONFIG),
}


def read(name, folder, change=lambda values: None):
    """The family's config, read back after a change of config.json."""
    family, config = FAMILIES[name]
    for file, values in family.config_files(config, "float32").items():
        if file == "config.json":
            change(values)
        (folder / file).write_text(json.dumps(values))
    return models.Pretrained(folder).config


def decoder_of(values):
    """The part of config.json that describes the decoder."""
    return next((values[part] for part in ("llm_config", "text_config") if part in values), values)


def saved_by_transformers_5(values):
    """`rope_parameters` with all of it instead of `rope_scaling` and `rope_theta`."""
    part = decoder_of(values)
    scaling = {k: v for k, v in (part.pop("rope_scaling", None) or {}).items() if k != "type"}
    kind = {"phi3_v": "longrope", "internvl_chat": "dynamic"}.get(values["model_type"], "default")
    part["rope_parameters"] = scaling | {
        "rope_type": kind,
        "rope_theta": part.pop("rope_theta"),
        "partial_rotary_factor": 1.0,
    }
    if kind == "longrope":
        part["rope_parameters"]["original_max_position_embeddings"] = part.pop(
            "original_max_position_embeddings"
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_saved_by_transformers_5_is_the_same(name, tmp_path):
    assert read(name, tmp_path, saved_by_transformers_5) == FAMILIES[name][1] == read(name, tmp_path)


def test_longrope_of_transformers_5_has_its_factors(tmp_path):
    decoder = read("phi", tmp_path, saved_by_transformers_5).decoder
    assert decoder.long_factor == (1.2, 2.0, 5.0, 9.0) and decoder.original_max_position == 64


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling: type 'linear' is not supported"),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0}, "rope_parameters: type 'llama3' is not"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_parameters: type 'yarn' is not supported"),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}, "full_attention is not read"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, only 1 is"),
        ("partial_rotary_factor", 0.4, "partial_rotary_factor is 0.4, only 1 is"),
        ("hidden_act", "gelu", "hidden_act is 'gelu', only 'silu' is supported"),
        ("sliding_window", 16, "sliding_window is 16, less than the context of"),
        ("layer_types", ["full_attention", "linear_attention"], "layer_types has linear_attention"),
        ("attention_bias", True, "attention_bias is True, a setting that this model does not have"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping is 50.0, a setting"),
        ("attention_multiplier", 0.1, "attention_multiplier is 0.1, a setting"),
        ("use_qk_norm", True, "use_qk_norm is True, a setting"),
        ("logit_scale", 0.5, "logit_scale is 0.5, a setting"),
        ("embedding_multiplier", 12.0, "embedding_multiplier is 12.0, a setting"),
        ("scale_depth", 1.4, "scale_depth is 1.4, a setting"),
        ("num_local_experts", 8, "num_local_experts is 8, a setting"),
        ("rope_theta", float("nan"), "rope_theta is nan, not a positive number"),
        ("rope_theta", 0, "rope_theta is 0, not a positive number"),
        ("rope_theta", "10000.0", "rope_theta is '10000.0', not a positive number"),
        ("rope_scaling", "linear", "rope_scaling is 'linear', not an object"),
        ("rms_norm_eps", -1e-5, "rms_norm_eps is -1e-05, not a positive number"),
        ("rms_norm_eps", float("inf"), "rms_norm_eps is inf, not a positive number"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0, not a positive whole number"),
        ("num_hidden_layers", 2.0, "num_hidden_layers is 2.0, not a positive whole number"),
        ("num_hidden_layers", True, "num_hidden_layers is True, not a positive whole number"),
        ("num_attention_heads", 0, "num_attention_heads is 0, not a positive whole number"),
        ("num_key_value_heads", 7, "num_attention_heads is ., no multiple of num_key_value_heads, 7"),
        ("vocab_size", -1, "vocab_size is -1, not a positive whole number"),
        ("tie_word_embeddings", "false", "tie_word_embeddings is 'false', not true or false"),
        ("max_position_embeddings", 0, "max_position_embeddings is 0, not a positive whole number"),
    ],
)
def test_other_decoders_are_refused_by_name(name, key, value, message, tmp_path):
    def change(values):
        decoder_of(values)[key] = value
        if key == "sliding_window":  # which Qwen's decoders leave alone by default
            decoder_of(values)["use_sliding_window"] = True
        values |= {key: value} if key in values else {}

    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read(name, tmp_path, change)


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if not name.startswith("qwen")]
)  # its keys differ
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("hidden_act", "relu"), ("attention_window", 7), ("use_rel_attention", True), ("num_channels", 1)),
        *(
            ("layer_norm_eps", 0),
            ("patch_size", 0),
            ("patch_size", 999),
            ("num_hidden_layers", "2"),
            ("num_attention_heads", -1),
        ),
    ],
)
def test_other_vision_towers_are_refused_by_name(name, key, value, tmp_path):
    def change(values):
        values["vision_config"][key] = value

    with pytest.raises(ValueError, match=f"config.json: vision_config {key} is {value!r}"):
        read(name, tmp_path, change)


@pytest.mark.parametrize(
    ("name", "part", "key", "value"),
    [
        ("phi", "embd_layer", "hd_transform_order", "glb_sub"),
        ("phi", "embd_layer", "projection_cls", "linear"),
        ("phi", "img_processor", "name", "siglip"),
        ("minicpm", "", "version", "2.6"),
        ("minicpm", "", "use_image_id", True),
        ("internvl", "", "template", "Hermes-2"),
        ("internvl", "", "pad2square", True),
        ("internvl", "", "dynamic_image_size", False),
    ],
)
def test_relatives_are_refused_by_name(name, part, key, value, tmp_path):
    def change(values):
        (values[part] if part else values)[key] = value

    with pytest.raises(ValueError, match=f"{key} is {value!r}, only .* is supported"):
        read(name, tmp_path, change)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("internvl", "select_layer", 0, "select_layer is 0, not one of -1 to"),
        ("internvl", "select_layer", -99, "select_layer is -99, not one of -1 to"),
        ("internvl", "max_dynamic_patch", 0, "max_dynamic_patch is 0, not a positive whole number"),
        ("internvl", "min_dynamic_patch", 99, "min_dynamic_patch, 99, is above max_dynamic_patch"),
        ("internvl", "use_thumbnail", "no", "use_thumbnail is 'no', not true or false"),
        ("minicpm", "query_num", 0, "query_num is 0, not a positive whole number"),
        ("minicpm", "slice_config", {"max_slice_nums": "9"}, "max_slice_nums is '9', not a positive whole"),
        ("minicpm", "corrected_mask", 1, "corrected_mask is 1, not true or false"),
    ],
)
def test_sizes_of_images_are_checked(name, key, value, message, tmp_path):
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read(name, tmp_path, lambda values: values.update({key: value}))


@pytest.mark.parametrize("name", ["phi", "internvl", "minicpm"])  # these have no head_dim of their own
def test_heads_divide_the_hidden_size(name, tmp_path):
    with pytest.raises(ValueError, match="hidden_size is .*, no multiple of num_attention_heads, 7"):
        read(name, tmp_path, lambda values: decoder_of(values).update(num_attention_heads=7))


@pytest.mark.parametrize("crops", [0, -1, "16", None, 4.0])
def test_crops_of_phi_are_checked(crops, tmp_path):
    read("phi", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"num_crops": crops}))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: num_crops is {crops!r}, not a positive"):
        models.Pretrained(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_rope_that_is_given_twice_has_to_agree(name, tmp_path):
    def change(values):
        part = decoder_of(values)
        theta = part["rope_theta"]
        sections = {k: v for k, v in (part.get("rope_scaling") or {}).items() if k.startswith("mrope")}
        same = {"rope_type": "default", "rope_theta": theta} | sections
        part |= {"rope_scaling": None, "rope_parameters": same}

    def other(values):
        change(values)
        decoder_of(values)["rope_theta"] = 77.0

    def types(values):
        change(values)
        decoder_of(values)["rope_scaling"] = {"type": "linear", "factor": 2.0}

    assert read(name, tmp_path, change).decoder.short_factor is None
    with pytest.raises(ValueError, match="rope_theta is 77.0, only"):
        read(name, tmp_path, other)
    with pytest.raises(ValueError, match="rope_parameters and rope_scaling give RoPE different types"):
        read(name, tmp_path, types)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 8.0}, "factor is 8.0, only 4.0 is supported"),
        ({"short_mscale": 1.2}, "short_mscale is not read for type 'su'"),
        ({"long_factor": [1.0, 2.0]}, "long_factor has 2 entries, not half of 8"),
        ({"short_factor": [1.0, float("nan"), 1.0, 1.0]}, "short_factor holds nan; its entries are positive"),
        ({"short_factor": [1.0, "a", 1.0, 1.0]}, "short_factor holds 'a'; its entries are positive"),
        ({"long_factor": [1.0, -1.0, 1.0, 1.0]}, "long_factor holds -1.0; its entries are positive"),
        ({"long_factor": None}, "'long_factor' is missing"),
    ],
)
def test_longrope_that_is_not_ours(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read("phi", tmp_path, lambda values: values["rope_scaling"].update(change))


def test_what_changes_nothing_is_read(tmp_path):
    """A window beyond the context, dropout, an attention kernel."""

    def change(values):
        values.update(sliding_window=262144, attention_dropout=0.1, _attn_implementation="flash_attention_2")

    assert read("phi", tmp_path, change) == tiny.config()


def test_folders_are_read_as_they_are(tmp_path):
    """A byte order mark before the JSON."""
    read("phi", tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert models.Pretrained(tmp_path).config == tiny.config()
    assert hf.read_json(path)["model_type"] == "phi3_v"
