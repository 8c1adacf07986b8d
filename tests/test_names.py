"""What config.json says of positions, activations and attention: read, or refused by name."""

import json

import pytest
import test_internvl2
import test_smolvlm
import tiny
import tiny_minicpm

from mstar_jax import models
from mstar_jax.models import hf, internvl2, minicpmv25, phi35, smolvlm

FAMILIES = {
    "phi": (phi35, tiny.config()),
    "internvl": (internvl2, test_internvl2.CONFIG),
    "minicpm": (minicpmv25, tiny_minicpm.config()),
    "smolvlm": (smolvlm, test_smolvlm.CONFIG),
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
    ],
)
def test_other_decoders_are_refused_by_name(name, key, value, message, tmp_path):
    def change(values):
        decoder_of(values)[key] = value

    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read(name, tmp_path, change)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "relu"), ("attention_window", 7), ("use_rel_attention", True)]
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
    ],
)
def test_relatives_are_refused_by_name(name, part, key, value, tmp_path):
    def change(values):
        (values[part] if part else values)[key] = value

    with pytest.raises(ValueError, match=f"{key} is {value!r}, only .* is supported"):
        read(name, tmp_path, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 8.0}, "factor is 8.0, only 4.0 is supported"),
        ({"short_mscale": 1.2}, "short_mscale is not read for type 'su'"),
        ({"long_factor": [1.0, 2.0]}, "long_factor has 2 entries, not half of 8"),
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
