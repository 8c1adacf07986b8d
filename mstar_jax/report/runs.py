"""What can be read from the workdirs of runs: records, stored responses, and the numbers behind Figure 2.

Only files are read. What a run does not have raises `Missing`, with one sentence that says why.
"""

import collections
import dataclasses
import json
import math
import operator
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import scipy.stats

from mstar_jax.answers import check
from mstar_jax.data import truth
from mstar_jax.rewards import metrics, selection
from mstar_jax.store import read_rollout
from mstar_jax.structs import Response

Record = dict[str, Any]  # a JSON object as it was read: nothing in it can be relied on
Pair = tuple[list[Response], list[Response]]  # a query's correct responses: the Top-2, and the rest


class Missing(Exception):
    """Why a run cannot show something."""


class Mean(NamedTuple):
    """A mean over queries and its standard error."""

    value: float
    error: float


# ---- 1. records ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A workdir and the content of its results.json."""

    name: str
    workdir: pathlib.Path
    results: Record

    def config(self, path: str) -> object:
        """A config value by its dotted name; None if there is none."""
        found: object = self.results.get("config")
        for name in path.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        return found

    @property
    def aggregate(self) -> str:
        """How the reward of this run is computed from step scores."""
        return str(self.config("prm.aggregate") or "min")

    def records(self, split: str) -> list[Record]:
        """The dynamics on a split, in the order of the stages."""
        found = [r for r in self.results["stages"] if r.get("split") == split and place(r) is not None]
        return sorted(found, key=lambda r: place(r) or 0)

    def record(self, stage: str) -> Record:
        """The last record of a stage such as `prm`."""
        found = [r for r in self.results["stages"] if r.get("stage") == stage]
        if not found:
            raise Missing(f"results.json has no record of the stage {stage!r}")
        return found[-1]

    def series(self, split: str, key: str) -> list[tuple[int, float, int]]:
        """(place, value, number of queries) of every record that has the value."""
        rows = [(place(r) or 0, number(r, key), r.get("n")) for r in self.records(split)]
        return [(x, y, n if isinstance(n, int) else 0) for x, y, n in rows if y is not None]


def read_runs(workdirs: Sequence[pathlib.Path], names: Sequence[str] = ()) -> list[RunRecord]:
    """Reads the runs. Without names they are named after their folders.

    Raises:
      ValueError: a workdir has no readable results.json, or the numbers of names and workdirs differ.
    """
    if names and len(names) != len(workdirs):
        raise ValueError(f"{len(names)} names for {len(workdirs)} workdirs")
    runs: list[RunRecord] = []
    for index, workdir in enumerate(workdirs):
        path = workdir / "results.json"
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            found = results["stages"]
            results["stages"] = [r for r in found if isinstance(r, dict)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{workdir} is not a readable run: {path.name}: {error!r}") from error
        name = names[index] if names else workdir.absolute().name
        if any(run.name == name for run in runs):
            name = f"{name} ({index + 1})"
        runs.append(RunRecord(name, workdir, results))
    return runs


def place(record: Record) -> int | None:
    """The position of a record in its run: base -1, warm-up 0, iteration t at t; None for other stages."""
    stage = record.get("stage")
    if stage == "iteration":
        iteration = record.get("iteration")
        return iteration if isinstance(iteration, int) else None
    return {"base": -1, "warmup": 0}.get(str(stage))


def title(at: float) -> str:
    """The axis label of a place."""
    return {-1: "base", 0: "warm-up"}.get(int(at), f"{at:g}")


def number(record: Record, key: str) -> float | None:
    """A number of a record; None if it is absent, not a number, or not finite."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


# ---- 2. stored responses ------------------------------------------------------------------------------


def lines(folder: pathlib.Path) -> Iterator[Record]:
    """The records of a rollout store, one by one, as they are stored."""
    for path in sorted(path for path in folder.glob("*.jsonl") if path.stem.isdigit()):  # no copy of a shard
        with open(path, encoding="utf-8", newline="\n") as file:
            for count, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                    record["query"], record["responses"]
                except (ValueError, KeyError, TypeError) as error:
                    raise Missing(f"{path.name} of {folder.name}, line {count}, cannot be read") from error
                yield record


@dataclasses.dataclass(frozen=True)
class Scored:
    """Responses with step scores: for each query its greedy response and its samples at one temperature."""

    folder: pathlib.Path
    temperature: float
    groups: list[list[Response]]

    def questions(self) -> dict[str, str]:
        """The questions by query id."""
        return {r["query"]: str(r.get("question", "")) for r in lines(self.folder)}


def scored(run: RunRecord) -> Scored:
    """The responses of the latest stage that the reward model scored; validation before test."""
    stages = {place(r): r for split in ("validation", "test") for r in run.records(split)}
    for at in sorted((at for at in stages if at is not None), reverse=True):
        for split in ("validation", "test"):
            name = {-1: "base", 0: "warmup"}.get(at, f"iteration_{at:02d}") + f"_{split}"
            folder = run.workdir / "scores" / name
            responses = [read_rollout(record)[1] for record in lines(folder)]
            temperature, groups = _at_one_temperature(run, responses)
            if any(r.step_scores for group in groups for r in group):
                return Scored(folder, temperature, groups)
    raise Missing("no reward model has scored validation or test responses in this run")


def _at_one_temperature(run: RunRecord, groups: list[list[Response]]) -> tuple[float, list[list[Response]]]:
    """The greedy responses and the samples at the evaluation's temperature, or else at the most frequent."""
    counts = collections.Counter(r.temperature for group in groups for r in group if r.temperature > 0)
    usual = run.config("eval.temperature")
    chosen = max(counts, key=lambda t: (t == usual, counts[t]), default=0.0)
    return chosen, [[r for r in group if r.temperature in (0, chosen)] for group in groups]


# ---- 3. Figure 2 --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curve:
    """Accuracy against the number of rollouts (Figure 2a).

    Attributes:
      n: the numbers of rollouts.
      accuracy: greedy, best_of_n, majority and weighted_vote, each for every n; greedy may be empty.
    """

    n: list[int]
    accuracy: dict[str, list[float]]


def rollouts_curve(groups: Sequence[Sequence[Response]], ns: Sequence[int], aggregate: str) -> Curve:
    """Accuracy against the number of rollouts, by the stored verdicts, for those ns that every query has.

    `metrics.curve` judges by the queries themselves, but the store has neither their options nor their types.
    """
    least = min((sum(r.temperature > 0 for r in group) for group in groups), default=0)
    ns = [n for n in ns if n <= least]
    greedy = [selection.is_correct(r) for group in groups for r in group if r.temperature == 0]
    hits: dict[str, list[list[bool]]] = {name: [] for name in ("best_of_n", "majority", "weighted_vote")}
    for group in groups:
        samples = _same_answers([r for r in group if r.temperature > 0])
        rewards = [selection.reward(r, aggregate) for r in samples]
        right = [selection.is_correct(r) for r in samples]
        good = {r.answer for r in samples if r.verdict == "correct"}
        hits["best_of_n"].append([metrics.best_of_n(rewards[:n], right[:n]) for n in ns])
        for name, weights in (("majority", [1.0] * len(samples)), ("weighted_vote", rewards)):
            won = [selection.vote(samples[:n], weights[:n], operator.eq) for n in ns]
            hits[name].append([vote is not None and vote.answer in good for vote in won])
    accuracy = {"greedy": [mean(greedy).value] * len(ns) if greedy else []}
    accuracy |= {name: [mean(column).value for column in zip(*rows)] for name, rows in hits.items()}
    return Curve(ns, accuracy)


def _same_answers(responses: Sequence[Response]) -> list[Response]:
    """The responses with one spelling for each answer: all correct ones agree, wrong ones by value."""
    spelling: dict[tuple[str, str | None], str] = {}
    out = []
    for r in responses:
        if r.answer is not None and (r.answer, r.verdict) not in spelling:
            alike = [first for (known, verdict), first in spelling.items() if verdict == r.verdict]
            if r.verdict != "correct":
                alike = [first for first in alike if check.equivalent(first, r.answer)]
            spelling[r.answer, r.verdict] = alike[0] if alike else r.answer
        known = None if r.answer is None else spelling[r.answer, r.verdict]
        out.append(dataclasses.replace(r, answer=known))
    return out


def top_and_rest(groups: Sequence[Sequence[Response]], aggregate: str) -> list[Pair]:
    """For each query the Top-2 of its correct samples and the rest; queries without a rest are left out."""
    pairs = []
    for group in groups:
        right = selection.correct([r for r in group if r.temperature > 0])
        top = selection.top_k(right, [selection.reward(r, aggregate) for r in right], 2)
        chosen = {id(r) for r in top}
        if rest := [r for r in right if id(r) not in chosen]:
            pairs.append((top, rest))
    return pairs


def mean(values: Sequence[float]) -> Mean:
    """The mean and its standard error; the error of a single value is 0."""
    if not values:
        raise Missing("there is nothing to average")
    error = float(scipy.stats.sem(values)) if len(values) > 1 else 0.0
    return Mean(math.fsum(values) / len(values), error)


class Contrast(NamedTuple):
    """A measure of the Top-2 and of the rest, and the difference, paired by query."""

    top: Mean
    rest: Mean
    difference: Mean


def compare(pairs: Sequence[Pair], measure: Callable[[Response], float]) -> Contrast:
    """Compares a measure of the Top-2 with that of the rest; every query counts once."""
    tops = [mean([measure(r) for r in top]).value for top, _ in pairs]
    rests = [mean([measure(r) for r in rest]).value for _, rest in pairs]
    return Contrast(mean(tops), mean(rests), mean([top - rest for top, rest in zip(tops, rests)]))


def truths(run: RunRecord) -> dict[str, truth.Truth]:
    """The truth recorded by the generator of the embedded data set, by query id."""
    path = run.workdir / "figures" / "truth.jsonl"
    if not path.exists():
        raise Missing("the data set does not know which steps are right")
    return truth.read_truth(path)
