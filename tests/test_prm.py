"""The reward model: step ends, continued prefixes, and equal scores of responses in one row and alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mstar_jax import sharding
from mstar_jax.data import loader
from mstar_jax.inference import draw
from mstar_jax.models import vlm
from mstar_jax.rewards import prm, steps
from mstar_jax.structs import Batch, Prompt, Query, Response, Row

LINES = "area\nbase\n\nheight 4\nThe answer is 6"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny.processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def texts(processor):
    return draw.token_texts(processor)


@pytest.fixture(scope="module")
def reward():
    """A reward model with random parameters throughout, including the weight of the likelihood."""
    out = tiny.randomised(lambda: vlm.RewardModel(tiny.abstract()), 5)
    out.likelihood[...] = jnp.float32(0.01)  # these log probabilities are large: sigmoids must not saturate
    return out


def response(text, processor, sample=0, verdict="wrong", truncated=False):
    tokens = tuple(processor.encode_response(text))
    return Response("q", sample, text, tokens[:-1] if truncated else tokens, 0.0, truncated, verdict=verdict)


def prompt(processor, text="area?"):
    length, crops = processor.prefix_shapes([text], [[]])[0]
    return Prompt(Query("q", (), text, answer="6"), text, length, crops)


# ---- labels ------------------------------------------------------------------------------------------


def test_prefixes_end_where_steps_do(processor, texts):
    one = response(LINES, processor)
    ends = steps.ends(one.tokens, texts)
    assert len(ends) == len(steps.split(LINES)) == 4 and ends[-1] == len(one.tokens) - 1
    found = prm.prefixes([one, dataclasses.replace(one, sample=1)], texts)
    assert [len(p) for p in found] == [e + 1 for e in ends[:-1]]  # a copy adds none
    assert [steps.split(processor.decode(p)) for p in found] == [
        ["area"],
        ["area", "base"],
        ["area", "base", "height 4"],
    ]


def test_labels(processor, texts):
    one = response(LINES, processor, verdict="correct")
    values = dict(zip(prm.prefixes([one], texts), (0.25, 0.0, 0.5)))
    assert prm.label(one, values, texts) == (0.25, 0.0, 0.5, 1.0)
    assert prm.label(one, values, texts, hard=True) == (1.0, 0.0, 1.0, 1.0)
    wrong = dataclasses.replace(one, verdict="wrong")
    assert prm.label(wrong, values, texts)[-1] == 0.0
    cut = dataclasses.replace(one, truncated=True)
    assert prm.label(cut, values, texts)[-1] == 0.0
    assert prm.label(response("The answer is 6", processor, verdict="correct"), {}, texts) == (1.0,)
    assert (
        prm.label(response("", processor), {}, texts)
        == prm.label(response(" \n", processor), {}, texts)
        == ()
    )
    with pytest.raises(KeyError):
        prm.label(one, {}, texts)


TOKENS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple), max_size=20, unique=True)


@settings(deadline=None, max_examples=60)
@given(found=TOKENS, completions=st.integers(1, 3), together=st.integers(1, 4), longest=st.integers(20, 60))
def test_stems_continue_every_prefix(found, completions, together, longest):
    asked = Prompt(Query("q", (), ""), "", 10, 0)
    samples = completions * together
    rows = prm.stems(asked, found, completions, samples, longest)
    continued = []
    for row in rows:
        assert len(row.starts) == samples and (row.length <= longest or len(row.responses) == 1)
        for branch, kept, key in row.starts:
            if kept:
                continued.append((row.responses[branch - 1][:kept], key))
        for a in row.responses:  # nothing is stored twice
            assert not any(a is not b and b[: len(a)] == a for b in row.responses)
    assert sorted(p for p, _ in continued) == sorted(p for p in found for _ in range(completions))
    assert len({key for _, key in continued}) == len(continued)


def test_a_completion_does_not_depend_on_the_other_prefixes():
    asked = Prompt(Query("q", (), ""), "", 10, 0)
    alone = prm.stems(asked, [(1, 2)], 2, 8, 50)[0].starts[:2]
    [row] = prm.stems(asked, [(0, 3), (1, 2), (1, 2, 3)], 2, 8, 50)
    starts = [
        start for start in row.starts if row.responses[start[0] - 1][: start[1]] == (1, 2) and start[1] == 2
    ]
    assert [key for *_, key in starts] == [key for *_, key in alone]
    with pytest.raises(ValueError, match="8 samples per row are not a multiple of 3"):
        prm.stems(asked, [(1,)], 3, 8, 50)


# ---- scores ------------------------------------------------------------------------------------------


def scored(model, rows, processor, texts, size=4, mesh=None):
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    plans = loader.plan_batches(rows, size, (64, 128, 256, 512))
    batches = loader.row_batches(plans, processor, size)
    return [values for batch in prm.scores(model, batches, mesh) for values in batch]


def test_sixteen_in_a_row_score_as_one_by_one(reward, processor, texts):
    rng = np.random.default_rng(0)
    lines = ["area", "base 4", "height", "The answer is 6", ""]
    found = ["\n".join(rng.choice(lines, int(rng.integers(1, 6)))) for _ in range(16)]
    found = [text for text in found if steps.split(text)]
    responses = [response(text, processor, i) for i, text in enumerate(found)]
    encode = processor.encode_response
    together = prm.row(prompt(processor), responses, encode, texts)
    [whole] = scored(reward, [together], processor, texts)
    alone = [prm.row(prompt(processor), [r], encode, texts) for r in responses]
    single = [values[0] for values in scored(reward, alone, processor, texts)]
    assert [len(s) for s in whole] == [len(steps.split(text)) for text in found]
    for one, other in zip(whole, single, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    spread = np.concatenate(whole)
    assert spread.std() > 0.05 and spread.min() > 1e-4 and spread.max() < 1 - 1e-4
    cube = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    [again] = scored(tiny.replicated(reward, cube), [together], processor, texts, mesh=cube)
    np.testing.assert_allclose(np.concatenate(again), spread, atol=1e-5)


def test_scores_that_are_not_finite_are_refused(reward, processor, texts):
    """Before they are stored: a ranking by them means nothing."""
    bad = jax.tree.map(lambda x: x * jnp.nan, reward)
    one = prm.row(prompt(processor), [response(LINES, processor)], processor.encode_response, texts)
    with pytest.raises(
        ValueError, match=r"query 'q': step scores \(nan, .*the reward model's logits are not"
    ):
        scored(bad, [one], processor, texts)


def test_the_score_is_head_and_likelihood(reward, processor, texts):
    """Against a plain computation from the trunk's own outputs, token by token."""
    one = response(LINES, processor)
    row = prm.row(prompt(processor), [one], processor.encode_response, texts)
    [[got]] = scored(reward, [row], processor, texts)
    batch = loader.encode_rows([row], processor, 64, 0)
    hidden = np.asarray(reward.trunk.hidden(batch))[0]
    logits = np.asarray(reward.trunk.logits(hidden), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    n, total, want = row.prompt.length, 0.0, []
    ends = [place for place, _ in row.labels[0]]
    for i, token in enumerate(one.tokens):
        total += max(logprobs[n + i - 1, token], -reward.FLOOR)
        if i in ends:
            z = hidden[n + i] @ np.asarray(reward.weight[...]) / np.sqrt(32) + float(reward.bias[...])
            want.append(1 / (1 + np.exp(-(z + float(reward.likelihood[...]) * total))))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_text_of_another_family_is_tokenised_again(processor, texts):
    foreign = dataclasses.replace(response(LINES, processor), tokens=(3, 1, 4, 1, 5))
    row = prm.row(prompt(processor), [foreign], processor.encode_response, texts)
    assert row.responses == (tuple(processor.encode_response(LINES)),)
    with pytest.raises(ValueError, match="query q, sample 0: 4 steps in the text, 4 in its tokens, 3 labels"):
        prm.row(prompt(processor), [foreign], processor.encode_response, texts, [(0.1, 0.2, 0.3)])


def test_unusual_line_breaks_are_noticed(processor, texts):
    """U+2003 is a blank line as text, but three byte tokens, none of which is blank."""
    text = "area\n\u2003\nbase"
    tokens = processor.encode_response(text)
    assert steps.split(text) == ["area", "base"]
    assert not prm.same_steps(text, tokens, texts) and prm.same_steps(
        LINES, processor.encode_response(LINES), texts
    )


# ---- training ----------------------------------------------------------------------------------------


def test_only_correct_responses_train_the_trunk(processor, texts):
    found = [response(LINES, processor, 0, "correct"), response("area", processor, 1)]
    row = prm.row(prompt(processor), found, processor.encode_response, texts, [(0.0, 0.5, 1.0, 1.0), (0.0,)])
    batch = loader.encode_rows([row], processor, 64, 0)
    first, second = batch.branch == 1, batch.branch == 2
    assert batch.loss_mask[first].all() and not batch.loss_mask[~first].any()
    assert batch.labels[first][batch.labels[first] >= 0].tolist() == [0.0, 0.5, 1.0, 1.0]
    assert batch.labels[second][batch.labels[second] >= 0].tolist() == [0.0]


def test_rows_are_split_with_their_labels(processor):
    asked = Prompt(Query("q", (), ""), "", 10, 0)
    row = Row(asked, ((1,) * 8, (2,) * 8, (3,) * 8), (1.0, 0.0, 1.0), (((7, 0.5),), ((7, 0.0),), ((7, 1.0),)))
    parts = loader.split_rows([row], 26)
    assert [p.responses for p in parts] == [row.responses[:2], row.responses[2:]]
    assert [p.weights for p in parts] == [(1.0, 0.0), (1.0,)]
    assert [p.labels for p in parts] == [row.labels[:2], row.labels[2:]]


@pytest.mark.parametrize("mc", [0.1, 0.2, 1.0])
@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_accuracy_is_the_share_of_steps_on_the_right_side(mc, mask):
    """Whatever the weight of the labels is, and whether or not there is a correct response."""
    branch = np.array([[0, 1, 1, 2, 2]], np.int32)
    labels = np.array([[-1, 0.75, 1.0, 0.25, 0.0]], np.float32)
    nothing = np.zeros_like(branch)
    batch = Batch(nothing, branch, (branch > 0) * np.float32(mask), nothing - 1, np.zeros((1, 0)), labels)
    for score, share in (([0, 2, 3, -1, -1], 1.0), ([0, 2, 3, 1, -1], 0.75), ([0, -2, -3, 1, 1], 0.0)):
        model = lambda *_, score=score: (jnp.float32([score]), jnp.zeros((1, 5)))  # noqa: E731
        _, extra = prm.make_loss(mc)(model, batch)
        assert float(extra["right"] / extra["counted"]) == share and extra["counted"] == 4
        assert float(extra["tokens"]) == pytest.approx(mc * 4 + mask * 4)
