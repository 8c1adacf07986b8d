"""Advantages and losses against written-out references; which responses are weighed, and how."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import POLICY, close
from ml_collections import ConfigDict

from mstar_jax import sharding
from mstar_jax.data import loader
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.inference.logprobs import computed, logprobs, token_logprobs
from mstar_jax.profiling import speed
from mstar_jax.rewards import diversity
from mstar_jax.stages import weigh
from mstar_jax.structs import Batch, Prompt, Query, Response, Row, Stage, float32, int32
from mstar_jax.training import objectives
from mstar_jax.training.step import token_loss

# ---- advantages ---------------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = np.array([1.0, 0.0, 0.0, 1.0])
    close(objectives.leave_one_out(rewards), [2 / 3, -2 / 3, -2 / 3, 2 / 3], dtype="float64")
    close(objectives.group_normalised(rewards), [1, -1, -1, 1], dtype="float64")
    graded = np.array([0.2, 0.4, 0.9])
    close(objectives.leave_one_out(graded), [0.2 - 0.65, 0.4 - 0.55, 0.9 - 0.3], dtype="float64")
    close(objectives.group_normalised(graded), (graded - 0.5) / np.sqrt(0.26 / 3), dtype="float64")


@pytest.mark.parametrize("rewards", [[1.0] * 4, [0.0] * 3, [0.1] * 3, [0.7], [], [0.1 + 0.2, 0.3]])
def test_equal_rewards_are_no_direction(rewards):
    for advantage in objectives.ADVANTAGES.values():
        found = advantage(np.array(rewards))
        assert found.tolist() == [0.0] * len(rewards)


def test_a_token_answers_for_its_step_and_what_follows():
    """Leave one out of the steps' scores 1, 0 and 0.5 is 0.75, -0.75 and 0."""
    found = objectives.dense(
        objectives.leave_one_out, [[1.0, 0.0], [0.5], [0.3], []], [[1, 3], [2], [0, 1], [4]], [4, 3, 2, 5]
    )
    assert [each.tolist() for each in found] == [[0.0, 0.0, -0.75, -0.75], [0.0] * 3, [0.0] * 2, [0.0] * 5]


def test_one_token_that_ends_two_steps():
    [found, _] = objectives.dense(objectives.leave_one_out, [[1.0, 0.0], [0.5]], [[1, 1], [0]], [3, 1])
    assert found.tolist() == [0.0, 0.0, 0.0]  # 0.75 - 0.75; what follows the last step answers for nothing


def test_importance_weights_are_cut():
    found = objectives.importance(np.log([0.5, 0.2, 0.9]), np.log([0.25, 0.4, 0.1]), 2.0)
    close(found, [2.0, 0.5, 2.0], dtype="float64")


# ---- losses -------------------------------------------------------------------------------------------

VOCAB = 7


class Table:
    """A model whose parameters are its logits [B, T, V]."""

    def __init__(self, logits):
        self.values = logits

    def __call__(self, batch, remat=None):
        return self.values

    def token_logprobs(self, logits, tokens, wanted, temperature=None, forbidden=()):
        scaled = logits if temperature is None else logits / temperature[:, None, None]
        found = jnp.take_along_axis(jax.nn.log_softmax(scaled), tokens[..., None], axis=-1)[..., 0]
        return found, jnp.argmax(logits, axis=-1) == tokens


@pytest.fixture(scope="module")
def rows():
    """Two rows, the first of two branches; weights of both signs, one of them 0."""
    rng = np.random.default_rng(0)
    branch = np.array([[0, 0, 1, 1, 1, 2, 2, -1], [0, 1, 1, 1, 1, 1, -1, -1]], np.int32)
    own = branch > 0
    weights = rng.normal(size=branch.shape) * own
    weights[1, 3] = 0.0
    logits = rng.normal(size=(*branch.shape, VOCAB)).astype(np.float32)
    batch = Batch(
        tokens=rng.integers(0, VOCAB, branch.shape).astype(np.int32),
        branch=branch,
        loss_mask=weights.astype(np.float32),
        image_index=None,
        pixels=None,
        temperature=np.array([0.7, 1.3], np.float32),
    )
    scaled = logits.astype(np.float64) / np.array([0.7, 1.3])[:, None, None]
    p = np.exp(scaled) / np.exp(scaled).sum(-1, keepdims=True)
    logprob = np.log(np.take_along_axis(p, batch.tokens[..., None], axis=-1)[..., 0])
    old = logprob + rng.normal(size=branch.shape)  # ratios of 1/10 to 10
    reference = logprob + rng.normal(size=branch.shape)
    batch = batch._replace(old=(old * own).astype(np.float32), reference=(reference * own).astype(np.float32))
    return logits, batch, p, logprob


def by_hand(rows, objective, *, truncate=0.0, low=0.0, high=0.0, kl=0.0, token_mean=True):
    """The gradient with respect to the logits, in numpy: of log p it is (one hot - p) / T."""
    logits, batch, p, logprob = rows
    gradient = np.zeros(logits.shape)
    for b, t in np.argwhere(batch.branch > 0):
        weight, ratio = float(batch.loss_mask[b, t]), np.exp(logprob[b, t] - batch.old[b, t])
        if objective == "reinforce":
            factor = -weight * (min(ratio, truncate) if truncate else 1.0)
        else:
            still = ratio <= 1 + high if weight > 0 else ratio >= 1 - low
            factor = -weight * ratio * still
        factor += kl * (1 - np.exp(batch.reference[b, t] - logprob[b, t]))
        size = 1 if token_mean else np.sum(batch.branch[b] == batch.branch[b, t])
        hot = np.eye(VOCAB)[batch.tokens[b, t]]
        gradient[b, t] = factor / size * (hot - p[b, t]) / batch.temperature[b]
    return gradient


NONE = {"clip_low": 1.0, "clip_high": 1e9, "truncate": 0.0, "kl": 0.0, "token_mean": True}


def gradient_of(loss, logits, batch):
    def value(logits):
        return loss(Table(logits), batch, None)

    (_, extra), found = jax.value_and_grad(value, has_aux=True)(jnp.asarray(logits))
    return np.asarray(found), extra


@pytest.mark.parametrize("token_mean", [True, False])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("objective", ["reinforce", "grpo"])
def test_gradients_by_hand(rows, objective, kl, token_mean):
    logits, batch, *_ = rows
    values = {"truncate": 2.0, "clip_low": 0.2, "clip_high": 0.28, "kl": kl, "token_mean": token_mean}
    found, extra = gradient_of(objectives.make_loss(objective, **values), logits, batch)
    want = by_hand(rows, objective, truncate=2.0, low=0.2, high=0.28, kl=kl, token_mean=token_mean)
    close(found, want, 8 * VOCAB)
    assert np.abs(want).max() > 0.1
    assert float(extra["tokens"]) == pytest.approx(10 if token_mean else 3)  # tokens; responses


@pytest.mark.parametrize("objective", ["reinforce", "grpo"])
def test_on_the_datas_own_policy_both_are_reinforce(rows, objective):
    """p_old = p, and no clipping: the gradient of the weighted likelihood, zero weights included."""
    logits, batch, _, logprob = rows
    batch = batch._replace(old=(logprob * (batch.branch > 0)).astype(np.float32))
    values = NONE if objective == "grpo" else NONE | {"truncate": 2.0}
    found, extra = gradient_of(objectives.make_loss(objective, **values), logits, batch)
    plain, _ = gradient_of(objectives.make_loss("reinforce", **NONE), logits, batch)
    close(found, plain, 8 * VOCAB)
    one = batch._replace(temperature=None)  # the likelihood of sft, at T = 1

    def sft(model, batch, remat):
        logprob, right = model.token_logprobs(model(batch), batch.tokens, None)
        return -(logprob * batch.loss_mask).sum(), {}

    want, _ = gradient_of(sft, logits, one)
    at_one, _ = gradient_of(objectives.make_loss("reinforce", **NONE), logits, one)
    close(at_one, want, 8 * VOCAB)
    assert float(extra["tokens"]) == 10


def test_what_is_not_clipped_for_a_wrong_response():
    """It is pushed down no further once it is unlikely, and a ratio beyond every number stays finite."""
    old = jnp.array([[-1.0, -1.0, -900.0, -1.0]])
    weight = jnp.array([[-1.0, -1.0, -1.0, 1.0]])
    logprob = jnp.array([[-1.5, -1.1, -1.0, -900.0]])
    value, grad = jax.value_and_grad(lambda x: objectives.grpo(x, weight, old, 0.2, 0.28).sum())(logprob)
    assert np.isfinite(float(value)) and np.isfinite(np.asarray(grad)).all()
    close(grad[0, :2], [0.0, np.exp(-0.1)])


def test_sft_is_the_likelihood_itself():
    assert objectives.make_loss("sft", **NONE) is token_loss
    values = ConfigDict(NONE | {"objective": "grpo", "keep": 2})
    # so that one program trains all stages
    assert objectives.loss_of(values, [3, 5]) is objectives.loss_of(values, (3, 5))


@pytest.mark.slow  # the losses by hand are above
def test_a_policys_gradient_on_a_two_branch_row():
    """Of the real model, in one shared row, against two plain causal sequences."""
    policy, rng = tiny.model(), np.random.default_rng(3)
    one = tiny.row(rng, [(0, 9), (1, 5), (2, 4)], 20)
    batch = tiny.stack([one])
    own, at = batch.branch > 0, np.float32(0.8)
    weights = np.where(batch.branch == 1, 0.7, -0.5) * own
    old = (-4.0 + rng.normal(size=own.shape)) * own
    batch = batch._replace(
        loss_mask=weights.astype(np.float32),
        old=old.astype(np.float32),
        reference=(old - 0.3 * own).astype(np.float32),
        temperature=np.full(1, at),
    )
    values = {"truncate": 2.0, "clip_low": 0.9, "clip_high": 5.0, "kl": 0.2, "token_mean": False}
    loss = objectives.make_loss("grpo", **values)
    places = [np.flatnonzero((batch.branch[0] == 0) | (batch.branch[0] == number)) for number in (1, 2)]

    def written_out(policy):
        total = 0.0
        for number, at_branch in zip((1, 2), places):
            size = int((batch.branch[0] == number).sum())
            padded = np.pad(batch.tokens[0][at_branch], (0, 14 - len(at_branch)))
            logits = tiny.raw_logits(policy, padded)[0]
            for place in range(9, len(at_branch)):
                where = at_branch[place]
                logprob = jax.nn.log_softmax(logits[place - 1] / at)[padded[place]]
                ratio, weight = jnp.exp(logprob - batch.old[0, where]), weights[0, where]
                cut = jnp.clip(ratio, 0.1, 6.0)
                gone = batch.reference[0, where] - logprob
                lost = -jnp.minimum(ratio * weight, cut * weight) + 0.2 * (jnp.exp(gone) - gone - 1)
                total += lost / size
        return total

    ours = jax.jit(jax.grad(lambda policy: loss(policy, batch, None)[0]))(policy)
    theirs = jax.jit(jax.grad(written_out))(policy)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        close(a, b, POLICY, scale=max(float(np.abs(b).max()), 1.0))


# ---- sampler and trainer ------------------------------------------------------------------------------


def gap(folder, temperature, *, dtype="float32", cache=""):
    """Two queries' samples, read again as rows to train on; see `diversity.agreement`."""
    processor = tiny.processor(folder)
    processor.forbidden_ids = (*processor.forbidden_ids, *range(60, 120))  # many, so that none can be lost
    policy, rng = tiny.model(), np.random.default_rng(1)
    rows = [tiny.row(rng, [(0, n)], 16) for n in (16, 11)]
    config = SamplingConfig(branches=2, max_new_tokens=6, cache=cache)
    batch = tiny.stack(rows)
    out = tiny.generate(processor, config, sharding.cast(policy, dtype), batch, temperature=temperature)
    whole = []
    for at, row in enumerate(rows):
        prompt = int((row["branch"] == 0).sum())
        layout = [(0, prompt), *((k + 1, int(out.length[at, k])) for k in range(2))]
        one = tiny.row(rng, layout, 28)
        one["tokens"][:prompt] = row["tokens"][:prompt]
        said = [out.tokens[at, k, : out.length[at, k]] for k in range(2)]
        one["tokens"][one["branch"] > 0] = np.concatenate(said)
        whole.append(one)
    trained = tiny.stack(whole)._replace(temperature=np.full(2, temperature, np.float32))
    found = np.asarray(token_logprobs(policy, trained, "float32", processor.forbidden_ids))
    pairs = [
        (found[at][trained.branch[at] == k + 1], out.logprobs[at, k, : out.length[at, k]])
        for at in range(2)
        for k in range(2)
    ]
    assert not found[trained.branch <= 0].any() and all(len(one) for one, _ in pairs)
    return diversity.agreement(pairs)


def test_sampler_and_trainer_agree_in_float32(tmp_path):
    found = gap(tmp_path, 0.7)
    assert found["sampler_mean"] <= found["sampler_greatest"] < 1e-4
    assert found["sampler_ess"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"dtype": "bfloat16"}, {"cache": "int8"}], ids=str)
def test_another_dtype_or_cache_is_told(tmp_path, setting):
    found = gap(tmp_path, 1.3, **setting)
    assert 1e-4 < found["sampler_mean"] < found["sampler_greatest"] < 1.0
    assert 0.5 < found["sampler_ess"] < 1.0 - 1e-8


@pytest.fixture(scope="module")
def read_again(tmp_path_factory):
    """A host of a tiny policy, and rows of two to six responses; the first are too long for one piece."""
    folder = tmp_path_factory.mktemp("host")
    processor, rng = tiny.processor(folder), np.random.default_rng(5)
    queries = [Query(f"q{i}", (), "area") for i in range(5)]
    prompts = loader.plan_prompts([(q, q.question) for q in queries], processor, 100)

    def row(prompt, count):
        said = tuple(int32(rng.integers(9, 200, rng.integers(2, 12)).tolist()) for _ in range(count))
        return Row(prompt, said, temperature=0.7)

    rows = [row(prompt, count) for prompt, count in zip(prompts, (6, 6, 2, 3, 2))]

    def host(name, **data):
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        return types.SimpleNamespace(
            workdir=folder / name,
            processor=processor,
            mesh=mesh,
            data=types.SimpleNamespace(workers=0, **data),
            prm=types.SimpleNamespace(chunk=3),
            stop=lambda: False,
            speeds=speed.Speeds(1),
        )

    return host, rows


def test_log_probabilities_of_rows_through_their_store(read_again):
    """The same in rows that are cut, in batches by length, and from the store."""
    host, rows = read_again
    policy = tiny.model()

    def read(host, rows, load=lambda: policy, size=2):
        return logprobs(host, "a", load, rows, size=size, dtype="float32")

    plain = host("whole", buckets=(96,), grouped=False)
    whole = computed(plain, "a", policy, rows, size=2, dtype="float32")
    cut = host("cut", buckets=(24, 40), grouped=True)
    assert len(loader.split_rows(rows, 40)) > len(rows)
    found = read(cut, rows)
    assert [[len(x) for x in each] for each in found] == [[len(r) for r in row.responses] for row in rows]
    for ours, theirs in zip(found, whole, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, POLICY, scale=8.0)
    for size in (2, 1):  # as after a restart with more microbatches
        assert found == read(cut, rows, lambda: pytest.fail("it is all there"), size)
    assert len(list((cut.workdir / "logprobs" / "a").glob("*.jsonl"))) == 2  # of 3 and of 2 queries
    with pytest.raises(ValueError, match="made with other settings"):
        read(cut, [dataclasses.replace(row, temperature=1.0) for row in rows])


# ---- weighing -----------------------------------------------------------------------------------------


def responses(query, verdicts, scores=None):
    """Of three tokens and two steps each."""
    return [
        Response(
            query,
            sample,
            "a\nb",
            int32((5, 9, 2)),
            -3.0,
            False,
            "1",
            verdict,
            scores[sample] if scores else None,
            logprobs=float32([-1.0, -0.5, -1.5]),
        )
        for sample, verdict in enumerate(verdicts)
    ]


TEXTS = ["", "", "", "", "", "a\n", "", "", "", "b"]  # id 5 ends a step
SETTINGS = {"objective": "reinforce", "process_weight": 0.0, "truncate": 2.0, "kl": 0.0, "kl_queries": 9}


def groups():
    right, wrong = "correct", "wrong"
    verdicts = {"both": [right, wrong, wrong], "right": [right] * 3, "wrong": [wrong] * 3, "none": []}
    return {name: responses(name, each) for name, each in verdicts.items()}


def test_queries_that_cannot_teach_are_skipped_and_counted():
    queries = [Query(name, (), "") for name in ("right", "both", "wrong", "none", "unknown")]
    found, counts = weigh.teaching(queries, groups(), ConfigDict(SETTINGS), TEXTS)
    assert [group.query.id for group in found] == ["both"]
    assert counts == {"trained_groups": 1, "skipped_right": 1, "skipped_wrong": 1, "skipped_other": 0}
    assert [each.tolist() for each in found[0].advantages] == [[1.0] * 3, [-0.5] * 3, [-0.5] * 3]
    assert all(each.strides == (0,) for each in found[0].advantages)  # no memory for each token


def test_steps_may_teach_where_outcomes_do_not():
    settings = ConfigDict(SETTINGS | {"process_weight": 0.5})
    group = responses("wrong", ["wrong", "wrong"], [(0.9, 0.1), (0.5, 0.5)])
    [found], counts = weigh.teaching([Query("wrong", (), "")], {"wrong": group}, settings, TEXTS)
    assert counts["trained_groups"] == 1 and counts["skipped_wrong"] == 0
    close(found.advantages[0], 0.5 * np.array([0.0, -1.6 / 3, -1.6 / 3]), dtype="float64", scale=1.0)
    close(found.advantages[1], np.zeros(3), dtype="float64", scale=1.0)


def test_log_probabilities_that_were_not_kept_are_asked_for():
    plain = [
        Response("q", 0, "a", int32((5,)), -1.0, False, "1", verdict) for verdict in ("correct", "wrong")
    ]
    with pytest.raises(ValueError, match="query 'q', sample 0: its store has no log probabilities of tokens"):
        weigh.teaching([Query("q", (), "")], {"q": plain}, ConfigDict(SETTINGS), TEXTS)


@pytest.mark.parametrize(("kl", "stage", "passes"), [(0.0, 0, 1), (0.1, 1, 2), (0.0, 1, 2), (0.1, 0, 1)])
def test_weighed_rows(monkeypatch, kl, stage, passes):
    """Weights are advantages times importance weights; the warm-up is its own reference."""
    asked = []

    def read(run, name, load, rows, *, size, dtype):
        asked.append((name, size, len(rows)))
        shift = 2.0 if name.endswith("reference") else 0.1
        return [tuple(float32(np.array([-1.0, -0.5, -1.5]) + shift) for _ in r.responses) for r in rows]

    monkeypatch.setattr(weigh, "logprobs", read)
    monkeypatch.setattr(
        weigh, "plan", lambda run, asked, name: [Prompt(each.query, each.prompt, 4, 0) for each in asked]
    )
    evolve = SETTINGS | {"kl": kl, "batch": 8}
    run = types.SimpleNamespace(
        config=ConfigDict({"evolve": evolve, "train": {"accumulate": 2, "dtype": "float32"}}),
        texts=TEXTS,
        template="{question}",
    )
    queries = [Query(name, (), "") for name in ("both", "right")]
    policy = types.SimpleNamespace(stage=Stage.iteration(stage) if stage else Stage.warmup)
    source = weigh.weigh(run, Stage.iteration(stage + 1), policy, None, queries, groups())
    names = [f"iteration_0{stage + 1}", f"iteration_0{stage + 1}_reference"][:passes]
    assert asked == [(name, 4, 1) for name in names]
    [row] = source.rows
    assert isinstance(row, Row) and row.temperature == 1.0 and len(row.responses) == 3
    for weights, advantage in zip(row.weights, (1.0, -0.5, -0.5), strict=True):
        close(weights, np.full(3, advantage * np.exp(0.1)))
    assert bool(row.reference) == (kl > 0) and len(row.old) == 3
    assert source.notes["sampler_mean"] == pytest.approx(0.1, rel=1e-6)
    moved = 1.9 if stage else 0.0
    assert source.notes["kl"] == pytest.approx(np.exp(moved) - moved - 1, rel=1e-5, abs=1e-12)
    assert source.responses == 3 and source.notes["skipped_right"] == 1


def test_a_reward_models_scores_weigh_all_responses(monkeypatch):
    """Those of the wrong ones too; the log probabilities that were sampled are still there."""
    asked = []

    def scored(run, reward, name, queries, responses):
        asked.append((reward, name, [query.id for query in queries]))
        steps = {0: (0.9, 0.1)}
        return {
            query: [dataclasses.replace(r, step_scores=steps.get(r.sample, (0.5, 0.5))) for r in group]
            for query, group in responses.items()
        }

    def read(run, name, load, rows, *, size, dtype):
        return [tuple(float32([-1.0, -0.5, -1.5]) for _ in row.responses) for row in rows]

    monkeypatch.setattr(weigh, "scores", scored)
    monkeypatch.setattr(weigh, "logprobs", read)
    monkeypatch.setattr(
        weigh, "plan", lambda run, asked, name: [Prompt(each.query, each.prompt, 4, 0) for each in asked]
    )
    config = {"evolve": SETTINGS | {"process_weight": 0.5, "batch": 8}}
    run = types.SimpleNamespace(
        config=ConfigDict(config | {"train": {"accumulate": 1, "dtype": "float32"}}),
        texts=TEXTS,
        template="{question}",
    )
    queries = [Query(name, (), "") for name in ("both", "wrong")]
    policy = types.SimpleNamespace(stage=Stage.warmup)
    source = weigh.weigh(run, Stage.iteration(1), policy, "R_p", queries, groups())
    assert asked == [("R_p", "iteration_01", ["both", "wrong"])]
    # leave one out of six steps' scores: 0.48, -0.48 and four times 0; a token answers for what follows too
    part = 0.5 * np.array([0.0, -0.48, -0.48])
    for row, outcomes in zip(source.rows, ((1.0, -0.5, -0.5), (0.0, 0.0, 0.0)), strict=True):
        for weights, outcome, steps in zip(row.weights, outcomes, (part, 0.0, 0.0), strict=True):
            close(weights, outcome + steps * np.ones(3), scale=1.0)
    assert source.notes["trained_groups"] == 2
