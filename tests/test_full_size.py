"""The full-size models, built abstractly, against the official checkpoints' tensors: no weight is made."""

import math
import os
import pathlib

import jax
import pytest
from flax import nnx

from mstar_jax import sharding
from mstar_jax.models import internvl_chat, minicpmv25, names, phi35, qwen3vl, qwen25vl, smolvlm
from mstar_jax.plan import official

PORTS = pathlib.Path(os.environ.get("MSTAR_GOLDENS", "/nonexistent/goldens")).parent


FULL = {  # family, config, tensors, parameters
    "phi35_vision": (phi35.FAMILY, official.PHI35, 592, 4_146_621_440),
    "internvl2": (internvl_chat.FAMILY, official.INTERNVL2, 517, 2_205_754_368),
    "minicpmv25": (minicpmv25.FAMILY, official.MINICPMV25, 741, 8_537_092_336),
    "smolvlm": (smolvlm.FAMILY, official.SMOLVLM2_256M, 471, 256_484_928),
    "qwen25vl": (qwen25vl.FAMILY, official.QWEN25VL_3B, 824, 3_754_622_976),
    "qwen3vl": (qwen3vl.FAMILY, official.QWEN3VL_4B, 713, 4_437_815_808),
}


@pytest.mark.parametrize("name", FULL)
def test_names_shapes_and_sizes(name):
    family, config, tensors, parameters = FULL[name]
    model = jax.eval_shape(lambda: family.model(config, nnx.Rngs(0)))
    table = names.tensors(family.table(config), model)
    assert len(table) == tensors
    assert sum(math.prod(entry.shape) for entry in table.values()) == parameters
    assert {part.ours for entry in table.values() for part in entry.parts} == set(sharding.named(model))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters, "every weight has its place"
    path = PORTS / f"{name}.tensors.tsv"
    if path.exists():
        rows = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
        official = {row[0]: tuple(map(int, row[1].split("x"))) for row in rows}
        assert {key: entry.shape for key, entry in table.items()} == official
