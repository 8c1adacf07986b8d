"""MiniCPM-Llama3-V-2.5's checkpoints: names, configs, in and out."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_minicpm as tiny
from safetensors.numpy import load_file

from mstar_jax import models, sharding
from mstar_jax.models import minicpmv25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny policy in the official format, in float16 as the released weights are."""
    path, words = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("words")
    tiny.processor(words)
    models.FromScratch(minicpmv25.FAMILY, tiny.config(), words).save(tiny.model(), path, "float16")
    return path


def test_import_then_export_is_bit_for_bit(folder, tmp_path):
    source = models.Pretrained(folder)
    source.save(source.load(jnp.float32), tmp_path / "out")
    there, here = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert there.keys() == here.keys() and len(there) == 2 * 9 + 3 + 2 * 16 + 5 + 13
    for name in there:
        assert there[name].dtype == here[name].dtype == np.float16
        assert there[name].tobytes() == here[name].tobytes(), name
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_is_written_is_what_was_there(folder):
    model, loaded = models.load(folder, jnp.float32)
    want = sharding.named(tiny.model())
    for name, value in sharding.named(model).items():
        np.testing.assert_array_equal(value, np.asarray(want[name]).astype(np.float16).astype(np.float32))
    assert model.config == tiny.config() and loaded.config == model.config
    assert loaded.decode(loaded.encode_response("Step 1: 12.")) == "Step 1: 12."


@pytest.mark.parametrize("changes", [{}, {"corrected_mask": True, "num_crops": 4, "scale_resolution": 32}])
def test_config_is_read_back(tmp_path, changes):
    want = tiny.config(**changes)
    files = minicpmv25.config_files(want, "float16")
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    assert minicpmv25.read_config(tmp_path) == want
    assert ("corrected_mask" in files["config.json"]) == want.corrected_mask
    assert models.Pretrained(tmp_path, max_crops=2).config.num_crops == 2
    values = files["config.json"]
    for name in ("slice_config", "query_num", "corrected_mask"):
        values.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    official = dataclasses.replace(
        want, query_num=96, num_crops=9, scale_resolution=448, corrected_mask=False
    )
    assert minicpmv25.read_config(tmp_path) == official
    with pytest.raises(ValueError, match="hidden_size = 200: the resampler needs a multiple of 128"):
        tiny.config(decoder=dataclasses.replace(tiny.DECODER, hidden_size=200))
