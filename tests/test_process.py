"""VisualProcessBench: the official file, and the F1 scores against brute force."""

import itertools
import json
import random

import numpy as np
import pytest
from test_benchmarks import image

from mstar_jax.evaluate import process
from mstar_jax.evaluate.process import Solution, best, f1, measure, read
from mstar_jax.structs import Query


def solution(id, labels, source="MMMU"):
    return Solution(Query(str(id), (), "?", source=source), ("x",) * len(labels), tuple(labels), 0)


def row(steps, labels, **more):
    response = {"steps": steps, "process_correctness": labels}
    row = {"image": ["images/1.png"], "question": "How many?", "answer": "3", "response": response}
    return row | {"policy_model": "GPT-4o", "data_source": "MathVerse"} | more


def test_the_official_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(image())
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    rows = [row(["First,\n\n  so. ", "\n", "Then 3."], [1, 0, -1]), row(["a"], [1, 1]), row(["a"], [2])]
    rows += [row(["a"], [1], image=["images/2.png"]), row(["a"], [1], image=["../x.png"]), row([" "], [1])]
    rows += [row(["a\ud800"], [1])]  # no tokenizer takes it
    rows += [row(["a"], [1], question=""), row(["a"], [1], image=["images/1.png"] * 2), row([1], [1])]
    rows += [row(["a"], [1], response="a"), row(["a"], [1], image=["https://example.org/x.png"])]
    text = "".join(json.dumps(each) + "\n" for each in rows) + "{\n"
    (tmp_path / "test.jsonl").write_text(text)
    found, report = read(tmp_path, tmp_path / "cache")
    assert report.kept == len(found) == 3 and report.rows == 13
    causes = {
        "steps without labels": 2,
        "a step is no text, or its label is not 1, 0 or -1": 2,
        "no steps": 1,
    }
    causes |= {"undecodable image": 1, "image path leaves the root": 1, "no question": 1, "broken row": 1}
    assert report.dropped == causes | {"missing image": 1}
    first, cut, two = found
    assert cut.steps == ("a\ufffd",)
    assert (first.steps, first.labels, first.blank) == (("First, so.", "Then 3."), (1, -1), 1)
    assert first.query.source == "MathVerse" and len(first.query.images) == 1 and len(two.query.images) == 2
    assert first.query.id != two.query.id
    with pytest.raises(FileNotFoundError, match="looked for test.jsonl"):
        read(tmp_path / "images", tmp_path / "cache")


def by_hand(scores, right, threshold):
    """The mean of two F1 scores, each from precision and recall."""
    out = []
    for wanted in (True, False):
        held = [(score >= threshold) == wanted for score in scores]
        hits = sum(h and r == wanted for h, r in zip(held, right))
        precision, recall = hits / max(sum(held), 1), hits / max(sum(r == wanted for r in right), 1)
        out.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_f1_and_the_best_threshold(seed):
    rng = random.Random(seed)
    count = rng.randint(1, 40)
    right = [rng.random() < 0.7 for _ in range(count)]
    scores = [round(min(1, max(0, rng.gauss(0.6 if r else 0.4, 0.3))), rng.choice([1, 3])) for r in right]
    arrays = np.array(scores), np.array(right)
    found = f1(*arrays, 0.5)
    assert [found["right"], found["wrong"]] == pytest.approx(by_hand(scores, right, 0.5), rel=1e-12)
    assert found["macro"] == (found["right"] + found["wrong"]) / 2
    macros = {threshold: sum(by_hand(scores, right, threshold)) / 2 for threshold in scores}
    top = best(*arrays)
    assert top["macro"] == pytest.approx(max(macros.values()), rel=1e-12)
    assert top["threshold"] in macros and top == f1(*arrays, top["threshold"])


def test_all_steps_count_together_and_neutral_ones_not_at_all():
    labels = [(1, -1, 0), (1, 1), (-1,), (0,), (1, -1)]
    sources = ("MMMU", "MMMU", "WeMath", "WeMath", "WeMath")
    solutions = [solution(n, own, source) for n, (own, source) in enumerate(zip(labels, sources))]
    scores = {"0": (0.9, 0.6, 0.1), "1": (0.8, 0.3), "2": (0.2,), "3": (0.7,), "4": None}
    record = measure(solutions, scores)
    assert record["left_out"] == 1 and record["solutions"] == 5 and record["expected"] == 2866
    assert record["steps"] == {"right": 3, "wrong": 2, "neutral": 2, "blank": 0}
    flat, right = (0.9, 0.6, 0.8, 0.3, 0.2), (True, False, True, True, False)
    assert record["given"]["macro"] == pytest.approx(sum(by_hand(flat, right, 0.5)) / 2, rel=1e-12)
    wins = [(a > b) + (a == b) / 2 for a, b in itertools.product((0.9, 0.8, 0.3), (0.6, 0.2))]
    assert record["auc"] == pytest.approx(sum(wins) / 6)
    assert {name: part["steps"] for name, part in record["sources"].items()} == {"MMMU": 4, "WeMath": 1}
    assert record["sources"]["WeMath"]["given"] == {
        "threshold": 0.5,
        "macro": 0.5,
        "right": 0.0,
        "wrong": 1.0,
    }
    shown = process.table("rm", record).splitlines()
    assert shown[0].startswith("| VisualProcessBench, rm | steps |") and shown[2].startswith("| all | 5 |")
    assert json.loads(json.dumps(record)) == record
    with pytest.raises(ValueError, match="2 scores of 1 steps"):
        measure([solution(0, [1])], {"0": (0.5, 0.5)})
    with pytest.raises(ValueError, match="no step that is right or wrong was scored; 1 solutions left out"):
        measure([solution(0, [1])], {})
