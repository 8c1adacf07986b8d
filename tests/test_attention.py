"""Attention by kernel and by block against the scores written down; which of them a machine is given."""

import contextlib
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import close

from mstar_jax import sharding
from mstar_jax.models import attention, layers
from mstar_jax.plan import hlo, programs
from mstar_jax.profiling import flops

ROOT = pathlib.Path(__file__).resolve().parents[1]
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
TPU = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")


def layouts(rng, rows, length):
    """int32[rows, length] branches: a prefix, branches with padding among them, and a row of nothing else."""
    branch = np.full((rows, length), -1, np.int32)
    for row in branch[:-1]:
        at, number = int(rng.integers(1, length // 2)), 1
        row[:at] = 0
        while at < length:
            at += int(rng.integers(0, 3)) * 5  # padding
            size = int(rng.integers(1, length // 2))
            row[at : at + size], at, number = number, at + size, number + 1
    return jnp.asarray(branch)


def inputs(rows, length, heads, groups, width, dtype=jnp.float32, seed=0):
    """q, k, v, and weights of the outputs, those of padding as well."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(rows, length, number, width) for number in (heads, groups, groups, heads)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def attend(q, k, v, mask):
    """As the machine in force does it."""
    return attention.row_attention(mask, keep=False)(q, k, v)[0]


def written(q, k, v, mask):
    """With scores in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "fused", lambda *_: None)
        return attend(q, k, v, mask)


def gradients(attend, q, k, v, mask, weight):
    """Output and (dq, dk, dv), float32."""

    def loss(q, k, v):
        out = attend(q, k, v, mask).astype(jnp.float32)
        return (out * weight).sum(), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


@pytest.mark.parametrize(
    ("heads", "groups", "width", "dtype"),
    [(2, 2, 96, jnp.float32), (4, 2, 128, jnp.float32), (2, 1, 96, jnp.bfloat16)],
)
def test_splash_is_what_the_scores_say(monkeypatch, heads, groups, width, dtype):
    monkeypatch.setattr(attention, "BLOCKS", (128,))
    rows, length = 2, 384
    # row 0's branches are a block each: one whole block of the mask below the diagonal is empty too
    branch = layouts(np.random.default_rng(0), rows + 1, length)[:rows].at[0].set(jnp.arange(length) // 128)
    if dtype == jnp.float32:
        branch = branch.at[1, -9:].set(-1)
    mask = layers.row_layout(branch)[2]
    q, k, v, weight = inputs(rows, length, heads, groups, width, dtype)
    weight = weight.astype(jnp.float32)
    splash = functools.partial(attention.splash, interpret=True)
    found, expected = (gradients(attend, q, k, v, mask, weight) for attend in (splash, written))
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected):
        close(ours, theirs, length if dtype == jnp.float32 else 1, dtype=dtype, err_msg=name)


def test_random_layouts(monkeypatch):
    """And a row of padding alone, as batches have that a data set does not fill."""
    monkeypatch.setattr(attention, "BLOCKS", (128,))
    splash = jax.jit(functools.partial(attention.splash, interpret=True))
    q, k, v, _ = inputs(3, 256, 2, 1, 8)
    for seed in range(4):
        branch = layouts(np.random.default_rng(seed), 3, 256)
        assert (branch[-1] == -1).all() and branch.max() > 1
        mask = layers.row_layout(branch)[2]
        close(splash(q, k, v, mask), written(q, k, v, mask), 256)


@pytest.mark.parametrize(
    ("heads", "groups", "width", "dtype", "length"),
    [
        (2, 2, 24, jnp.float32, 129),
        (4, 2, 16, jnp.float32, 200),
        (2, 1, 16, jnp.float32, 384),
        (2, 1, 96, jnp.bfloat16, 200),
    ],
)
def test_blocks_are_what_the_scores_say(heads, groups, width, dtype, length):
    """Lengths that fill their blocks and lengths that do not, with heads that share keys and without."""
    mask = layers.row_layout(layouts(np.random.default_rng(length), 3, length))[2]
    q, k, v, weight = inputs(3, length, heads, groups, width, dtype)
    assert attention.kernel(attention.device_kind(), q) is attention.blockwise
    weight = weight.astype(jnp.float32)
    found, expected = (gradients(way, q, k, v, mask, weight) for way in (attend, written))
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected):
        close(ours, theirs, length if dtype == jnp.float32 else 1, dtype=dtype, err_msg=name)


def test_no_block_is_visited_in_vain():
    """Prefix of two blocks, four branches of one: below the diagonal they see the prefix alone."""
    branch = jnp.asarray([[0] * 32 + [1] * 16 + [2] * 16 + [3] * 16 + [-1] * 16])
    rows, columns, count = attention._blocks(layers.row_layout(branch)[2], 16)
    seen = {(int(i), int(j)) for i, j in zip(rows[:count], columns[:count])}
    assert seen == {(0, 0), (1, 0), (1, 1)} | {(i, j) for i in (2, 3, 4) for j in (0, 1, i)} | {
        (5, j) for j in (0, 1, 5)
    }


def poisoned(x, block, size):
    return x.at[:, block * size : (block + 1) * size].set(jnp.nan)


def test_what_stands_behind_is_not_read(monkeypatch):
    """Keys and values that are not numbers reach only the block that they are in."""
    monkeypatch.setattr(attention, "CPU_BLOCK", (64, 64))
    branch = jnp.asarray([[0] * 64 + [1] * 64 + [2] * 64])
    mask = layers.row_layout(branch)[2]
    q, k, v, _ = inputs(1, 192, 2, 1, 8)
    out = attend(q, poisoned(k, 2, 64), poisoned(v, 2, 64), mask)
    np.testing.assert_array_equal(np.isnan(out).any(axis=(0, 2, 3)), np.arange(192) // 64 == 2)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "cpu"])
def test_every_device_its_own_rows_and_heads(monkeypatch, kind):
    monkeypatch.setattr(attention, "splash", functools.partial(attention.splash, interpret=True))
    monkeypatch.setattr(attention, "device_kind", lambda: kind)
    mesh = sharding.make_mesh(**MESH)
    length = 128 if kind.startswith("TPU") else 192
    branch = layouts(np.random.default_rng(1), 4, length)
    mask = layers.row_layout(branch)[2]
    q, k, v, weight = inputs(4, length, 4, 2, 16)
    alone = gradients(attention.fused, q, k, v, mask, weight)
    with jax.set_mesh(mesh):
        layout = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
        rows = jax.device_put(mask, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        apart = [jax.device_put(x, layout) for x in (q, k, v)]
        spread = gradients(attention.fused, *apart, rows, weight)
        text = jax.jit(attention.fused).lower(*apart, rows).compile().as_text()
        assert "all-gather" not in text and "all-to-all" not in text
        # three rows on four devices, one group of heads on two: as ever
        assert attention.fused(q[:3], k[:3], v[:3], mask[:3]) is None
        assert attention.fused(q, k[:, :, :1], v[:, :, :1], mask) is None
    for ours, theirs in zip(spread, alone):
        close(ours, theirs, 256)


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "expected"),
    [
        ("TPU v5 lite", (1, 2560, 32, 96), jnp.bfloat16, attention.splash),
        ("TPU v6 lite", (1, 128, 4, 24), jnp.float32, attention.splash),
        ("TPU v5 lite", (1, 200, 4, 128), jnp.bfloat16, None),
        ("TPU v5 lite", (1, 256, 4, 128), jnp.float16, None),
        ("NVIDIA H100 80GB HBM3", (1, 2560, 32, 96), jnp.bfloat16, attention.cudnn),
        ("NVIDIA H100 80GB HBM3", (1, 200, 4, 128), jnp.float16, attention.cudnn),
        ("NVIDIA H100 80GB HBM3", (1, 2560, 32, 96), jnp.float32, attention.blockwise),
        ("NVIDIA H100 80GB HBM3", (1, 201, 4, 128), jnp.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", (1, 256, 4, 100), jnp.bfloat16, None),
        ("Tesla V100-SXM2-16GB", (1, 256, 4, 128), jnp.bfloat16, None),
        ("cpu", (1, 2560, 32, 96), jnp.bfloat16, attention.blockwise),
        ("cpu", (1, 128, 32, 96), jnp.bfloat16, None),
        (sharding.COUNTED, (1, 2560, 32, 96), jnp.bfloat16, None),
    ],
)
def test_which_machine_has_which(kind, shape, dtype, expected):
    assert attention.kernel(kind, jax.ShapeDtypeStruct(shape, dtype)) is expected


def traced(fn, *arguments, mesh=None):
    with jax.sharding.use_abstract_mesh(mesh or jax.sharding.get_abstract_mesh()):
        return str(jax.make_jaxpr(fn)(*arguments))


def test_the_mesh_in_force_decides():
    """Also for devices that are not there; and a program traced for one machine is not another's."""
    q, k, v, _ = inputs(4, 256, 4, 2, 16)
    mask = layers.row_layout(jnp.zeros((4, 256), jnp.int32))[2]
    attending = jax.jit(attend)
    names, types = tuple(MESH), (jax.sharding.AxisType.Auto,) * 3
    there = jax.sharding.AbstractMesh(tuple(MESH.values()), names, axis_types=types, abstract_device=TPU)
    here = sharding.make_mesh(**MESH).abstract_mesh
    for mesh in (None, there, here, there):
        text = traced(attending, q, k, v, mask, mesh=mesh)
        assert ("pallas_call" in text) == (mesh is there)
        assert ("shard_map" in text) == (mesh is not None)
    # products are counted alike: two forward, four backward
    one = 2 * 4 * 4 * 256 * 256 * 16
    loss = jax.grad(lambda q, k, v: attending(q, k, v, mask).sum(), argnums=(0, 1, 2))
    for mesh in (there, here):
        with jax.sharding.use_abstract_mesh(mesh):
            assert flops.count(attending, q, k, v, mask) == {"other": 2 * one}
            assert flops.count(loss, q, k, v) == {"other": 6 * one}


@pytest.mark.parametrize("mesh", [None, MESH])
def test_cudnn_is_called(monkeypatch, mesh):
    """Lowered for a GPU, without one: every device calls it for its own rows and heads."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    q, k, v, _ = inputs(4, 128, 4, 2, 96, jnp.bfloat16)
    mask = layers.row_layout(jnp.zeros((4, 128), jnp.int32))[2]

    def loss(q, k, v):
        return attend(q, k, v, mask).astype(jnp.float32).sum()

    with jax.set_mesh(sharding.make_mesh(**mesh)) if mesh else contextlib.nullcontext():
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v)
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$fmhaScaleBiasSoftmax" in line]
    assert len(calls) == 2 and "Backward" in calls[1]
    shape = "tensor<1x128x2x96xbf16>, tensor<1x128x1x96xbf16>" if mesh else "tensor<4x128x4x96xbf16>"
    assert all(shape in line for line in calls)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_programs_for_a_tpu_hold_no_scores():
    """In a process of its own: one that holds libtpu, and no TPU, cannot be profiled any more."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compiled_for_a_tpu():
    devices = programs.devices_of("v5e:2x2")
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=devices)
    rows, length, heads, groups, width = 4, 1024, 8, 4, 96
    layout = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    shapes = [jax.ShapeDtypeStruct((rows, length, n, width), jnp.bfloat16) for n in (heads, groups, groups)]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout) for x in shapes]
    branch = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    branch = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=branch)

    def loss(q, k, v, branch):
        return attend(q, k, v, layers.row_layout(branch)[2]).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, branch).compile()
    text, mine = compiled.as_text(), (rows // 2) * (heads // 2)
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, dq, dk and dv
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * mine * length**2
    # of a row's mask 2 x 2 blocks of 512, the one above the diagonal is never computed
    assert hlo.work(text).flops == (2 + 3 + 4) * 2 * mine * length**2 * width * 3 / 4


if __name__ == "__main__":
    compiled_for_a_tpu()
