"""How responses are selected: every strategy on responses made by hand; and the reward model's data."""

import dataclasses
import shutil
import types

import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

from mstar_jax.data.truth import Truth
from mstar_jax.inference.generate import Asked
from mstar_jax.rewards.custom import Grading
from mstar_jax.rewards.selection import judge_all
from mstar_jax.stages.reward_model import against_truth, auc_text, labelled_rows, reward_queries
from mstar_jax.stages.select import draw, keep, pseudo_label, select, select_rationales, select_unlabelled
from mstar_jax.structs import Prompt, Query, Response, Source, Stage

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


SETTINGS = {"select": "prm", "keep": 2, "distinct": False, "threshold": None}


def kept(name="iteration_01", responses=RESPONSES, **values):
    found = keep(
        QUERY,
        responses,
        settings=ConfigDict(SETTINGS | values),
        aggregate="min",
        draw=draw(3, name, QUERY),
        known=TRUTH,
    )
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


def test_random_selection_depends_on_the_pass_and_the_query():
    draws = {tuple(kept(f"iteration_{t:02d}", select="random")) for t in range(40)}
    right = {r.sample for r in RESPONSES if r.verdict == "correct"}
    assert len(draws) > 5 and all(len(d) == 2 and set(d) <= right for d in draws)
    assert kept(select="random") == kept(select="random")
    assert kept(responses=[]) == []


def test_what_became_of_responses_of_which_none_is_kept(monkeypatch):
    """With the rationales and the selection alike: by cause, and queries that were not asked."""
    monkeypatch.setattr("mstar_jax.stages.select.ask", lambda queries, _: queries)
    monkeypatch.setattr("mstar_jax.stages.select.training_rows", lambda run, asked, ids: list(ids))
    verdicts = ["wrong", "wrong", "unparsed", "gold-unparsed", "correct"]
    found = [dataclasses.replace(RESPONSES[0], sample=i, verdict=v) for i, v in enumerate(verdicts)]
    found[-1] = dataclasses.replace(found[-1], truncated=True)
    config = {
        "evolve": SETTINGS,
        "warmup": {"keep": 1, "data": ""},
        "prm": {"aggregate": "min"},
        "prompts": {"cot": ""},
    }
    run = types.SimpleNamespace(config=ConfigDict(config), seed=0, truth={})
    queries = [QUERY, dataclasses.replace(QUERY, id="long")]
    want = {"wrong": 2, "unparsed": 1, "gold-unparsed": 1, "truncated": 1, "unanswered": 1}
    for source in (
        select_rationales(run, queries, {"q": found}),
        select(run, Stage.iteration(1), None, queries, {"q": found}),
    ):
        assert not source.rows and source.notes == {"dropped": want}
    kept = select_rationales(run, queries, {"q": RESPONSES})
    assert kept.rows and kept.notes == {}


def labels(queries, responses, **values):
    settings = ConfigDict({"threshold": 0.3, "oracle": False} | values)
    hidden = {"q": "6", "r": "1"}
    return pseudo_label(queries, responses, hidden=hidden, settings=settings, aggregate="min")


def test_pseudo_labels():
    unlabelled = [dataclasses.replace(QUERY, answer=None), dataclasses.replace(QUERY, id="r", answer=None)]
    silent = [dataclasses.replace(r, query_id="r", answer=None, verdict=None) for r in RESPONSES]
    given = {"q": [dataclasses.replace(r, verdict=None) for r in RESPONSES], "r": silent}
    [query], notes = labels(unlabelled, given)
    assert (query.id, query.answer) == ("q", "6")
    assert notes == {"pseudo_coverage": 0.5, "pseudo_precision": 1.0}
    assert labels(unlabelled, given, threshold=0.9)[0] == []
    queries, notes = labels(unlabelled, given, oracle=True)
    assert [q.answer for q in queries] == ["6", "1"] and notes["pseudo_coverage"] == 1.0


def test_pseudo_labelled_queries_are_judged_by_their_own_answers(monkeypatch):
    """By the voted answer, or as here by the hidden one; the selection is then that of labelled queries."""
    judged = {}

    def selected(run, stage, reward, queries, responses, *, part):
        judged.update(responses)
        return Source([])

    monkeypatch.setattr("mstar_jax.stages.select.select", selected)
    settings = {"threshold": 0.3, "oracle": True, "weight": 0.5}
    config = ConfigDict({"reward": "", "evolve": {"unlabelled": settings}, "prm": {"aggregate": "min"}})
    grading = Grading(judge_all, {})
    run = types.SimpleNamespace(config=config, hidden={"q": "7"}, grading=grading)
    query = dataclasses.replace(QUERY, answer=None)
    given = {"q": [dataclasses.replace(r, verdict=None) for r in RESPONSES]}
    found = select_unlabelled(run, Stage.iteration(1), None, [query], given, part="unlabelled")
    assert found.weight == 0.5 and found.notes == {"pseudo_coverage": 1.0, "pseudo_precision": 1.0}
    assert [r.sample for r in judged["q"] if r.verdict == "correct"] == [2]


def test_against_truth():
    found = against_truth({"q": RESPONSES}, {"q": TRUTH}, "min")
    # steps: of the first, WRONG .9 and FAITHFUL .8 are right, LUCKY .3 is not; of the second, FAITHFUL .7 is,
    # LUCKY .9 and WRONG .9 are not
    assert found["step_auc"] == pytest.approx(2 / 4)
    assert found["all_right_auc"] == 1.0  # .7 against .3 and .5
    assert np.isfinite(list(found.values())).all()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"label_auc_within": 0.25}, "labels 0.250"),
        (
            {"label_auc_within": 0.25, "truth": {"step_auc": 0.5, "all_right_auc": None}},
            "labels 0.250, step_auc 0.500",
        ),
        (
            {"n": 0, "responses": 0, "steps": 0},
            "labels none (no query is held out; see prm.held_out, and how many",
        ),
        ({"steps": 0}, "labels none (no step of their 8 responses has a score)"),
        ({}, "labels none (of their 20 steps no two of one query and number differ in being right)"),
        ({"truth": {"step_auc": 0.5}}, "differ in being right), step_auc 0.500"),
    ],
)
def test_why_there_is_no_auc_is_said(values, text):
    assert text in auc_text({"n": 2, "responses": 8, "steps": 20, "label_auc_within": None} | values)


@pytest.mark.parametrize(("labelled", "trained"), [(40, 20), (16, 12), (6, 5)])
def test_queries_of_the_reward_model(labelled, trained):
    """The warm-up's come last; few queries are used up, never refused, and never twice."""
    found = [dataclasses.replace(QUERY, id=f"q{i}", question=f"{i}?") for i in range(labelled)]
    config = ConfigDict({"prm": {"queries": 20, "held_out": 5}, "warmup": {"queries": 12}})
    out = reward_queries(types.SimpleNamespace(config=config, labelled=found, rationales=()))
    ids = [q.id for q in [*out.held_out, *out.trained]]
    assert len(out.trained) == trained and len(ids) == len(set(ids))
    fresh = [q.id for q in found[12:]]
    assert ids[: len(fresh)] == fresh[: len(ids)]


def test_no_image_is_both_held_out_and_trained_on(tmp_path):
    """The reward model would know it: what is held out would look easier than it is."""
    for name in "ab":
        PIL.Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    shown = ("a", "b", "copy", "a", "b", "b")
    found = [
        dataclasses.replace(QUERY, id=f"q{at}", images=(str(tmp_path / f"{name}.png"),))
        for at, name in enumerate(shown)
    ]
    config = ConfigDict({"prm": {"queries": 2, "held_out": 1}, "warmup": {"queries": 0}})
    out = reward_queries(types.SimpleNamespace(config=config, labelled=found, rationales=()))
    assert [q.id for q in out.held_out] == ["q0"] and [q.id for q in out.trained] == ["q1", "q4"]


@pytest.mark.parametrize(("shown", "held_out", "seen"), [
    ("abaccbab", ["q3", "q4"], 0),  # a and b are the warm-up's
    ("abaacbab", ["q4", "q2"], 1),
    ("abaabbab", ["q2", "q3"], 2),
])  # fmt: skip
def test_what_the_warm_up_has_seen_is_held_out_last(tmp_path, caplog, shown, held_out, seen):
    """First queries of which it knows nothing, then others about an image that it knows."""
    for name, colour in {"a": "red", "b": "blue", "c": "green"}.items():
        PIL.Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    images = [(str(tmp_path / f"{name}.png"),) for name in shown]
    found = [dataclasses.replace(QUERY, id=f"q{at}", images=image) for at, image in enumerate(images)]
    config = ConfigDict({"prm": {"queries": 1, "held_out": 2}, "warmup": {"queries": 2}})
    with caplog.at_level("INFO", logger="mstar_jax"):
        out = reward_queries(types.SimpleNamespace(config=config, labelled=found, rationales=()))
    assert [q.id for q in out.held_out] == held_out
    told = f"prm: {seen} of 2 held-out queries show what the warm-up trained on"
    assert told in caplog.text if seen else "held-out" not in caplog.text


def test_each_source_keeps_its_share_of_the_held_out(tmp_path):
    """Of a source whose images have many questions, few are new to the warm-up."""
    found = []
    for at in range(400):  # shuffled: every other query is of each source
        source, image = ("one", at) if at % 2 else ("many", at // 2 % 40)
        path = tmp_path / f"{source}_{image}.txt"
        path.write_text(path.name)
        query = dataclasses.replace(QUERY, id=f"q{at}", images=(str(path),), source=source)
        found.append(query)
    config = ConfigDict({"prm": {"queries": 100, "held_out": 40}, "warmup": {"queries": 160}})
    out = reward_queries(types.SimpleNamespace(config=config, labelled=found, rationales=()))
    assert [sum(q.source == name for q in out.held_out) for name in ("one", "many")] == [20, 20]
    assert {q.source for q in out.trained[:40]} == {"one", "many"}
    shown = {image for query in out.held_out for image in query.images}
    assert not any(shown & set(query.images) for query in out.trained)
    known = {query.id for query in found[:160]}
    assert not any(query.id in known for query in [*out.held_out, *out.trained])


def test_long_prompts_make_longer_rows(monkeypatch, caplog):
    """A row is split at prm.longest, unless a prompt alone needs more."""
    encode = lambda text: list(range(len(text.split("\n")) * 5))  # noqa: E731  (five ids a line)
    host = types.SimpleNamespace(
        prm=ConfigDict({"longest": 40}),
        data=ConfigDict({"buckets": (20, 320)}),
        processor=types.SimpleNamespace(encode_response=encode),
        texts=["a"] * 4 + ["\n"] + ["b"] * 20,
    )
    labelled = {("q", r.sample): tuple(0.5 for _ in r.text.split("\n")) for r in RESPONSES}
    monkeypatch.setattr("mstar_jax.rewards.steps.ends", lambda ids, texts: list(range(4, len(ids), 5)))
    asked = [Asked(QUERY, "total?"), Asked(dataclasses.replace(QUERY, id="r"), "total?")]
    for length, parts in ((8, 2), (300, 4)):
        planned = [Prompt(QUERY, "total?", length, 0), None]  # the second prompt does not fit
        monkeypatch.setattr("mstar_jax.stages.reward_model.plan", lambda *_, planned=planned: planned)
        rows = labelled_rows(host, asked, {"q": RESPONSES}, labelled)
        assert len(rows) == parts and sum(len(row.responses) for row in rows) == 4  # different ones
    planned = [Prompt(QUERY, "total?", 308, 0)]  # room for 12 tokens: two lines, and three are left out
    monkeypatch.setattr("mstar_jax.stages.reward_model.plan", lambda *_: planned)
    rows = labelled_rows(host, asked[:1], {"q": RESPONSES}, labelled)
    assert [len(tokens) for row in rows for tokens in row.responses] == [5]
    assert "prm: 3 responses left out: with their prompt over 320 tokens" in caplog.text
