"""FLOPs counted from traced functions, against formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mstar_jax.profiling import flops
from mstar_jax.structs import Batch
from mstar_jax.training import step

X, W = jax.ShapeDtypeStruct((8, 32), jnp.float32), jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)
ONE = 2 * 8 * 32 * 32


def blocks(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_loops_choices_and_gradients():
    assert flops.count(blocks, X, W) == {"other": 5 * ONE}
    grad = jax.grad(lambda w, x: blocks(x, w).sum(), argnums=(0, 1))
    assert flops.count(grad, W, X) == {"other": 3 * 5 * ONE}
    again = jax.grad(lambda w, x: jax.checkpoint(blocks)(x, w).sum(), argnums=(0, 1))
    assert flops.count(again, W, X) == {"other": 4 * 5 * ONE}  # and once more forward

    def choose(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[0])

    assert flops.count(jax.jit(choose), X, W) == {"other": 2 * ONE}


def test_a_convolution():
    image, kernel = jnp.zeros((2, 16, 16, 3)), jnp.zeros((4, 4, 3, 8))

    def convolve(image, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(image, kernel, (4, 4), "VALID", dimension_numbers=numbers)

    assert flops.count(convolve, image, kernel) == {"other": 2 * (2 * 4 * 4 * 8) * (4 * 4 * 3)}


def test_parts_of_a_policy():
    """The decoder by its formula; a gradient is twice the forward pass, and the tower's a little less."""
    policy, rows, length, crops = tiny.abstract(), 2, 40, 2
    number, value = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.float32)
    pixels = np.zeros((rows, crops, tiny.SIZE, tiny.SIZE, 3), np.float32)
    batch = Batch(number, number, value, number, pixels, value)
    found = flops.count(lambda model: step.token_loss(model, batch)[0], policy)
    c = policy.decoder.config
    heads, groups, width = c.num_heads, c.num_kv_heads, c.head_dim
    block = c.hidden_size * (2 * heads + 2 * groups) * width + 3 * c.hidden_size * c.intermediate_size
    tokens = rows * length
    block = 2 * tokens * block + 2 * 2 * tokens * length * heads * width
    assert found["language"] == c.num_layers * block + 2 * tokens * c.hidden_size * c.vocab_size
    assert set(found) == {"language", "projector", "vision"} and min(found.values()) > 0
    both = flops.count(jax.grad(lambda model: step.token_loss(model, batch)[0]), policy)
    assert both["language"] == 3 * found["language"] and both["projector"] == 3 * found["projector"]
    assert 2 * found["vision"] < both["vision"] <= 3 * found["vision"]


def test_chips():
    assert flops.chip_of("TPU v5 lite") == flops.CHIPS["TPU v5 lite"] != flops.chip_of("TPU v5")
    assert flops.chip_of("NVIDIA H100 80GB HBM3") == flops.CHIPS["NVIDIA H100"]
    assert flops.chip_of("cpu") is None
    with pytest.raises(TypeError):
        flops.count(blocks, X)


def test_bytes_that_products_touch():
    """Operands and results, as often as a loop runs; not the scores of attention."""
    x = jax.ShapeDtypeStruct((8, 32), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((32, 128), jnp.bfloat16)
    once = 2 * (8 * 32 + 32 * 128 + 8 * 128)
    assert flops.touched(jnp.matmul, x, w) == once
    assert (
        flops.touched(lambda x, w: jax.lax.scan(lambda c, _: (c, x @ w), 0, None, length=5)[1], x, w)
        == 5 * once
    )
    # of a gradient: forward, of w and of x
    assert flops.touched(jax.grad(lambda x, w: (x @ w).sum(), argnums=(0, 1)), x, w) == 3 * once
    q = jax.ShapeDtypeStruct((2, 4, 64, 16), jnp.float32)  # scores [2, 4, 64, 64]

    def attention(q, k, v):
        return jnp.einsum("bhts,bhsn->bhtn", jnp.einsum("bhtn,bhsn->bhts", q, k), v)

    assert flops.touched(attention, q, q, q) == 4 * 4 * 2 * 4 * 64 * 16


def test_recomputation_touches_again():
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def loss(w, remat):
        layer = jax.checkpoint(lambda x: jnp.tanh(x @ w)) if remat else lambda x: jnp.tanh(x @ w)
        return layer(layer(jnp.ones((8, 64)))).sum()

    plain, again = (flops.touched(jax.grad(functools.partial(loss, remat=r)), w) for r in (False, True))
    assert plain < again <= 4 / 3 * plain + 1e4
