"""The reward model: step ends, continued prefixes, and equal scores of responses in one row and alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import POLICY, close
from hypothesis import given, settings
from hypothesis import strategies as st

from mstar_jax import sharding
from mstar_jax.data import loader
from mstar_jax.inference import draw
from mstar_jax.models import vlm
from mstar_jax.models.processor import Opened
from mstar_jax.models.tokenizer import literal, token_id
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
def encode(processor, texts):
    return prm.as_written(processor, texts)


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


def scored(model, rows, processor, size=4, mesh=None):
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    plans = loader.plan_batches(rows, size, (64, 128, 256, 512))
    batches = loader.row_batches(plans, processor, size)
    return [values for batch in prm.scores(model, batches, mesh) for values in batch]


def test_sixteen_in_a_row_score_as_one_by_one(reward, processor, encode):
    rng = np.random.default_rng(0)
    lines = ["area", "base 4", "height", "The answer is 6", ""]
    found = ["\n".join(rng.choice(lines, int(rng.integers(1, 6)))) for _ in range(16)]
    found = [text for text in found if steps.split(text)]
    responses = [response(text, processor, i) for i, text in enumerate(found)]
    together = prm.row(prompt(processor), responses, encode)
    [whole] = scored(reward, [together], processor)
    alone = [prm.row(prompt(processor), [r], encode) for r in responses]
    single = [values[0] for values in scored(reward, alone, processor)]
    assert [len(s) for s in whole] == [len(steps.split(text)) for text in found]
    for one, other in zip(whole, single, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    spread = np.concatenate(whole)
    assert spread.std() > 0.05 and spread.min() > 1e-4 and spread.max() < 1 - 1e-4
    cube = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    [again] = scored(tiny.replicated(reward, cube), [together], processor, mesh=cube)
    np.testing.assert_allclose(np.concatenate(again), spread, atol=1e-5)


def test_scores_that_are_not_finite_are_refused(reward, processor, encode):
    """Before they are stored: a ranking by them means nothing."""
    bad = jax.tree.map(lambda x: x * jnp.nan, reward)
    one = prm.row(prompt(processor), [response(LINES, processor)], encode)
    with pytest.raises(
        ValueError, match=r"query 'q': step scores \(nan, .*the reward model's logits are not"
    ):
        scored(bad, [one], processor)


def test_the_score_is_head_and_likelihood(reward, processor, encode):
    """Against a plain computation from the trunk's own outputs, token by token."""
    one = response(LINES, processor)
    row = prm.row(prompt(processor), [one], encode)
    [[got]] = scored(reward, [row], processor)
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


def test_a_text_of_another_family_is_tokenised_again(processor, encode):
    foreign = dataclasses.replace(response(LINES, processor), tokens=(3, 1, 4, 1, 5))
    row = prm.row(prompt(processor), [foreign], encode)
    assert row.responses == (tuple(processor.encode_response(LINES)),)
    with pytest.raises(ValueError, match="query q, sample 0: 4 steps in the text, 4 in its tokens, 3 labels"):
        prm.row(prompt(processor), [foreign], encode, [(0.1, 0.2, 0.3)])


def test_unusual_line_breaks_are_noticed(encode):
    """U+2003 is a blank line as text, but three byte tokens, none of which is blank."""
    text = "area\n\u2003\nbase"
    assert steps.split(text) == ["area", "base"]
    assert not prm.same_steps(text, encode(text)) and prm.same_steps(LINES, encode(LINES))


# ---- scores by a token -------------------------------------------------------------------------------

MARK, BETWEEN = "<|end|>\n<|assistant|>", "+<|end|>\n<|user|>\n"  # a conversation with a step in each turn


def conversation(processor):
    """Encodes steps as turns of a conversation."""
    return prm.marked(processor, *(literal(processor.tokenizer, text) for text in (MARK, BETWEEN)))


def test_a_mark_follows_each_step(processor):
    end, assistant = (token_id(processor.tokenizer, token) for token in ("<|end|>", "<|assistant|>"))
    tokens, ends = conversation(processor)("area <|end|>\n\n height 4 ")
    parts = np.split(np.array(tokens), np.array(ends) + 1)
    assert [processor.tokenizer.decode(part) for part in parts[:2]] == [
        "area < |end|><|end|>\n<|assistant|>",  # what a response writes is no control token
        "+<|end|>\n<|user|>\nheight 4<|end|>\n<|assistant|>",
    ]
    assert not parts[2].size and tokens.count(end) == 3 and tokens.count(assistant) == 2
    tokens, ends = prm.marked(processor, (), literal(processor.tokenizer, "\n"))(LINES)
    assert tokens == processor.encode_response("area\nbase\nheight 4\nThe answer is 6")[:-1]
    assert [processor.decode(tokens[: at + 1]).count("\n") for at in ends] == [0, 1, 2, 3]
    assert conversation(processor)(" \n") == ([], [])


def test_a_token_is_one_of_the_vocabulary(processor):
    words = processor.tokenizer
    assert processor.decode([token_id(words, "+")]) == "+"
    assert token_id(words, "\u0120") == token_id(words, " ")  # as the vocabulary writes a space
    with pytest.raises(
        ValueError, match=r"'\+-' is not one token of this vocabulary: its ids are \[\d+, \d+\]"
    ):
        token_id(words, "+-")


@pytest.mark.parametrize("against", ["-", ""])
def test_a_token_scores_as_in_sequences_of_their_own(processor, against, monkeypatch):
    """Responses that share a row, one of them empty, against the softmax of a plain sequence for each."""
    monkeypatch.setattr(vlm, "PIECE", 24)  # pieces with scores, and pieces without any
    policy = tiny.model(tiny.config(original_max_position=256))
    pair = [token_id(processor.tokenizer, token) for token in ("+", against) if token]
    opened, encode = Opened(processor), conversation(processor)
    found = [
        response(text, processor, i) for i, text in enumerate((LINES, "", "area", "base\nThe answer is 4"))
    ]
    [got] = scored(vlm.TokenRewardModel(policy, *pair), [prm.row(prompt(opened), found, encode)], opened)
    start = opened.prefix("area?", []).tokens
    assert processor.tokenizer.decode(start).endswith("<|user|>\narea?")
    assert [len(values) for values in got] == [4, 0, 1, 2]
    for one, values in zip(found, got, strict=True):
        if not values:
            continue
        tokens, ends = encode(one.text)
        whole = np.zeros(128, np.int32)  # what follows the sequence changes nothing
        whole[: len(start) + len(tokens)] = [*start, *tokens]
        logits = np.asarray(tiny.raw_logits(policy, whole)[0], np.float64)[np.add(ends, len(start))]
        good = logits[:, pair[0]]
        others = logits[:, pair[1:]] if against else np.delete(logits, pair[0], axis=1)
        want = good - np.log(np.exp(others).sum(axis=1))
        odds = np.log(values) - np.log1p(-np.array(values))
        close(odds, want, POLICY, scale=np.abs(logits).max())
    assert np.concatenate(got).std() > 1e-3


def test_a_certain_token_has_finite_odds():
    """In float32 its probability is 1."""

    class Certain:
        def judged(self, batch, remat):
            return None, None

        def token_logprobs(self, hidden, tokens, wanted):
            return jnp.zeros(tokens.shape), None

    ids = np.ones((1, 2), np.int32)
    score, _ = vlm.TokenRewardModel(Certain(), 3)(Batch(ids, ids, None, None, None, np.zeros((1, 2))))
    np.testing.assert_allclose(score, 24 * np.log(2), rtol=1e-6)


# ---- training ----------------------------------------------------------------------------------------


def test_only_correct_responses_train_the_trunk(processor, encode):
    found = [response(LINES, processor, 0, "correct"), response("area", processor, 1)]
    row = prm.row(prompt(processor), found, encode, [(0.0, 0.5, 1.0, 1.0), (0.0,)])
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
