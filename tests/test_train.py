"""The loss by hand, the step against itself in other layouts, and what an optimizer must leave alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from close import POLICY, close
from jax.sharding import PartitionSpec

from mstar_jax import sharding
from mstar_jax.models import vlm
from mstar_jax.structs import TrainState
from mstar_jax.training import optimizer
from mstar_jax.training.step import abstract_state, init_state, make_train_step, token_loss

LENGTH = 40
FROZEN = [r"^tower", r"embedding$"]


@pytest.fixture(scope="module")
def policy():
    return tiny.model()


@pytest.fixture(scope="module")
def one():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def batch():
    """Eight rows of very unequal numbers of branch tokens, one without any; images in two of them."""
    rng = np.random.default_rng(0)
    layouts = [
        [(0, 18), (1, 9), (2, 3), (-1, 1), (3, 8)],
        [(0, 18), (1, 1)],
        [(0, 4), (1, 30)],
        [(0, 9)],
        [(0, 2), (1, 2), (2, 3)],
        [(0, 3), (1, 1), (2, 1), (3, 1)],
        [(0, 12), (1, 20)],
        [(0, 5), (1, 4), (2, 9)],
    ]
    return tiny.stack(
        [tiny.row(rng, layout, LENGTH, [(1, 1)] if i < 2 else []) for i, layout in enumerate(layouts)]
    )


@pytest.fixture(scope="module")
def text(batch):
    """The rows without their images: compiles without the tower."""
    return batch._replace(pixels=batch.pixels[:, :0], image_index=np.full_like(batch.image_index, -1))


RATE = np.float32(1e-3)


def adamw():
    return optimizer.make_optimizer(weight_decay=0.1)


def start(policy, tx, frozen=FROZEN):
    """A state of its own: the step donates what it is given."""
    return optimizer.new_state(jax.tree.map(jnp.copy, policy), tx, frozen)


def moments(state):
    """Adam's (mu, nu, count) of a chain of clipping, Adam and weight decay."""
    adam = state.opt_state[1]
    return adam.mu, adam.nu, adam.count


def named(tree):
    return {
        sharding.parameter_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_loss_by_hand(policy, batch):
    """Each branch as a plain causal sequence of its own; only its own tokens count, with their weights."""
    rng = np.random.default_rng(1)
    weights = batch.loss_mask * rng.choice([0.0, 0.5, 1.0], batch.loss_mask.shape)
    batch = jax.tree.map(lambda x: x[:1], batch._replace(loss_mask=weights.astype(np.float32)))
    branch, total, right = batch.branch[0], 0.0, 0.0
    for number in (1, 2, 3):
        places = np.flatnonzero((branch == 0) | (branch == number))
        after = [(0, LENGTH - len(places))]  # what follows has no effect; one length is one compile
        tokens = np.pad(batch.tokens[0][places], after)
        index = np.pad(batch.image_index[0][places], after, constant_values=-1)
        logits = tiny.raw_logits(policy, tokens, index, batch.pixels[0])
        logits = np.asarray(logits[0], np.float64)
        for j, place in enumerate(places):
            if branch[place] == number:
                row = logits[j - 1] - logits[j - 1].max()
                total += weights[0, place] * (np.log(np.exp(row).sum()) - row[tokens[j]])
                right += weights[0, place] * (np.argmax(row) == tokens[j])
    loss, extra = jax.jit(token_loss)(policy, batch)
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert float(extra["tokens"]) == pytest.approx(weights[0].sum())
    assert float(extra["right"]) == pytest.approx(right)


@pytest.mark.parametrize(
    "piece, many",
    [(LENGTH - 1, 10_000), pytest.param(16, 10_000, marks=pytest.mark.slow), (5, 10_000), (LENGTH, 1)],
)
def test_rows_are_scored_piece_by_piece(policy, text, monkeypatch, piece, many):
    """The same losses and gradients, without the logits of a whole row: long rows, and short ones where the
    vocabulary is large."""
    step = jax.value_and_grad(lambda model: token_loss(model, text), has_aux=True)
    (value, extra), grads = jax.jit(step)(policy)
    monkeypatch.setattr(vlm, "PIECE", piece)
    monkeypatch.setattr(vlm, "SHORT", 7)
    monkeypatch.setattr(vlm, "MANY", many)
    lowered = jax.jit(jax.value_and_grad(lambda model: token_loss(model, text), has_aux=True)).lower(policy)
    whole = f"tensor<{text.tokens.shape[0]}x{LENGTH}x{policy.decoder.config.vocab_size}xf32>"
    assert whole not in lowered.as_text()
    (again, more), others = lowered.compile()(policy)
    assert float(again) == pytest.approx(float(value), rel=1e-6)
    assert jax.tree.map(float, more) == jax.tree.map(float, extra)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-12)


@pytest.mark.parametrize("piece", [5, pytest.param(LENGTH, marks=pytest.mark.slow)])
def test_weights_below_0_turn_the_gradient_round(policy, text, monkeypatch, piece):
    """Nothing of them vanishes, in rows that are scored piece by piece too: -1 gives minus the gradient of 1,
    and of two branches with opposite weights the gradients are subtracted."""
    monkeypatch.setattr(vlm, "PIECE", piece)
    few = jax.tree.map(lambda x: x[:2], text)

    step = jax.jit(jax.value_and_grad(lambda m, w: token_loss(m, few._replace(loss_mask=w)), has_aux=True))

    def gradient(weights):
        (_, extra), found = step(policy, np.asarray(weights, np.float32))
        return float(extra["tokens"]), named(found)

    own, first = few.branch > 0, few.branch == 1
    tokens, up = gradient(own)
    again, down = gradient(-1.0 * own)
    assert tokens == again == own.sum()  # not the sum of signed weights
    both, mixed = gradient(own - 2.0 * first)
    assert both == tokens
    one, only = gradient(first)
    assert one == first.sum()
    for name in up:
        np.testing.assert_array_equal(down[name], -up[name], err_msg=name)
        scale = max(float(np.abs(up[name]).max()), float(np.abs(only[name]).max()), 1e-6)
        close(mixed[name], up[name] - 2 * only[name], POLICY, scale=3 * scale, err_msg=name)
    assert any(np.abs(value).max() > 1e-3 for value in only.values())


def test_logits_that_nothing_asks_for_are_not_made(policy, monkeypatch):
    """Wherever the tokens that are asked for are in their rows; the fullest row decides."""
    monkeypatch.setattr(vlm, "PIECE", 4)
    rng, width = np.random.default_rng(0), policy.decoder.config.hidden_size
    hidden = jnp.asarray(rng.normal(size=(2, 18, width)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 200, (2, 18)), jnp.int32)
    asked = jnp.zeros((2, 18), bool).at[0, jnp.asarray([3, 9, 16, 17])].set(True).at[1, 12].set(True)
    every = jax.nn.log_softmax(policy.logits(hidden))
    every = jnp.take_along_axis(every, tokens[..., None], axis=2)[..., 0]
    for wanted, made in ((asked, 4), (asked.at[1, :6].set(True), 8), (jnp.zeros_like(asked), 0)):
        found, right = jax.jit(policy.token_logprobs)(hidden, tokens, wanted)
        np.testing.assert_allclose(found[wanted], every[wanted], rtol=1e-5)
        assert (np.asarray(found) != 0).sum(axis=1).tolist() == [made, made]
        assert found.shape == right.shape == (2, 18)


def test_only_branch_tokens_are_targets(policy, batch):
    """Without branch tokens there is nothing to learn: no loss and no gradient."""
    nothing = jax.tree.map(lambda x: x[3:4], batch)
    value, extra = jax.jit(token_loss)(policy, nothing)
    assert float(value) == 0.0 and float(extra["tokens"]) == 0.0


@pytest.fixture(scope="module")
def sgd_steps(policy, one, text):
    """Parameters and metrics after one plain gradient step, by how many microbatches it is taken in."""

    @functools.cache
    def steps(accumulate):
        tx = optax.identity()
        step = make_train_step(tx, one, accumulate=accumulate)
        state, metrics = step(start(policy, tx, ()), text, np.float32(0.1))
        return named(state.params), {k: float(v) for k, v in metrics.items()}

    return steps


@pytest.mark.parametrize("accumulate", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulation_equals_one_large_batch(sgd_steps, accumulate):
    (params, metrics), (want, wanted) = sgd_steps(accumulate), sgd_steps(1)
    for name, value in want.items():
        np.testing.assert_allclose(params[name], value, atol=1e-6, err_msg=name)
    assert metrics == pytest.approx(wanted, rel=1e-5)


def test_metrics_and_step_are_the_mean_gradient(policy, text, sgd_steps):
    """Gradient of the mean over the tokens of all rows, from a forward pass written here."""
    params, metrics = sgd_steps(1)

    def mean(policy, batch):
        logprobs = jax.nn.log_softmax(tiny.logits(policy, batch), axis=-1)
        picked = jnp.take_along_axis(logprobs, batch.tokens[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(batch.branch > 0, picked, 0.0)) / jnp.sum(batch.branch > 0)

    loss, grads = jax.jit(jax.value_and_grad(mean))(policy, text)
    assert metrics["tokens"] == np.sum(text.branch > 0) == 92
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.global_norm(grads)), rel=1e-4)
    before, grads = named(policy), named(grads)
    for name in before:
        np.testing.assert_allclose(params[name], before[name] - 0.1 * grads[name], atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def three_steps(policy, one, batch):
    """Three AdamW steps on one device."""
    tx = adamw()
    state, step, losses = start(policy, tx), make_train_step(tx, one, frozen=FROZEN), []
    first = state
    for _ in range(3):
        state, metrics = step(state, batch, RATE)
        losses.append(float(metrics["loss"]))
    return first, state, losses


def test_sharded_steps_equal_unsharded_ones(policy, batch, three_steps):
    _, want, losses = three_steps
    mesh, tx = sharding.make_mesh(data=2, fsdp=2, tensor=2), adamw()
    state = optimizer.carry_on(
        TrainState(0, policy, ()), tx, mesh, frozen=FROZEN, moments=False, schedule=False
    )
    step = make_train_step(tx, mesh, frozen=FROZEN, remat="full")
    for i in range(3):
        state, metrics = step(state, sharding.put_batch(batch, mesh), RATE)
        assert float(metrics["loss"]) == pytest.approx(losses[i], rel=1e-5)
    mu, nu, _ = moments(state)
    for ours, theirs in zip((mu, nu), moments(want)):
        ours, theirs = named(ours), named(theirs)
        for name, value in theirs.items():
            np.testing.assert_allclose(
                ours[name], value, rtol=0, atol=3e-5 * np.abs(value).max(), err_msg=name
            )
    # Adam divides a gradient by its own size: where that is all rounding, a parameter may move by more
    ours, theirs = named(state.params), named(want.params)
    away = {name: np.abs(ours[name] - value) for name, value in theirs.items()}
    for name, distance in away.items():
        assert distance.max() < 1e-4, f"{name} is a tenth of a step away"
    assert np.mean(np.concatenate([d.ravel() for d in away.values()]) > 1e-5) < 1e-3
    # the state came back in the layout that it was made in: cut, not replicated
    for tree in (state.params, mu, nu):
        gate = tree.decoder.blocks.gate[...]
        assert gate.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        assert gate.addressable_shards[0].data.shape == (2, 16, 24)
    assert int(state.step) == 3


def test_training_learns(three_steps):
    _, _, losses = three_steps
    assert losses[2] < losses[1] < losses[0]


def test_frozen_parameters_stay_bit_identical_and_have_no_moments(policy, three_steps):
    """With weight decay, which would move them even without a gradient."""
    _, state, _ = three_steps
    before, after = named(policy), named(state.params)
    with_moments = named(moments(state)[0])
    assert len(jax.tree.leaves(state.opt_state)) == 2 * len(with_moments) + 1  # and nothing else but a count
    for name in before:
        frozen = name.startswith("tower") or name == "decoder.embedding"
        assert (name not in with_moments) == frozen
        if frozen:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
        else:
            assert np.abs(after[name] - before[name]).max() > 1e-4, name
    assert {"decoder.head", "project_up", "row_separator"} <= set(with_moments)


def test_the_state_is_donated(three_steps):
    first, _, _ = three_steps
    assert all(x.is_deleted() for x in jax.tree.leaves((first.params, first.opt_state)))


def test_bfloat16_compute_keeps_float32_masters(policy, one, text, sgd_steps):
    tx = adamw()
    state, metrics = make_train_step(tx, one, dtype=jnp.bfloat16)(start(policy, tx, ()), text, RATE)
    for x in jax.tree.leaves((state.params, state.opt_state)):
        assert x.dtype in (jnp.float32, jnp.int32)
    loss = sgd_steps(1)[1]["loss"]
    assert float(metrics["loss"]) != loss and float(metrics["loss"]) == pytest.approx(loss, rel=0.02)
    moved = np.abs(named(state.params)["decoder.norm"] - named(policy)["decoder.norm"])
    assert moved.max() < 2e-3, "a step of 1e-3 on values near 1 survives only in float32"
    assert (moved > 5e-4).mean() > 0.5


def test_clipping_is_by_the_global_norm_of_what_is_trained():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4), "c": jnp.zeros(2)}
    grads = {"a": jnp.full(3, 3.0), "b": jnp.full(4, -4.0), "c": jnp.full(2, 1e6)}

    class Tree:
        """Parameters addressed by attribute, as a module's are."""

    jax.tree_util.register_pytree_with_keys(
        Tree,
        lambda t: (
            [(jax.tree_util.GetAttrKey(k), v) for k, v in sorted(vars(t).items())],
            tuple(sorted(vars(t))),
        ),
        lambda names, values: tree(dict(zip(names, values))),
    )

    def tree(values):
        out = Tree()
        vars(out).update(values)
        return out

    norm = np.sqrt(9 * 3 + 16 * 4)  # without the frozen c
    for clip in (1.0, 100.0, 0.0):  # 0: not clipped
        tx = optimizer.make_optimizer(b1=0.0, b2=0.0, clip=clip)
        trained, update = (optimizer.split(tree(x), ["^c$"]).trained for x in (params, grads))
        _, state = tx.update(update, tx.init(trained), trained)
        mu = state[1].mu
        scale = min(1.0, clip / norm) if clip else 1.0
        np.testing.assert_allclose(mu.a, 3.0 * scale, rtol=1e-5)
        np.testing.assert_allclose(mu.b, -4.0 * scale, rtol=1e-5)


def test_a_negative_clip_is_refused():
    with pytest.raises(ValueError, match=r"train.clip = -1.0: must be 0 .* or more"):
        optimizer.make_optimizer(clip=-1.0)


def test_schedule_values():
    schedule = optimizer.make_schedule(2.0, steps=110, warmup_steps=10, final_fraction=0.1)
    half, quarter = 2.0 * (0.1 + 0.9 * 0.5), 2.0 * (0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2)
    found = schedule(np.array([0, 4, 9, 10, 60, 35, 110, 200]))
    assert found.tolist() == pytest.approx([0.2, 1.0, 2.0, 2.0, half, quarter, 0.2, 0.2])


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_schedule_can_be_constant(warmup):
    schedule = optimizer.make_schedule(3.0, steps=20, warmup_steps=warmup, final_fraction=1.0)
    want = [3.0 * min(1.0, (s + 1) / max(warmup, 1)) for s in range(25)]
    assert schedule(np.arange(25)).tolist() == pytest.approx(want)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 10), (10, 11), (10, -1), (0, 1)])
def test_schedule_refuses_a_warmup_longer_than_the_run(steps, warmup):
    with pytest.raises(ValueError, match=f"warms up over {warmup} steps of a run of {steps}"):
        optimizer.make_schedule(1.0, steps, warmup, 0.1)


def test_check_frozen(policy):
    optimizer.check_frozen(policy, FROZEN)
    with pytest.raises(
        ValueError, match=r"'vision_tower' matches no parameter; there are .*decoder\.blocks\.q.*tower\.patch"
    ):
        optimizer.check_frozen(policy, ["tower", "vision_tower"])


@pytest.mark.parametrize(
    "pattern",
    ["^tower", "(^tower|^project)", r"\Atower", "(?i)^TOWER", "^(?!decoder)", "bias", "a"],
)
def test_a_pattern_freezes_the_same_of_the_policy_and_of_the_reward_model(pattern):
    """However it is written; the reward model's own head is always trained."""
    policy = tiny.abstract()
    reward = jax.eval_shape(vlm.RewardModel, policy)
    names = optimizer.frozen_names(policy, [pattern])
    assert optimizer.frozen_names(reward, [pattern]) == {f"trunk.{name}" for name in names}
    for model in (policy, reward):
        if names:
            optimizer.check_frozen(model, [pattern])
        else:
            with pytest.raises(ValueError, match=f"train.frozen: '{pattern}' matches no parameter"):
                optimizer.check_frozen(model, [pattern])


def test_initialisation_is_born_in_its_layout():
    """init_state, abstract_state and the model's own init agree, on a mesh that cuts them."""
    from flax import nnx

    from mstar_jax.models.phi35 import Phi35Vision

    mesh, tx = sharding.make_mesh(data=2, fsdp=2, tensor=2), adamw()

    def make():
        return Phi35Vision(tiny.config(), nnx.Rngs(0)).decoder

    frozen = ["embedding$"]
    state = init_state(make, tx, mesh, frozen=frozen)
    abstract = abstract_state(make, tx, mesh, frozen=frozen)
    for x, want in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (want.shape, want.dtype, want.sharding)
    assert state.params.blocks.gate[...].addressable_shards[0].data.shape == (2, 16, 24)
    assert float(jnp.std(state.params.embedding[...])) == pytest.approx(32**-0.5, rel=0.05)


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("schedule", [False, True])
def test_what_is_carried_on(policy, one, three_steps, moments, schedule):
    """Moments and schedule, each alone or both, in the layout that training keeps."""
    _, state, _ = three_steps
    tx = adamw()
    carried = optimizer.carry_on(state, tx, one, frozen=FROZEN, moments=moments, schedule=schedule)
    wanted = state.opt_state if moments else start(policy, tx).opt_state
    assert jax.tree.structure(carried) == jax.tree.structure(state)
    for ours, want in zip(jax.tree.leaves(carried.opt_state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, want)
    assert int(carried.opt_state[1].count) == (3 if moments else 0)
    assert int(carried.step) == (3 if schedule else 0) and carried.step.dtype == jnp.int32
    for name, value in named(carried.params).items():
        np.testing.assert_array_equal(value, named(state.params)[name])
    layout = sharding.shardings(carried, sharding.TRAIN, one)
    for x, want in zip(jax.tree.leaves(carried), jax.tree.leaves(layout), strict=True):
        assert x.sharding.is_equivalent_to(want, x.ndim)


@pytest.fixture(scope="module")
def text_step(one):
    """An optimizer, and the step that two tests share."""
    tx = optimizer.make_optimizer(b1=0.8, b2=0.95, weight_decay=0.1, clip=0.5)
    return tx, make_train_step(tx, one, frozen=FROZEN)


def of_optax(peak, steps, warmup):
    """Our schedule down to a tenth, of optax's parts."""
    rising = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rising, optax.cosine_decay_schedule(peak, steps - warmup, 0.1)], [warmup])


def test_updates_are_those_of_optax(policy, one, text, text_step):
    """`optax.adamw` after clipping, with the schedule inside, over warm-up and decay, on the trained part."""
    schedule = optimizer.make_schedule(3e-3, steps=6, warmup_steps=2, final_fraction=0.1)
    tx, step = text_step
    state = optimizer.carry_on(
        TrainState(0, policy, ()), tx, one, frozen=FROZEN, moments=False, schedule=False
    )
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(of_optax(3e-3, 6, 2), b1=0.8, b2=0.95, weight_decay=0.1)
    )
    trained, fixed = optimizer.split(jax.tree.map(jnp.copy, policy), FROZEN)
    other = theirs.init(trained)

    def mean(trained):
        loss, extra = token_loss(optimizer.join(optimizer.Parts(trained, fixed)), text)
        return loss / extra["tokens"]

    @jax.jit
    def reference(trained, other):
        updates, other = theirs.update(jax.grad(mean)(trained), other, trained)
        return optax.apply_updates(trained, updates), other

    for rate in optimizer.learning_rates(schedule, 0, 5):
        state, _ = step(state, text, rate)
        trained, other = reference(trained, other)
    ours, theirs = named(optimizer.split(state.params, FROZEN).trained), named(trained)
    before = named(policy)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        moved = np.abs(value - before[name]).max()
        assert moved > 0 or name.startswith(("project", "row_sep", "view_sep")), name
        # the two programs sum gradients in different orders; where a gradient is all rounding, Adam still
        # takes a full step, so single values may differ
        away = np.abs(ours[name] - value)
        assert np.mean(away > 1e-3 * moved + 1e-7) < 0.01, name


def test_one_program_for_all_schedules(policy, one, text, text_step):
    """A state that is carried on in any way, at the rates of any schedule, needs no other program."""
    tx, step = text_step
    state = optimizer.carry_on(
        TrainState(0, policy, ()), tx, one, frozen=FROZEN, moments=False, schedule=False
    )
    for peak, steps, warmup in ((1e-3, 10, 2), (5e-4, 7, 0)):
        schedule = optimizer.make_schedule(peak, steps, warmup, 0.1)
        for keep in ((True, True), (True, False), (False, True), (False, False)):
            state = optimizer.carry_on(state, tx, one, frozen=FROZEN, moments=keep[0], schedule=keep[1])
            (rate,) = optimizer.learning_rates(schedule, int(state.step), 1)
            state, _ = step(state, text, rate)
    assert step._cache_size() == 1


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
@pytest.mark.parametrize("steps", [6, 40])
def test_schedule_is_the_formula(steps, warmup):
    """peak * (s + 1) / warmup, then a cosine over the rest, written out."""
    s = np.arange(steps + 3)
    along = np.clip((s - warmup) / (steps - warmup), 0.0, 1.0)
    cosine = 0.1 + 0.9 * 0.5 * (1.0 + np.cos(np.pi * along))
    want = 2e-3 * np.where(s < warmup, (s + 1) / max(warmup, 1), cosine)
    schedule = optimizer.make_schedule(2e-3, steps, warmup, 0.1)
    np.testing.assert_allclose(optimizer.learning_rates(schedule, 0, steps + 3), want, rtol=2e-6)
    np.testing.assert_array_equal(optimizer.learning_rates(schedule, 3, 2), schedule(np.array([3, 4])))


@pytest.mark.parametrize(("peak", "steps", "warmup"), [(2e-3, 900, 50), (1e-3, 384, 10), (1e-6, 625, 0)])
def test_rates_are_those_of_optax_to_the_last_bit(peak, steps, warmup):
    padded = np.arange(-(-steps // optimizer.BLOCK) * optimizer.BLOCK)
    theirs = np.asarray(of_optax(peak, steps, warmup)(padded), np.float32)
    ours = optimizer.learning_rates(optimizer.make_schedule(peak, steps, warmup, 0.1), 0, steps)
    np.testing.assert_array_equal(ours, theirs[:steps])
    none = optimizer.learning_rates(optimizer.make_schedule(peak, steps, warmup, 0.1), 0, 0)
    assert none.shape == (0,)  # a stage without a response to train on
