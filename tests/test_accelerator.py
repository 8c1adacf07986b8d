"""Small programs on whatever accelerator JAX has, against the same programs on the CPU.

pytest -m accelerator
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mstar_jax import sharding
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.models import attention, layers, vision
from mstar_jax.structs import Stage
from mstar_jax.training.checkpoint import Checkpoints, EvolveState
from mstar_jax.training.optimizer import make_optimizer, new_state
from mstar_jax.training.step import abstract_state, make_train_step

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="no accelerator"),
]

LENGTH, ROOM, BRANCHES = 80, 12, 4


@pytest.fixture(scope="module", autouse=True)
def exact():
    """float32 products as such: by default an accelerator rounds their inputs."""
    with jax.default_matmul_precision("highest"):
        yield


def on(platform):
    """A mesh of one device of the platform, None for the accelerator's."""
    devices = jax.devices(platform) if platform else jax.devices()
    return sharding.make_mesh(devices=devices[:1])


def both(fn, *args):
    """fn's results on the accelerator and on the CPU, as numpy arrays."""
    out = []
    for platform in (None, "cpu"):
        mesh = on(platform)
        with jax.set_mesh(mesh):
            placed = jax.device_put(args, sharding.batch_sharding(mesh, {"batch": None}))
            out.append(jax.tree.map(np.asarray, jax.jit(fn)(*placed)))
    return out


def close(ours, theirs, within):
    """Differences as a share of the greatest value of each array."""
    for name, (a, b) in enumerate(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=within * max(np.abs(b).max(), 1e-9), err_msg=str(name))


@pytest.fixture(scope="module")
def policy():
    return jax.tree.map(np.asarray, tiny.model())


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    layouts = [[(0, 30), (1, 20), (-1, 3), (2, 15)], [(0, 12), (1, 9), (2, 9), (3, 30)], [(0, 9)], [(0, 70)]]
    rows = [tiny.row(rng, layout, LENGTH, [(1, 1)] if at == 0 else []) for at, layout in enumerate(layouts)]
    return tiny.stack(rows)


def inputs(shape, groups, dtype, seed=0):
    rows, length, heads, width = shape
    rng = np.random.default_rng(seed)
    sizes = (heads, groups, groups, heads)
    return [jnp.asarray(rng.normal(size=(rows, length, n, width)), dtype) for n in sizes]


@pytest.mark.parametrize(
    ("dtype", "length", "within"),
    [(jnp.float32, 384, 1e-5), (jnp.bfloat16, 384, 0.02), (jnp.bfloat16, 90, 0.02)],
)
def test_attention_in_rows(dtype, length, within):
    """Forward and gradients: by a kernel where the machine has one."""
    q, k, v, weight = inputs((2, length, 4, 32), 2, dtype)
    third = length // 3
    branch = np.repeat(np.array([[0, 1, 2], [0, 0, 1]], np.int32), third, axis=1)
    branch[0, -5:] = -1
    mask = layers.row_layout(jnp.asarray(branch))[2]

    def run(q, k, v, weight, mask):
        def loss(q, k, v):
            out = attention.row_attention(mask, keep=False)(q, k, v)[0].astype(jnp.float32)
            return (out * weight.astype(jnp.float32) * (branch >= 0)[..., None, None]).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (ours, out), (theirs, wanted) = both(run, q, k, v, weight, mask)
    real = (branch >= 0)[..., None, None]
    close(out * real, wanted * real, within)
    close(ours, theirs, within)


@pytest.mark.parametrize(
    ("dtype", "length", "within"),
    [(jnp.float32, 50, 1e-5), (jnp.bfloat16, 577, 0.02), (jnp.bfloat16, 64, 0.02)],
)
def test_attention_of_the_tower(dtype, length, within):
    q, k, v, weight = inputs((3, length, 4, 64), 4, dtype)

    def run(q, k, v, weight):
        def loss(q, k, v):
            out = vision.attention(q, k, v, None).astype(jnp.float32)
            return (out * weight.astype(jnp.float32)).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    close(*both(run, q, k, v, weight), within)


@pytest.mark.parametrize(("dtype", "within"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 96), (8, 2, 64)])
@pytest.mark.parametrize("cache", ["", "int8"])
def test_attention_of_new_tokens(dtype, within, heads, groups, width, cache):
    """Over a prefix and two chunks of suffixes: by a kernel where the machine has one."""
    rng, rows, length, size = np.random.default_rng(0), 2, 100, 20

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    new = [normal(rows, BRANCHES, n, width) for n in (heads, groups, groups)]
    prefix = normal(rows, groups, length, width), normal(rows, groups, length, width)
    suffix = [tuple(normal(rows, BRANCHES, groups, size, width) for _ in range(2)) for _ in range(2)]
    prefix, suffix = jax.tree.map(lambda x: attention.stored(x, cache), (prefix, suffix))
    keys = jax.tree.map(lambda x: x.swapaxes(2, 3) if x.ndim == 4 else x, prefix[0])
    visible = jnp.asarray(rng.random((rows, BRANCHES, length)) < 0.6)
    seen = [jnp.asarray(rng.random((rows, BRANCHES, size)) < 0.6).at[:, :, 3].set(True) for _ in range(2)]

    live = jnp.ones((rows, BRANCHES), bool).at[1, 2].set(False)

    def run(new, prefix, visible, suffix, seen, live):
        out = attention.branch_attention(prefix, visible, suffix, seen, jnp.asarray(3), live)(*new)[0]
        return jnp.where(live[..., None, None], out, 0)  # what ended branches attend to is not defined

    close(*both(run, new, (keys, prefix[1]), visible, suffix, seen, live), within)


@pytest.mark.parametrize(("dtype", "within"), [(jnp.float32, 2e-5), (jnp.bfloat16, 0.05)])
def test_logits(policy, batch, dtype, within):
    def run(policy, batch):
        policy = sharding.cast(policy, dtype)
        return policy.logits(policy(batch)).astype(jnp.float32)

    ours, theirs = both(run, policy, batch)
    real = (batch.branch >= 0)[..., None]
    close(ours * real, theirs * real, within)


@pytest.mark.parametrize(("cache", "within"), [("", 2e-4), ("int8", 0.15)])
def test_sampled_tokens_have_the_probability_that_the_cpu_gives_them(policy, batch, tmp_path, cache, within):
    """The accelerator samples; the CPU scores the same tokens in one full forward pass."""
    processor, rng = tiny.processor(tmp_path), np.random.default_rng(1)
    config = SamplingConfig(BRANCHES, ROOM, cache=cache)
    prompts = [
        tiny.row(rng, [(0, n)], 64, [(1, 1)] if n == 30 else []) for n in (30, 9, 50, 41)
    ]  # short of the LongRoPE switch
    mesh = on(None)
    with jax.set_mesh(mesh):
        model = jax.device_put(policy, sharding.shardings(policy, sharding.SAMPLE, mesh))
        out = tiny.generate(processor, config, model, tiny.stack(prompts), temperature=1.0)
    tokens, logprobs, lengths = (np.asarray(x) for x in (out.tokens, out.logprobs, out.length))
    assert (lengths > 0).all() and len({tuple(row) for row in tokens.reshape(-1, ROOM)}) > 8
    forbidden = list(processor.forbidden_ids)
    for row, prompt in enumerate(prompts):
        size = int((prompt["branch"] == 0).sum())
        layout = [(0, size), *((k + 1, int(n)) for k, n in enumerate(lengths[row]))]
        whole = tiny.row(rng, layout, size + BRANCHES * ROOM)
        for name in ("tokens", "image_index"):
            whole[name][:size] = prompt[name][:size]
        own = whole["branch"] > 0
        whole["tokens"][own] = np.concatenate([tokens[row, k, :n] for k, n in enumerate(lengths[row])])
        with jax.set_mesh(on("cpu")), jax.default_device(jax.devices("cpu")[0]):
            scores = np.array(tiny.logits(policy, tiny.stack([whole | {"pixels": prompt["pixels"]}])))[0]
        scores[:, forbidden] = -np.inf
        wanted = np.asarray(scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))
        wanted = wanted[own, whole["tokens"][own]]
        found = np.concatenate([logprobs[row, k, :n] for k, n in enumerate(lengths[row])])
        np.testing.assert_allclose(found, wanted, rtol=0, atol=within * np.abs(wanted).max())


RATE = np.float32(1e-3)


def step_of(mesh, tx, policy, batch, steps, **how):
    with jax.set_mesh(mesh):
        params = jax.device_put(policy, sharding.shardings(policy, sharding.TRAIN, mesh))
        state = jax.jit(lambda params: new_state(params, tx))(params)
        step, losses = make_train_step(tx, mesh, **how), []
        for _ in range(steps):
            state, metrics = step(state, sharding.put_batch(batch, mesh), RATE)
            losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize(
    ("how", "within"),
    [
        ({}, 1e-4),
        ({"accumulate": 2, "remat": "full"}, 1e-4),
        ({"dtype": jnp.bfloat16, "remat": "dots"}, 0.03),
    ],
)
def test_train_steps(policy, batch, how, within):
    tx = make_optimizer()
    ours, theirs = (step_of(on(p), tx, policy, batch, 4, **how) for p in (None, "cpu"))
    np.testing.assert_allclose(ours[1], theirs[1], rtol=within)
    assert ours[1][-1] < ours[1][0]


def test_restored_state_is_the_saved_one_and_training_goes_on(policy, batch, tmp_path):
    """Sums of gradients may come in another order on an accelerator: what follows is equal up to rounding."""
    tx, mesh = make_optimizer(), on(None)
    _, losses = step_of(mesh, tx, policy, batch, 4)
    state, _ = step_of(mesh, tx, policy, batch, 2)
    Checkpoints(tmp_path).save(
        Stage.iteration(1), state, EvolveState("iteration", 1, 2, False, 1.0, 0), wait=True
    )
    with jax.set_mesh(mesh):
        abstract = abstract_state(lambda: jax.tree.map(jnp.asarray, policy), tx, mesh)
        found = Checkpoints(tmp_path).restore(Stage.iteration(1), abstract)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        step, again = make_train_step(tx, mesh), []
        for _ in range(2):
            found, metrics = step(found, sharding.put_batch(batch, mesh), RATE)
            again.append(float(metrics["loss"]))
    np.testing.assert_allclose(again, losses[2:], rtol=1e-4)
