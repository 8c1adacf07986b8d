"""The kernels of decoding, interpreted, against the same attention written in einsums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mstar_jax import sharding
from mstar_jax.models import attention, decode_kernel

H100 = "NVIDIA H100 80GB HBM3"


def inputs(heads, groups, width, length=100, sizes=(20, 20), each=False, dtype=jnp.float32, cache="", rows=2):
    """q, k, v [B, K, ..., N] of a new token, and what `branch_attention` is given."""
    branches, rng = 3, np.random.default_rng(heads * width + length)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def seen(*shape):
        return jnp.asarray(rng.random(shape) < 0.6)

    new = [normal(rows, branches, n, width) for n in (heads, groups, groups)]
    prefix = attention.stored(normal(rows, groups, length, width), cache), normal(rows, groups, length, width)
    prefix = (
        jax.tree.map(lambda x: x.swapaxes(2, 3) if x.ndim == 4 else x, prefix[0]),
        attention.stored(prefix[1], cache),
    )
    suffix = [
        tuple(attention.stored(normal(rows, branches, groups, n, width), cache) for _ in range(2))
        for n in sizes
    ]
    visible = seen(rows, branches if each else 1, length).at[0, :, :70].set(False)  # and a block of nothing
    own_visible = [seen(rows, branches, n) for n in sizes]
    own_visible[0] = own_visible[0].at[:, :, 3].set(True)
    own_visible[-1] = own_visible[-1].at[1].set(len(sizes) == 1)
    live = jnp.ones((rows, branches), bool).at[-1, 1].set(False)
    return new, (prefix, visible, suffix, own_visible, jnp.asarray(3), live)


def both(monkeypatch, new, given):
    """Outputs of the kernels and of the einsums."""

    def run(*new):
        return attention.branch_attention(*given)(*new)

    expected = jax.jit(lambda *new: run(*new))(*new)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "device_kind", lambda: H100)
        patch.setattr(decode_kernel, "attend", functools.partial(decode_kernel.attend, interpret=True))
        assert "pallas_call" in str(jax.make_jaxpr(run)(*new))
        found = jax.jit(lambda *new: run(*new))(*new)
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
    assert np.isfinite(found[0]).all()  # of branches that have ended, too
    live = np.asarray(given[-1])
    return [np.asarray(x[0], np.float32)[live] for x in (found, expected)]


def test_nothing_of_an_ended_branch_is_read(monkeypatch):
    """With keys and values that are not numbers."""
    new, (prefix, visible, suffix, *rest, live) = inputs(4, 2, 16)

    def poisoned(x):
        return jnp.where(live[:, :, None, None, None], x, jnp.nan)

    spoiled = [tuple(poisoned(x) for x in chunk) for chunk in suffix]
    new = [jnp.where(live[:, :, None, None], x, 1.0) for x in new]
    found, _ = both(monkeypatch, new, (prefix, visible, spoiled, *rest, live))
    clean, _ = both(monkeypatch, new, (prefix, visible, suffix, *rest, live))
    np.testing.assert_array_equal(found, clean)


@pytest.mark.parametrize("heads", [2, 8])  # of two groups
@pytest.mark.parametrize("width", [pytest.param(16, marks=pytest.mark.slow), 96])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("cache", ["", "int8"])
def test_kernels_are_what_the_einsums_say(monkeypatch, heads, width, each, cache):
    found, expected = both(monkeypatch, *inputs(heads, 2, width, each=each, cache=cache))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("heads", [2, 14])
@pytest.mark.parametrize(
    ("width", "length", "sizes"), [(8, 9, (5,)), (64, 128, (100, 100, 100)), (128, 577, (64, 64))]
)
def test_lengths_that_fill_their_blocks_and_that_do_not(monkeypatch, heads, width, length, sizes):
    found, expected = both(monkeypatch, *inputs(heads, 2, width, length, sizes))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("heads", [2, 8])
def test_halves(monkeypatch, heads):
    found, expected = both(monkeypatch, *inputs(heads, 2, 96, dtype=jnp.bfloat16))
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("cache", ["", "int8"])
def test_every_device_its_own_rows_and_heads(monkeypatch, cache):
    new, given = inputs(4, 2, 16, cache=cache, rows=4)
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        found, expected = both(monkeypatch, new, given)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_who_takes_it():
    q, other = jnp.zeros((1, 57, 2, 9, 96), jnp.bfloat16), jnp.zeros((1, 16, 2, 1, 192), jnp.bfloat16)
    cached = jnp.zeros((1, 2, 96, 4), jnp.bfloat16)
    assert decode_kernel.takes(H100, q, cached) and decode_kernel.takes(
        H100, q, attention.stored(cached, "int8")
    )
    assert not decode_kernel.takes("cpu", q, cached) and not decode_kernel.takes("TPU v5 lite", q, cached)
    assert not decode_kernel.takes(H100, q, cached.astype(jnp.float32))
    assert not decode_kernel.takes(H100, other, cached)  # heads that are too wide


@pytest.mark.parametrize(("each", "cache"), [(False, "int8"), (True, "")])
def test_branches_that_do_not_fit_a_tile_together(monkeypatch, each, cache):
    monkeypatch.setattr(decode_kernel, "QUERIES", 8)  # 3 branches of 4 heads a group, as blocks of 2 and 1
    found, expected = both(monkeypatch, *inputs(8, 2, 16, 600, each=each, cache=cache))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("cache", ["", "int8"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowered_for_a_gpu(heads, cache, dtype):
    """Without one: both kernels are there."""
    device = jax.sharding.AbstractDevice(H100, None, "cuda")
    mesh = jax.sharding.AbstractMesh(
        (1, 1, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, abstract_device=device
    )
    new, given = inputs(heads, 2, 96, each=True, dtype=dtype, cache=cache)
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.jit(lambda *new: attention.branch_attention(*given)(*new)[0]).trace(*new)
        assert program.lower(lowering_platforms=("cuda",)).as_text().count("xla.gpu.triton") == 2
