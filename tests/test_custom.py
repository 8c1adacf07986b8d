"""Rewards of the user's: what they return counts, and whatever else they do costs one response."""

import dataclasses
import functools
import json
import logging
import pathlib
import re
import time
import types

import pytest
from ml_collections import ConfigDict

from mstar_jax.rewards import custom, selection
from mstar_jax.stages import generate, measure, reward_model
from mstar_jax.store import Store, line, read_rollout, rollout
from mstar_jax.structs import Prompt, Query, Response, Row, Stage

HERE = pathlib.Path(__file__).resolve().parent
FILE = HERE / "users_rewards.py"
QUERY = Query("q", ("/a.png",), "1 + 1?", ("1", "2"), "B", "choice", "s", None, "choice")
PLAIN = Query("q", (), "1 + 1?", answer="2", answer_type="integer")
DOCS = (HERE.parent / "docs" / "rewards.md").read_text()


def responses(*texts):
    return [Response("q", i, text, (1,), 0.0, False) for i, text in enumerate(texts)]


def outcomes(judge, *texts, query=PLAIN):
    return [(r.verdict, r.score) for r in judge(query, responses(*texts))]


@pytest.fixture(scope="module")
def any_of():
    return custom.Function(f"{FILE}:any_of", seconds=20)


GOOD = {
    "True": ("correct", 1.0),
    "False": ("wrong", 0.0),
    "correct": ("correct", 1.0),
    "wrong": ("wrong", 0.0),
    "unparsed": ("unparsed", 0.0),
    "0.5": ("correct", 0.5),
    "0.49": ("wrong", 0.49),
    "numpy": ("correct", 0.75),
    "numpy bool": ("correct", 1.0),
    "rounded up": ("correct", 1.0),
    "rounded down": ("wrong", 0.0),
    "spew": ("correct", 1.0),
    "jax": ("correct", 1.0),
}
BAD = {
    "nothing": "returned None, neither a bool, nor correct, wrong, unparsed, nor a number in 0..1",
    "7": "returned 7, neither",
    "1.001": "returned 1.001, neither",
    "nan": "returned nan, neither",
    "list": "returned [1.0], neither",
    "gold-unparsed": "returned 'gold-unparsed', neither",
    "odd": "RuntimeError: not even shown",
    "raise": "KeyError: 'no key'",
    "exit": "SystemExit",
    "interrupt": "it ended its process (exit code -10)",
    "end": "it ended its process (exit code 0)",
    "crash": "it ended its process (exit code -11)",
    "memory": "MemoryError",
    "fork": "it forks: start programs with subprocess, without preexec_fn, and fork nothing",
    "close": "it ended its process",  # its end of the pipe is closed, and then it is killed
    "deep": "RecursionError",
    "unknown": "KeyError: 'unknown'",
}


def test_what_is_returned(any_of):
    assert outcomes(any_of, *GOOD) == list(GOOD.values())


def test_what_fails_costs_its_response_alone(any_of, caplog):
    mixed = [text for bad in BAD for text in (bad, "True", "0.49")]
    with caplog.at_level(logging.WARNING):
        found = outcomes(any_of, *mixed)
    for bad, good, half in zip(found[::3], found[1::3], found[2::3], strict=True):
        assert (bad, good, half) == (("failed", 0.0), ("correct", 1.0), ("wrong", 0.49))
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == custom.SAID and "query 'q', sample" in logged[0]
    assert logged[-1].endswith("; further ones are only counted")


@pytest.mark.parametrize("text", BAD)
def test_the_cause_is_said(any_of, text):
    said = any_of.said(json.dumps([vars(PLAIN), text]))["error"]
    assert BAD[text] in said
    if "Error: " in said or "returned" not in said and "process" not in said and "forks" not in said:
        assert said.startswith("users_rewards.py, line "), said


def test_one_that_hangs_is_killed_with_what_it_started(tmp_path):
    function = custom.Function(f"{FILE}:leave_a_program", seconds=1)
    begun = time.monotonic()
    assert outcomes(function, str(tmp_path / "number")) == [("failed", 0.0)]
    assert time.monotonic() - begun < 20
    number = int((tmp_path / "number").read_text())
    state = pathlib.Path(f"/proc/{number}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":  # nobody may take note of its end
        assert time.monotonic() - begun < 60, f"process {number} lives on"
        time.sleep(0.05)


def test_a_late_one_is_replaced(caplog):
    function = custom.Function(f"{FILE}:any_of", seconds=2)
    assert outcomes(function, "hang", "True", "hang", "0.5") == [
        ("failed", 0.0),
        ("correct", 1.0),
        ("failed", 0.0),
        ("correct", 0.5),
    ]
    assert caplog.text.count("no answer within 2 s") == 2


def test_an_alarm_of_its_own_is_its_own():
    """A handler that the file sets when it is loaded is not taken away."""
    function = custom.Function(f"{FILE}:own_limit", seconds=20)
    assert outcomes(function, "0.01", "0.02") == [("correct", 0.5)] * 2


def test_a_thread_does_not_outlive_this_process():
    """As after a kill: nothing but the end of its input tells the worker."""
    function = custom.Function(f"{FILE}:leave_a_thread", seconds=20)
    assert outcomes(function, "") == [("correct", 1.0)]
    worker = function.idle.get()
    worker.process.stdin.close()
    assert worker.process.wait(timeout=60) == 0


def test_one_that_is_full_of_what_it_keeps_is_replaced(monkeypatch):
    monkeypatch.setattr(custom, "MEMORY", 3 << 30)  # room for less than ten calls
    function = custom.Function(f"{FILE}:keep", seconds=20)
    found = [outcomes(function, "")[0][0] for _ in range(20)]
    assert found[0] == "correct" and "failed" in found
    assert ("failed", "failed") not in zip(found, found[1:])


def test_what_it_is_shown():
    function = custom.Function(f"{FILE}:asked", seconds=20)
    [r] = function(QUERY, responses("The answer is (B) 2"))
    assert (r.verdict, r.score, r.answer) == ("correct", 1.0, "B")
    [r] = function(dataclasses.replace(QUERY, answer=None), responses("The answer is (B) 2"))
    assert (r.verdict, r.score) == (None, None) and r.answer is not None  # for the votes


def test_a_reward_that_always_fails_is_warned_of(any_of, caplog):
    any_of.asked = any_of.failed = 0
    with caplog.at_level(logging.WARNING):
        for _ in range(custom.SUSPECT):
            any_of(PLAIN, responses("nothing"))
    assert sum("FAILS FOR EACH of the first 64 responses" in r.getMessage() for r in caplog.records) == 1


def test_failures_are_counted_by_query():
    def group(query, *verdicts):
        return [Response(query, i, "", (1,), 0.0, False, verdict=v) for i, v in enumerate(verdicts)]

    groups = [group("a", "failed", "correct", "failed"), group("b", "wrong"), group("c", "failed")]
    assert custom.failures(groups) == {
        "responses": 5,
        "failed": 3,
        "queries": 2,
        "by_query": {"a": 2, "c": 1},
    }
    many = [group(str(n), "failed") for n in range(50)]
    assert custom.failures(many)["queries"] == 50 and len(custom.failures(many)["by_query"]) == custom.NAMED


WRONG = {
    "nothing.py:grade": "there is no file .*nothing.py to load the function 'grade' from",
    "exact": "choose 'format', leave it empty for the answer checker, or name a function",
    "reward.txt:grade": "choose 'format'",
    "users_rewards.py:": "choose 'format'",
    "users_rewards.py:missing": "has no function 'missing'; its functions are hang, fork, .*coin",
    "users_rewards.py:NO_FUNCTION": "has no function 'NO_FUNCTION'",
    "users_rewards.py:one_argument": r"does not take \(query, text\): too many positional arguments",
}


@pytest.mark.parametrize("reward", WRONG)
def test_what_cannot_be_loaded_is_refused(reward, monkeypatch):
    monkeypatch.chdir(HERE)
    with pytest.raises(ValueError, match=WRONG[reward]) as error:
        custom.grading(reward, 10.0)
    assert repr(reward) in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def grade(query, text:\n", "SyntaxError"),
        ("import no_such_package\n", "r.py, line 1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("import os\nos._exit(3)\n", r"it ended its process \(exit code 3\)"),
        ("import os\nos.fork()\ndef grade(query, text):\n    return 1\n", "it forks"),
    ],
)
def test_a_file_that_does_not_load_is_refused(tmp_path, text, said):
    (tmp_path / "r.py").write_text(text)
    with pytest.raises(ValueError, match=f"'grade' of .*r.py cannot be loaded: .*{said}"):
        custom.grading(f"{tmp_path}/r.py:grade", 10.0)


def test_a_file_that_changes_stops_the_run(tmp_path):
    path = tmp_path / "r.py"
    path.write_text("import os\n\n\ndef grade(query, text):\n    return text == 'x' or os._exit(1)\n")
    function = custom.Function(f"{path}:grade", 10.0)
    assert outcomes(function, "x") == [("correct", 1.0)]
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="cannot be loaded: the file has changed since the run began"):
        outcomes(function, "y")
    assert custom.grading(f"{path}:grade", 10.0).identity != {
        "reward": {"file": function.digest, "function": "grade"}
    }


def test_the_example_of_the_docs(tmp_path):
    [code] = re.findall(r"^```python\n# reward.py\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    (tmp_path / "reward.py").write_text(code)
    judge = custom.grading(f"{tmp_path}/reward.py:grade", 20.0).judge
    said = ["1 + 1 = 2\nThe answer is 2.", "The answer is 3", "It is 2", "so " * 200 + "The answer is 2"]
    assert outcomes(judge, *said) == [("correct", 1.0), ("wrong", 0.0), ("unparsed", 0.0), ("correct", 0.5)]


@pytest.mark.parametrize(
    ("text", "verdict", "answer"),
    [
        ("<think>1 + 1 = 2</think><answer>2</answer>", "correct", "2"),
        ("\n<think>\n1 + 1 = 2\n</think>\n\n<answer> 2 </answer>\n", "correct", "2"),
        ("<think></think><answer>The answer is 2.</answer>", "correct", "2"),
        ("<think>1 + 1 = 2</think><answer>3</answer>", "wrong", "3"),
        ("<think>1 + 1 = 2</think><answer></answer>", "unparsed", None),
        ("The answer is 2", "wrong", None),
        ("<answer>2</answer>", "wrong", None),
        ("<think>1 + 1 = 2</think> So <answer>2</answer>", "wrong", None),
        ("<think>1 + 1 = 2</think><answer>2</answer>.", "wrong", None),
        ("<think>1 + 1 = 2<answer>2</answer></think><answer>2</answer>", "wrong", None),
        ("<think>a</think><think>b</think><answer>2</answer>", "wrong", None),
        ("<think>a</think><answer>3</answer><answer>2</answer>", "wrong", None),
        ("<answer>2</answer><think>1 + 1 = 2</think>", "wrong", None),
        ("<think>1 + 1 = 2</think><answer>2", "wrong", None),
        ("<Think>1 + 1 = 2</Think><answer>2</answer>", "wrong", None),
        ("", "wrong", None),
    ],
)
def test_exact_format(text, verdict, answer):
    [found] = custom.grading("format", 1.0).judge(PLAIN, responses(text))
    assert (found.text, found.verdict, found.answer, found.score) == (text, verdict, answer, None)
    [found] = custom.grading("format", 1.0).judge(dataclasses.replace(PLAIN, answer=None), responses(text))
    assert (found.verdict, found.answer) == (None, answer)


def test_the_answer_checker_is_the_default():
    found = custom.grading("", 1.0)
    assert found.identity == {} and found.judge is selection.judge_all
    assert outcomes(found.judge, "The answer is 2", "The answer is 3") == [("correct", None), ("wrong", None)]


def test_reward_of_a_response():
    def reward(**values):
        return selection.outcome(dataclasses.replace(responses("")[0], **values))

    assert [reward(verdict=v) for v in ("correct", "wrong", "unparsed", None)] == [1.0, 0.0, 0.0, 0.0]
    assert reward(verdict="wrong", score=0.25) == 0.25
    assert (
        reward(verdict="correct", score=0.75, truncated=True)
        == reward(verdict="correct", truncated=True)
        == 0
    )


def test_only_a_score_that_is_there_is_stored():
    plain, scored = responses("a")[0], dataclasses.replace(responses("b")[0], score=0.5)
    record = json.loads(line(rollout(PLAIN, [plain, scored])))
    assert ["score" in each for each in record["responses"]] == [False, True]
    assert [r.score for r in read_rollout(record)[1]] == [None, 0.5]


# ---- in the stages ------------------------------------------------------------------------------------


def test_failed_completions_are_counted(any_of):
    """Of three completions of a step two fail and one is right; the other step's are as they should be."""
    texts = ["raise", "nothing", "True", "False", "True", "correct"]
    row = Row(Prompt(PLAIN, "1 + 1?", 4, 0), ((5, 6, 7),), starts=tuple((1, 1 + n // 3, n) for n in range(6)))
    run = types.SimpleNamespace(
        prm=ConfigDict({"completions": 3}),
        grading=custom.Grading(any_of, {}),
        processor=types.SimpleNamespace(decode=lambda tokens: f"{len(tokens)} tokens"),
    )
    record = reward_model.label_record(run, row, responses(*texts))
    assert record["steps"] == [
        {"text": "1 tokens", "reached": 1, "of": 3, "tokens": [5], "failed": 2},
        {"text": "2 tokens", "reached": 2, "of": 3, "tokens": [5, 6]},
    ]


def test_failures_of_a_stage(tmp_path, caplog):
    """In its record, by kind and query; in capitals where a stage's reward failed for all."""
    run = types.SimpleNamespace(config=ConfigDict({"reward": "own.py:grade"}), workdir=tmp_path)
    stage = Stage.iteration(2)
    sampled, measured = (
        [dataclasses.replace(r, verdict=v) for r in responses("a", "b")] for v in ("failed", "wrong")
    )
    folder = Store(tmp_path / "rollouts" / stage.name, {})
    folder.write(0, [line(rollout(PLAIN, sampled))], lambda number: "")
    counted = functools.partial(measure.counted, run, stage, "validation", [measured])
    assert generate.failures(run, stage, counted) == {
        "reward_failed": {"sampled": {"responses": 2, "failed": 2, "queries": 1, "by_query": {"q": 2}}}
    }
    assert "iteration_02: reward own.py:grade FAILED FOR EVERY ONE of its 2 responses" in caplog.text
    counted = functools.partial(measure.counted, run, stage, "test", [measured])
    assert generate.failures(run, stage, counted) == {}
    run.config.reward = ""
    assert generate.failures(run, stage, lambda: pytest.fail("nothing is counted")) == {}
