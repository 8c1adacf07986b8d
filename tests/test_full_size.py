"""The full-size models, built abstractly, against the official checkpoints' tensors: no weight is made."""

import math
import os
import pathlib

import jax
import pytest
from flax import nnx

from mstar_jax.models import layers, names, phi35

PORTS = pathlib.Path(os.environ.get("MSTAR_GOLDENS", "/nonexistent/goldens")).parent


def phi35_config():
    decoder = layers.DecoderConfig(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=96,
        short_factor=(1.0,) * 48,
        long_factor=(1.0,) * 48,
        max_position=131072,
        original_max_position=4096,
    )
    return phi35.Phi35Config(decoder, phi35.CLIP)


FULL = {"phi35_vision": (phi35.FAMILY, phi35_config, 592, 4_146_621_440)}


@pytest.mark.parametrize("name", FULL)
def test_names_shapes_and_sizes(name):
    family, make_config, tensors, parameters = FULL[name]
    config = make_config()
    model = jax.eval_shape(lambda: family.model(config, nnx.Rngs(0)))
    table = names.tensors(family.table(config), model)
    assert len(table) == tensors
    assert sum(math.prod(entry.shape) for entry in table.values()) == parameters
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters, "every weight has its place"
    path = PORTS / f"{name}.tensors.tsv"
    if path.exists():
        rows = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
        official = {row[0]: tuple(map(int, row[1].split("x"))) for row in rows}
        assert {key: entry.shape for key, entry in table.items()} == official
