"""What workdirs tell after the fact: records, stored responses, and the numbers of Figure 2 made of them.

Only files are read; what cannot be told raises `Missing` with one sentence that says why.
"""

import collections
import dataclasses
import json
import math
import operator
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mstar_jax.answers import check
from mstar_jax.data import truth
from mstar_jax.rewards import metrics, selection
from mstar_jax.store import read_rollout
from mstar_jax.structs import Response

Share = tuple[float, float]  # mean over queries, its standard error
Pair = tuple[list[Response], list[Response]]  # of a query's correct responses: the Top-2, and the rest


class Missing(Exception):
    """Why something cannot be told of a run."""


# ---- 1. records ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir and its results.json."""

    name: str
    workdir: pathlib.Path
    results: dict[str, Any]

    def value(self, path: str, default: Any = None) -> Any:
        """A config value by its dotted name."""
        found: Any = self.results.get("config")
        for name in path.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        return default if found is None else found

    def records(self, split: str) -> list[dict[str, Any]]:
        """The dynamics on a split, in the order of the run."""
        found = [r for r in self.results["stages"] if r.get("split") == split and place(r) is not None]
        return sorted(found, key=lambda r: place(r) or 0)

    def record(self, stage: str) -> dict[str, Any]:
        """The last record of a stage such as `prm`."""
        found = [r for r in self.results["stages"] if r.get("stage") == stage]
        if not found:
            raise Missing(f"results.json has no record of the stage {stage!r}")
        return found[-1]

    def series(self, split: str, key: str) -> list[tuple[int, float, int]]:
        """(place, value, queries) of every record that has the number."""
        rows = [(place(r) or 0, number(r, key), r.get("n")) for r in self.records(split)]
        return [(x, y, n if isinstance(n, int) else 0) for x, y, n in rows if y is not None]


def read_runs(workdirs: Sequence[pathlib.Path], names: Sequence[str] = ()) -> list[Run]:
    """The runs, named by their folders where no names are given.

    Raises:
      ValueError: a workdir has no readable results.json, or there are other numbers of names.
    """
    if names and len(names) != len(workdirs):
        raise ValueError(f"{len(names)} names for {len(workdirs)} workdirs")
    runs: list[Run] = []
    for index, workdir in enumerate(workdirs):
        path = workdir / "results.json"
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            found = results["stages"]
            results["stages"] = [r for r in found if isinstance(r, dict)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{workdir} is no run that can be read: {path.name}: {error!r}") from error
        name = names[index] if names else workdir.absolute().name
        if any(run.name == name for run in runs):
            name = f"{name} ({index + 1})"
        runs.append(Run(name, workdir, results))
    return runs


def place(record: dict[str, Any]) -> int | None:
    """Where a record stands in the run: base -1, warm-up 0, iteration t at t; None for other stages."""
    stage, iteration = record.get("stage"), record.get("iteration")
    if stage == "iteration":
        return iteration if isinstance(iteration, int) else None
    return {"base": -1, "warmup": 0}.get(str(stage))


def title(at: float) -> str:
    """What the axis says at a place."""
    return {-1: "base", 0: "warm-up"}.get(int(at), f"{at:g}")


def number(record: dict[str, Any], key: str) -> float | None:
    """A record's number; None where it is absent, no number, or not finite."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


# ---- 2. stored responses ------------------------------------------------------------------------------


def lines(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The records of a rollout store as they are, one by one."""
    for path in sorted(folder.glob("[0-9]*.jsonl")):
        with open(path, encoding="utf-8", newline="\n") as file:
            for number_, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                    record["query"], record["responses"]
                except (ValueError, KeyError, TypeError) as error:
                    raise Missing(f"{path.name} of {folder.name}, line {number_}, cannot be read") from error
                yield record


@dataclasses.dataclass(frozen=True)
class Scored:
    """Responses with step scores: per query its greedy response and its samples of one temperature."""

    folder: pathlib.Path
    temperature: float
    groups: list[list[Response]]

    def questions(self) -> dict[str, str]:
        """The questions by query id."""
        return {r["query"]: str(r.get("question", "")) for r in lines(self.folder)}


def scored(run: Run) -> Scored:
    """The responses of the newest stage that the reward model scored, on validation rather than on test."""
    stages = {place(r): r for split in ("validation", "test") for r in run.records(split)}
    for at in sorted((at for at in stages if at is not None), reverse=True):
        for split in ("validation", "test"):
            name = {-1: "base", 0: "warmup"}.get(at, f"iteration_{at:02d}") + f"_{split}"
            folder = run.workdir / "scores" / name
            found = _at_one_temperature(run, [read_rollout(record)[1] for record in lines(folder)])
            if any(r.step_scores for group in found[1] for r in group):
                return Scored(folder, *found)
    raise Missing("no reward model has scored validation or test responses in this run")


def _at_one_temperature(run: Run, groups: list[list[Response]]) -> tuple[float, list[list[Response]]]:
    """Greedy responses and the samples of the evaluation's temperature, of an exploration's else of most."""
    counts = collections.Counter(r.temperature for group in groups for r in group if r.temperature > 0)
    usual = run.value("eval.temperature")
    chosen = usual if usual in counts else max(counts, key=lambda t: counts[t], default=0.0)
    return chosen, [[r for r in group if r.temperature in (0, chosen)] for group in groups]


# ---- 3. Figure 2 --------------------------------------------------------------------------------------


def rollouts_curve(groups: Sequence[Sequence[Response]], ns: Sequence[int], aggregate: str) -> dict[str, Any]:
    """Accuracy against the number of rollouts (Figure 2a), by the verdicts that the store has.

    `metrics.curve` judges by the queries themselves; the store has neither their options nor their types.

    Returns:
      `n`: those of ns that every query has samples for; greedy, best_of_n, majority, weighted_vote: lists.
    """
    least = min((sum(r.temperature > 0 for r in group) for group in groups), default=0)
    ns = [n for n in ns if n <= least]
    greedy = [r.verdict == "correct" for group in groups for r in group if r.temperature == 0]
    hits: dict[str, list[list[bool]]] = {name: [] for name in ("best_of_n", "majority", "weighted_vote")}
    for group in groups:
        samples = _same_answers([r for r in group if r.temperature > 0])
        rewards = [selection.reward(r, aggregate) for r in samples]
        right = [r.verdict == "correct" for r in samples]
        good = {r.answer for r in samples if r.verdict == "correct"}
        hits["best_of_n"].append([metrics.best_of_n(rewards[:n], right[:n]) for n in ns])
        for name, weights in (("majority", [1.0] * len(samples)), ("weighted_vote", rewards)):
            won = [selection.vote(samples[:n], weights[:n], operator.eq) for n in ns]
            hits[name].append([vote is not None and vote.answer in good for vote in won])
    out: dict[str, Any] = {"n": ns, "greedy": [mean(greedy)[0]] * len(ns) if greedy else []}
    return out | {name: [mean(column)[0] for column in zip(*rows)] for name, rows in hits.items()}


def _same_answers(responses: Sequence[Response]) -> list[Response]:
    """The responses with one spelling for every answer: all correct ones agree, wrong ones by value."""
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
    """Per query: the Top-2 of its correct samples and the rest of them; only queries that have a rest."""
    pairs = []
    for group in groups:
        right = selection.correct([r for r in group if r.temperature > 0])
        top = selection.top_k(right, [selection.reward(r, aggregate) for r in right], 2)
        chosen = {id(r) for r in top}
        if rest := [r for r in right if id(r) not in chosen]:
            pairs.append((top, rest))
    return pairs


def mean(values: Sequence[float]) -> Share:
    """Mean and its standard error; the error of a single value is 0."""
    if not values:
        raise Missing("there is nothing to average")
    middle, count = math.fsum(values) / len(values), len(values)
    spread = math.fsum((v - middle) ** 2 for v in values)
    return middle, math.sqrt(spread / (count - 1) / count) if count > 1 else 0.0


def compare(pairs: Sequence[Pair], measure: Callable[[Response], float]) -> tuple[Share, Share, Share]:
    """(Top-2, rest, their difference) of a measure; every query counts once."""
    per_query = [[mean([measure(r) for r in side])[0] for side in pair] for pair in pairs]
    tops, rests = [top for top, _ in per_query], [rest for _, rest in per_query]
    return mean(tops), mean(rests), mean([top - rest for top, rest in per_query])


def truths(run: Run) -> dict[str, truth.Truth]:
    """What the embedded data set's generator knows, by query id."""
    path = run.workdir / "figures" / "truth.jsonl"
    if not path.exists():
        raise Missing("the data set does not know which steps are right")
    return truth.read_truth(path)
