"""Shared-prefix rows, LongRoPE, cached decoding, and what must not change the numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import POLICY, close, tolerance

from mstar_jax import sharding
from mstar_jax.models import layers
from mstar_jax.training import step

LENGTH = 64
LAYOUTS = [  # row 0 holds an image, rows 1 and 2 have padding among their branches
    [(0, 22), (1, 5), (2, 1), (3, 9)],
    [(0, 7), (-1, 3), (1, 4), (-1, 2), (2, 6), (3, 2)],
    [(0, 1), (2, 3), (1, 8), (-1, 1), (3, 5)],
]


@pytest.fixture(scope="module")
def policy():
    return tiny.model()


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return [tiny.row(rng, layout, LENGTH, grids) for layout, grids in zip(LAYOUTS, [[(1, 2)], [], []])]


@pytest.fixture(scope="module")
def shared(policy, rows):
    """Logits of the rows with all their branches, in a batch that ends in empty rows."""
    return np.asarray(tiny.logits(policy, tiny.stack(rows, 9)))


def literal_layout(branch):
    """`row_layout` of one row, said in words."""
    size, prefix = len(branch), sum(b == 0 for b in branch)
    positions, predictor, mask = [0] * size, [None] * size, np.zeros((size, size), bool)
    for j, mine in enumerate(branch):
        own = [i for i in range(j) if branch[i] == mine]
        positions[j] = 0 if mine < 0 else len(own) + (prefix if mine > 0 else 0)
        if mine >= 0 and (own or mine > 0):
            predictor[j] = own[-1] if own else prefix - 1
        for i in range(size):
            mask[j, i] = i <= j and (branch[i] == mine or branch[i] == 0)
    return positions, predictor, mask


def test_row_layout_is_what_its_docstring_draws():
    positions, predictor, mask = layers.row_layout(jnp.array([[0, 0, 0, 1, 1, 2, 2, 2, -1]]))
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0]
    assert predictor[0, 1:8].tolist() == [0, 1, 2, 3, 2, 5, 6]
    assert mask[0, 5].astype(int).tolist() == [1, 1, 1, 0, 0, 1, 0, 0, 0]


def test_row_layout_equals_brute_force():
    rng, size = np.random.default_rng(1), 30
    branches = []
    for _ in range(100):
        row = [0] * int(rng.integers(1, 8))
        for number in rng.permutation(np.arange(1, 6)):
            row += [-1] * int(rng.integers(0, 3)) + [int(number)] * int(rng.integers(0, 6))
        branches.append((row + [-1] * size)[:size])
    positions, predictor, mask = (np.asarray(x) for x in layers.row_layout(jnp.array(branches, jnp.int32)))
    for b, branch in enumerate(branches):
        want = literal_layout(branch)
        assert positions[b].tolist() == want[0]
        assert [int(p) if w is not None else None for p, w in zip(predictor[b], want[1])] == want[1]
        np.testing.assert_array_equal(mask[b], want[2])
    assert mask.any(axis=2).all(), "a row of softmax without any key would be NaN"
    assert predictor.min() >= 0 and predictor.max() < size


def test_shared_prefix_equals_separate_rows(policy, rows, shared):
    separate = [(r, number, tiny.alone(one, number)) for r, one in enumerate(rows) for number in (1, 2, 3)]
    logits = np.asarray(tiny.logits(policy, tiny.stack([one for _, _, one in separate])))
    for i, (r, number, one) in enumerate(separate):
        ours = shared[r][rows[r]["branch"] == number]  # its first row predicts the branch's first token
        close(ours, logits[i][one["branch"] == 1], POLICY)
    assert np.isfinite(shared).all(), "padding and empty rows must stay finite"


def test_one_branch_is_an_ordinary_causal_sequence(policy, rows, shared):
    one = tiny.alone(rows[0], 3)
    size = int(np.sum(one["branch"] >= 0))
    plain = tiny.raw_logits(policy, one["tokens"][:size], one["image_index"][:size], one["pixels"])
    close(shared[0][rows[0]["branch"] == 3], plain[0, 21 : size - 1], POLICY)


def test_an_image_is_seen_by_every_branch(policy, rows, shared):
    changed = [rows[0] | {"pixels": rows[0]["pixels"] + 1.0}, *rows[1:]]
    other = np.asarray(tiny.logits(policy, tiny.stack(changed, 9)))
    for number in (1, 2, 3):
        assert np.abs(other - shared)[0][rows[0]["branch"] == number].max() > 1e-2
    np.testing.assert_array_equal(other[1:], shared[1:])


def test_padding_has_no_effect(policy, rows, shared):
    rng = np.random.default_rng(2)
    moved = []
    for one in rows:  # every branch again, in another order, with other gaps and other junk in them
        order = [0, 3, -1, 1, -1, -1, 2]
        there = [(number, int(np.sum(one["branch"] == number)) if number >= 0 else 2) for number in order]
        new = tiny.row(rng, there, LENGTH)
        for number in (0, 1, 2, 3):
            for k in ("tokens", "image_index"):
                new[k][new["branch"] == number] = one[k][one["branch"] == number]
        moved.append(new | {"pixels": one["pixels"]})
    logits = np.asarray(tiny.logits(policy, tiny.stack(moved, 9)))
    for r, (one, new) in enumerate(zip(rows, moved)):
        for number in (1, 2, 3):
            close(logits[r][new["branch"] == number], shared[r][one["branch"] == number], POLICY)


def test_rope_tables_closed_form():
    config = dataclasses.replace(tiny.DECODER, max_position=131072, original_max_position=4096)
    positions = jnp.array([[0, 1, 77], [0, 1, 77]])
    cos, sin = layers.rope_tables(config, positions, jnp.array([False, True]))
    magnitude = np.sqrt(17 / 12)  # sqrt(1 + ln 32 / ln 4096)
    for b, factors in enumerate((config.short_factor, config.long_factor)):
        for j, position in enumerate((0, 1, 77)):
            for i, factor in enumerate(factors):
                angle = position / (factor * 10000.0 ** (2 * i / 8))
                within = tolerance(scale=1 + angle)  # the angle itself is rounded
                assert cos[b, j, i] == pytest.approx(magnitude * np.cos(angle), abs=within)
                assert sin[b, j, i] == pytest.approx(magnitude * np.sin(angle), abs=within)
    plain = dataclasses.replace(config, short_factor=None, long_factor=None)
    cos, _ = layers.rope_tables(plain, positions, jnp.array([False, True]))
    close(cos[1, 2], np.cos(77 / 10000.0 ** (np.arange(4) / 4)), scale=78.0)


def test_rotation_is_half_split_and_relative():
    config = dataclasses.replace(tiny.DECODER, short_factor=None, long_factor=None)
    positions = jnp.array([[3, 10], [0, 7]])
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    rope = layers.rope_tables(config, positions, jnp.zeros(2, bool))
    rotated = layers.rotate(jnp.broadcast_to(jnp.concatenate([k, q], axis=1), (2, 2, 1, 8)), rope)
    scores = jnp.einsum("bhn,bhn->b", rotated[:, 0], rotated[:, 1])
    lengths = float(np.linalg.norm(q) * np.linalg.norm(k))
    close(scores[0], scores[1], 8, scale=10 * lengths)  # 10 - 3 = 7 - 0
    angle = 10 / 10000.0 ** (np.arange(4) / 4)
    pairs = (q[0, 0, 0, :4] + 1j * q[0, 0, 0, 4:]) * np.exp(1j * angle)
    close(rotated[0, 1, 0], np.concatenate([pairs.real, pairs.imag]), scale=10 * lengths)


def test_long_rope_looks_at_prefix_and_own_branch_only(policy):
    rng, length = np.random.default_rng(3), 160
    many = [(0, 30), *((number, 34) for number in (1, 2, 3))]
    rows = [
        tiny.row(rng, many, length),  # 132 tokens, but no sequence passes 64
        tiny.row(rng, [(0, 30), (1, 35)], length),  # 65: long
        tiny.row(rng, [(0, 30), (1, 3), (2, 35)], length),  # its longest branch decides for the row
        tiny.row(rng, [(0, 20), (1, 5)], length),  # 135 tokens of padding
        tiny.row(rng, [(0, 65), (1, 5)], length),  # the prefix alone is long
        tiny.row(rng, [(0, 20), (-1, 100), (1, 5)], length),
    ]
    batch = tiny.stack(rows)
    ours = np.asarray(tiny.logits(policy, batch))

    def always(factors):
        config = tiny.config(short_factor=factors, long_factor=factors)
        return np.asarray(tiny.logits(tiny.with_config(policy, config), batch))

    short, long = always(tiny.DECODER.short_factor), always(tiny.DECODER.long_factor)
    for r, is_long in enumerate((False, True, True, False, True, False)):
        there = rows[r]["branch"] > 0
        close(ours[r][there], (long if is_long else short)[r][there], POLICY)
        assert np.abs(long - short)[r][there].max() > 1e-2


def test_cached_decode_equals_full_forward(policy):
    rng, room, length = np.random.default_rng(4), 6, 96
    rows = [
        tiny.row(rng, [(0, 22), (1, room), (2, room), (3, room)], length, [(1, 2)]),
        tiny.row(rng, [(0, 5), (1, room), (2, room), (3, room)], length),
        tiny.row(rng, [(0, 70), (1, room), (2, room), (3, room)], length),  # long factors
    ]
    full = np.asarray(tiny.logits(policy, tiny.stack(rows)))
    prompts = tiny.stack([tiny.prefix(one, 80) for one in rows], 4)  # one empty row: no NaN
    hidden, cache = jax.jit(lambda m, b: m.prefill(b, 3, 3, room))(policy, prompts)
    decode = jax.jit(lambda m, *rest: m.decoding()(*rest))
    tokens = np.zeros((4, 3, room), np.int32)
    for r, one in enumerate(rows):
        tokens[r] = one["tokens"][one["branch"] > 0].reshape(3, room)
    assert hidden.shape == (4, 3, policy.decoder.config.hidden_size)
    assert cache.start.tolist() == [[n] * 3 for n in (22, 5, 70, 0)]
    assert [x.shape for x in cache.prefix_k] == 2 * [(4, 2, 8, 80)]
    assert [[x.shape for x in chunk] for chunk in cache.suffix_v] == [2 * [(4, 3, 2, room, 8)]]
    for index in range(room):
        logits = np.asarray(policy.logits(hidden))
        assert np.isfinite(logits).all()
        for r, one in enumerate(rows):
            for k in range(3):
                want = full[r][one["branch"] == k + 1][index]
                close(logits[r, k], want, POLICY, err_msg=f"row {r} branch {k} at {index}")
        hidden, cache = decode(policy, tokens[:, :, index], np.ones((4, 3), bool), cache)


def test_grouped_query_attention_is_attention_with_repeated_keys(policy, rows, shared):

    def repeat(path, leaf):  # heads 0 and 1 share group 0
        shared = sharding.parameter_name(path) in ("decoder.blocks.k", "decoder.blocks.v")
        return jnp.repeat(leaf, 2, axis=2) if shared else leaf

    repeated = jax.tree_util.tree_map_with_path(repeat, policy)
    repeated = tiny.with_config(repeated, tiny.config(num_kv_heads=4))
    logits = np.asarray(tiny.logits(repeated, tiny.stack(rows, 9)))
    close(logits, shared, POLICY)


def test_unrolled_blocks_give_the_same_numbers(policy, rows, shared):
    unrolled = tiny.with_config(policy, tiny.config(unroll=2))
    close(tiny.logits(unrolled, tiny.stack(rows, 9)), shared, POLICY)


def test_recomputing_activations_gives_the_same_gradients(policy, rows):
    """Text rows; the tower's recomputation is in test_train's sharded steps."""
    batch = tiny.stack(rows[1:])
    found = {}
    for name, remat in step.REMAT.items():
        grads = jax.jit(jax.grad(lambda m, b, remat=remat: step.token_loss(m, b, remat)[0]))(policy, batch)
        found[name] = jax.tree.leaves(grads)
    greatest = max(float(jnp.abs(want).max()) for want in found["none"])
    for grads in found.values():
        for got, want in zip(grads, found["none"], strict=True):
            close(got, want, POLICY, scale=max(float(jnp.abs(want).max()), greatest / 100))


def test_norms_closed_form():
    x = jnp.array([[3.0, 4.0]])
    close(layers.rms_norm(x, jnp.array([1.0, 2.0]), 0.0)[0], [3 / 12.5**0.5, 8 / 12.5**0.5])
    close(layers.layer_norm(x, jnp.ones(2) * 2, jnp.ones(2), 0.0)[0], [-1.0, 3.0], scale=8.0)
    assert layers.rms_norm(x.astype(jnp.bfloat16), jnp.ones(2, jnp.bfloat16), 0.0).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_widen_and_its_gradients_are_a_product_s(shape, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape, dtype)
    weight = jax.random.normal(keys[1], (5, 11), dtype)
    above = jax.random.normal(keys[2], (*shape[:-1], 11), dtype)
    ours, theirs = jax.vjp(layers.widen, x, weight), jax.vjp(jnp.matmul, x, weight)
    np.testing.assert_array_equal(ours[0], theirs[0])
    for a, b in zip(ours[1](above), theirs[1](above)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        close(a, b, 11, dtype=dtype)
    alone = jax.vjp(lambda x: layers.widen(x, weight), x)[1](above)
    np.testing.assert_array_equal(alone[0], ours[1](above)[0])
