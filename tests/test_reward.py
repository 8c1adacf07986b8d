"""How a run's reward selects: every strategy on responses made by hand."""

import dataclasses
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from mstar_jax.data.truth import Truth
from mstar_jax.stages.reward_model import Reward
from mstar_jax.structs import Prompt, Query, Response

QUERY = Query("q", (), "What is the total of all bars?", answer="6", answer_type="integer")
FAITHFUL = "Bars red 4 blue 2\nSum 4 + 2 = 6\nThe answer is 6"
LUCKY = "Bars red 5 blue 1\nSum 5 + 1 = 6\nThe answer is 6"
SHORT = "The answer is 6"
WRONG = "Bars red 4 blue 2\nSum 4 + 2 = 7\nThe answer is 7"
TRUTH = Truth(
    "q", "train", "total", (("red", 4), ("blue", 2)), (("Bars red 4 blue 2", "Sum 4 + 2 = 6"),), "6"
)
# text, verdict, scores of its steps
MADE = [
    (LUCKY, "correct", (0.3, 0.9, 0.9)),
    (LUCKY, "correct", (0.3, 0.9, 0.9)),
    (WRONG, "wrong", (0.9, 0.9, 0.9)),
    (FAITHFUL, "correct", (0.8, 0.7, 0.9)),
    (LUCKY, "correct", (0.3, 0.9, 0.9)),
    (SHORT, "correct", (0.5,)),
]
RESPONSES = [
    Response("q", i, text, (), 0.0, False, text.split()[-1], verdict, scores)
    for i, (text, verdict, scores) in enumerate(MADE)
]


def reward(**values):
    """A Reward whose reward model has scored already."""
    out = object.__new__(Reward)
    unlabelled = ConfigDict({"threshold": 0.3, "oracle": False})
    evolve = ConfigDict({"select": "prm", "keep": 2, "distinct": False, "unlabelled": unlabelled})
    evolve.threshold = None
    with evolve.ignore_type():
        evolve.update(values)
    config = ConfigDict({"evolve": evolve, "seed": 3})
    out.run = types.SimpleNamespace(config=config, data={"hidden": {"q": "6", "r": "1"}})
    out.values = ConfigDict({"aggregate": "min"})
    out.truth, out.exists = {"q": TRUTH}, True
    out.score = lambda name, queries, responses, **_: responses
    return out


def kept(**values):
    [found] = reward(**values).keep("iteration_01", [QUERY], {"q": RESPONSES})
    return [r.sample for r in found]


@pytest.mark.parametrize(
    ("values", "samples"),
    [
        ({}, [3, 5]),  # the least step of 3 is 0.7, of 5 0.5, of the lucky ones 0.3
        ({"keep": 1}, [3]),
        ({"keep": 4}, [0, 1, 3, 5]),  # ties: the earlier
        ({"keep": 0}, [0, 1, 3, 4, 5]),
        ({"keep": 0, "threshold": 0.4}, [3, 5]),
        ({"keep": 1, "threshold": 0.75}, []),
        ({"select": "frequency"}, [0, 1]),
        ({"select": "frequency", "distinct": True}, [0, 3]),
        ({"select": "oracle"}, [0, 3]),  # one is faithful; a tie among the others goes to the first
        ({"select": "oracle", "keep": 1}, [3]),
        ({"select": "random", "keep": 0}, [0, 1, 3, 4, 5]),
        ({"keep": 0, "distinct": True}, [0, 3, 5]),
    ],
)
def test_keep(values, samples):
    assert kept(**values) == samples


def test_by_lot():
    draws = {
        tuple(reward(select="random").keep(f"iteration_{t:02d}", [QUERY], {"q": RESPONSES})[0])
        for t in range(40)
    }
    assert len(draws) > 5 and all(len(d) == 2 and all(r.verdict == "correct" for r in d) for d in draws)
    assert kept(select="random") == kept(select="random")
    assert reward().keep("x", [QUERY], {}) == [[]]


def test_pseudo_labels():
    unlabelled = [dataclasses.replace(QUERY, answer=None), dataclasses.replace(QUERY, id="r", answer=None)]
    silent = [dataclasses.replace(r, query_id="r", answer=None, verdict=None) for r in RESPONSES]
    given = {"q": [dataclasses.replace(r, verdict=None) for r in RESPONSES], "r": silent}
    [query], judged, shares = reward().pseudo_label("x", unlabelled, given)
    assert (query.id, query.answer) == ("q", "6")
    assert [r.verdict for r in judged["q"]] == [
        "correct",
        "correct",
        "wrong",
        "correct",
        "correct",
        "correct",
    ]
    assert shares == {"pseudo_coverage": 0.5, "pseudo_precision": 1.0}
    strict = {"unlabelled": ConfigDict({"threshold": 0.9, "oracle": False})}
    assert reward(**strict).pseudo_label("x", unlabelled, given)[0] == []
    oracle = {"unlabelled": ConfigDict({"threshold": 0.3, "oracle": True})}
    queries, judged, shares = reward(**oracle).pseudo_label("x", unlabelled, given)
    assert [q.answer for q in queries] == ["6", "1"] and shares["pseudo_coverage"] == 1.0
    assert {r.verdict for r in judged["r"]} == {"wrong"}  # judged by the hidden answer


def test_against_truth():
    found = reward().against_truth({"q": RESPONSES})
    # steps: of the first, WRONG .9 and FAITHFUL .8 are right, LUCKY .3 is not; of the second, FAITHFUL .7 is,
    # LUCKY .9 and WRONG .9 are not
    assert found["step_auc"] == pytest.approx(2 / 4)
    assert found["all_right_auc"] == 1.0  # .7 against .3 and .5
    assert np.isfinite(list(found.values())).all()


@pytest.mark.parametrize(("labelled", "trained"), [(40, 20), (16, 12), (6, 5)])
def test_queries_of_the_reward_model(labelled, trained, tmp_path):
    """The warm-up's come last; few queries are used up, never refused, and never twice."""
    found = [dataclasses.replace(QUERY, id=f"q{i}") for i in range(labelled)]
    prm = {"queries": 20, "held_out": 5, "path": ""}
    config = {"prm": prm, "evolve": {"select": "prm"}, "warmup": {"queries": 12}, "data": {"labelled": "x"}}
    shared = {"labelled": found, "processor": None, "texts": (), "workdir": tmp_path}
    run = types.SimpleNamespace(config=ConfigDict(config), **shared)
    out = Reward(run)
    ids = [q.id for q in [*out.held_out, *out.queries]]
    assert len(out.queries) == trained and len(ids) == len(set(ids))
    fresh = [q.id for q in found[12:]]
    assert ids[: len(fresh)] == fresh[: len(ids)]


def test_long_prompts_make_longer_rows(monkeypatch):
    """A row is parted at prm.longest, unless a prompt alone needs more."""
    out = reward()
    out.values = ConfigDict({"longest": 40})
    encode = lambda text: list(range(len(text.split("\n")) * 5))  # noqa: E731  (five ids a line)
    processor, texts = types.SimpleNamespace(encode_response=encode), ["a"] * 4 + ["\n"] + ["b"] * 20
    out.scorer = types.SimpleNamespace(processor=processor, texts=texts)
    out.run.asked = lambda queries: [(q, q.question) for q in queries]
    labelled = {("q", r.sample): tuple(0.5 for _ in r.text.split("\n")) for r in RESPONSES}
    monkeypatch.setattr("mstar_jax.rewards.steps.ends", lambda ids, texts: list(range(4, len(ids), 5)))
    for length, parts in ((8, 2), (300, 4)):
        out.run.plan = lambda pairs, *_, n=length: [Prompt(q, text, n, 0) for q, text in pairs]
        rows = out._rows([QUERY], {"q": RESPONSES}, labelled)
        assert len(rows) == parts and sum(len(row.responses) for row in rows) == 4  # different ones
