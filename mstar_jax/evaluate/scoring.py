"""Scores of the benchmarks: our own strict score, each benchmark's official score, and their aggregates.

    strict     `check.grade` without its fallback: the answer must be marked and equal to the gold answer
    fallback   `check.grade` with its fallback: an unmarked answer counts too
    official   the benchmark's published scorer, offline and deterministic. Where it asks a language model
               to extract the answer, our rules take the model's place, and its name in the output says so

The three differ by design. MathVista's official scorer maps an unreadable answer to the option at the
smallest edit distance, M3CoT's takes the last option mentioned, and VLMEvalKit's `exact_matching` gives no
credit to a reply that it cannot match.

The published scorers are in official.py.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypedDict

from mstar_jax.answers import check
from mstar_jax.evaluate import examiners, fourfold, official
from mstar_jax.evaluate.benchmarks import NAMES, SIZES
from mstar_jax.evaluate.items import Item
from mstar_jax.rewards import metrics

KINDS = ("strict", "fallback", "official")


@dataclasses.dataclass(frozen=True)
class Score:
    """One judged response.

    Attributes:
      id: the item's `query.id`.
      base: the item's `base`.
      strict: `correct`, `wrong`, `unparsed` or `gold-unparsed`.
      fallback: the same, when an unmarked answer counts too.
      official: whether the benchmark's own scorer accepts it.
      answer: the marked answer, or None.
      truncated: whether the response ended at the length cap.
      variants: further verdicts by name, see `judge`.
    """

    id: str
    base: str
    strict: str
    fallback: str
    official: bool
    answer: str | None
    truncated: bool
    variants: Mapping[str, bool] = dataclasses.field(default_factory=dict)

    def hit(self, kind: str) -> bool:
        """Whether it is right by one of KINDS or by a variant."""
        value = self.variants[kind] if kind in self.variants else getattr(self, kind)
        return value if isinstance(value, bool) else value == "correct"


# ---- 1. one response ----------------------------------------------------------------------------------

_EXACT = ("vlmevalkit exact_matching, of the marked answer", official.exact_matching)
_OFFICIAL: dict[str, tuple[str, official.Scorer]] = dict.fromkeys(NAMES, _EXACT)
_OFFICIAL["mathvista"] = ("mathvista, rules in place of GPT's extraction", official.mathvista)
_OFFICIAL["mathv360k"] = ("mathvista's for options and texts, our equality for numbers", official.mathv360k)
_OFFICIAL["m3cot"] = ("m3cot judge_answer", official.m3cot)
_GPT = "mathverse, rules in place of GPT's extraction and judgement"
_OFFICIAL["mathverse"] = (_GPT, examiners.mathverse)
_OFFICIAL["mathvision"] = ("mathvision, arithmetic in place of latex2sympy", examiners.mathvision)
_OFFICIAL["wemath"] = ("wemath, first letter after Answer", examiners.wemath)
_OFFICIAL["mmmu"] = ("mmmu, no credit in place of a random guess", examiners.mmmu)
_OFFICIAL["geometry3k"] = ("lmms-eval's geometry3k, our equality without choices", examiners.geometry3k)


def judge(name: str, item: Item, text: str, truncated: bool) -> Score:
    """Scores one response to an item of benchmark `name`.

    Variants of MathVista and MathV360K: `ignore_empty` (a newer flag of the official scorer: no credit if
    nothing was extracted) and `vlmevalkit` (the rules of that harness). Variant of MMStar, MMBench and AI2D:
    `whole_reply` (the same matching applied to the whole reply; long replies mostly stay unmatched). Variant
    of MathVerse: `quick_match` (the extracted text is the answer, character by character).

    Raises:
      ValueError: the benchmark is unknown, or the item has no gold answer.
      ImportError: MathVista needs rapidfuzz, which is not installed.
    """
    query = item.query
    if name not in _OFFICIAL:
        raise ValueError(f"unknown benchmark {name!r}; expected one of {', '.join(NAMES)}")
    if query.answer is None:
        raise ValueError(f"{name}: item {query.id!r} has no gold answer")
    golds = [query.answer, *item.also]
    strict, loose = (_grade(item, golds, text, fallback) for fallback in (False, True))
    right, variants = _OFFICIAL[name][1](item, text, loose)
    return Score(
        id=query.id,
        base=item.base,
        strict=strict.verdict,
        fallback=loose.verdict,
        official=right,
        answer=strict.answer,
        truncated=truncated,
        variants=variants,
    )


def _grade(item: Item, golds: Sequence[str], text: str, fallback: bool) -> check.Grade:
    """By the first gold answer that it equals, else by the first one."""
    query, found = item.query, []
    for gold in golds:
        grade = check.grade(
            text,
            gold,
            options=item.options or query.options,
            answer_type=query.answer_type,
            precision=query.precision,
            fallback=fallback,
        )
        if grade.verdict == "correct":
            return grade
        found.append(grade)
    return found[0]


# ---- 2. a benchmark -----------------------------------------------------------------------------------

_Unit = tuple[Item, tuple[Score, ...]]  # a question, and the scores of all its rotations
_MEANS = {  # besides the pooled accuracy, means over the accuracies of these groups
    "mmstar": {"mean_of_categories": "category", "mean_of_l2_categories": "l2_category"},
    "mmstar_r": {"mean_of_categories": "category"},
    "mmbench": {"mean_of_dimensions": "l2_category"},
    "mmbench_r": {"mean_of_dimensions": "l2_category"},
}


class Rate(TypedDict):
    """An accuracy with its counts and its 95 % Wilson interval [low, high]; both None if count is 0."""

    correct: int
    count: int
    accuracy: float | None
    interval: list[float] | None


def _rate(units: Sequence[_Unit], kind: str) -> Rate:
    """A question counts as right if all its rotations are right."""
    correct = sum(all(s.hit(kind) for s in scores) for _, scores in units)
    count = len(units)
    accuracy = correct / count if count else None
    interval = None if accuracy is None else list(metrics.wilson(accuracy, count))
    return {"correct": correct, "count": count, "accuracy": accuracy, "interval": interval}


def _share(units: Iterable[_Unit], holds: Callable[[Score], bool]) -> float | None:
    """Fraction of the responses for which something holds; each rotation counts."""
    found = [holds(score) for _, scores in units for score in scores]
    return sum(found) / len(found) if found else None


def _groups(units: Sequence[_Unit]) -> dict[str, dict[str, list[_Unit]]]:
    out: dict[str, dict[str, list[_Unit]]] = {}
    for unit in units:
        for key, members in unit[0].groups.items():
            for member in members:
                out.setdefault(key, {}).setdefault(member, []).append(unit)
    return {key: dict(sorted(members.items())) for key, members in out.items()}


def _aggregates(name: str, prefix: str, units: Sequence[_Unit]) -> dict[str, dict]:
    """The pooled accuracies, and the benchmark's means over groups, whose `count` is the number of groups."""
    out: dict[str, dict] = {prefix or "pooled": {kind: _rate(units, kind) for kind in KINDS}}
    for mean, key in _MEANS.get(name, {}).items():
        parts = _groups(units).get(key, {}).values()
        out[f"{prefix}_{mean}".strip("_")] = {
            kind: {
                "accuracy": math.fsum(_rate(part, kind)["accuracy"] or 0.0 for part in parts) / len(parts),
                "count": len(parts),
            }
            for kind in KINDS
            if parts
        }
    return out


def summarise(name: str, items: Sequence[Item], scores: Sequence[Score]) -> dict:
    """The aggregate scores of a benchmark, ready for JSON. Accuracies and fractions are in 0..1.

    The headline `accuracy` is the strict one: over all items (`aggregation` is `pooled`), or for MMBench over
    questions (`circular`: a question is right if all its rotations are). `strict`, `fallback`, `official` and
    `variants` are aggregated in the same way, each with correct, count, accuracy and a 95 % Wilson interval,
    which for `circular` is over questions. `unparsed` and `truncated` are fractions of the responses.

    `groups` has the same for every group of every kind (an item with two skills counts in both). `aggregates`
    has all other aggregations, each by the strict, fallback and official score:
      pooled                 all items
      circular               MMBench's questions, right if all rotations are
      rotation_0, all_rows   MMBench without circular evaluation: the first row of each question; every row
      ..._mean_of_dimensions of MMBench's l2-categories; LLaVA-CoT computes MMBench-R from its three
      mean_of_categories     of MMStar's six categories, of MMStar-R's four
      mean_of_l2_categories  of MMStar's 18 l2-categories: lmms-eval's `average`

    `four_dimensions` of We-Math has its own score, see fourfold.py, from the verdicts of each kind.

    Args:
      name: the benchmark.
      items: from `benchmarks.read`; the rotations of a question need not be adjacent.
      scores: of each item, in the same order.

    Raises:
      ValueError: the benchmark is unknown, or the scores do not match the items.
    """
    if name not in _OFFICIAL:
        raise ValueError(f"unknown benchmark {name!r}; expected one of {', '.join(NAMES)}")
    if [item.query.id for item in items] != [score.id for score in scores]:
        raise ValueError(f"{name}: the {len(scores)} scores do not match the {len(items)} items in order")
    rows: list[_Unit] = [(item, (score,)) for item, score in zip(items, scores)]
    units = rows
    aggregation = "pooled"
    aggregates: dict[str, dict] = {}
    if name.startswith("mmbench"):
        together: dict[str, list[_Unit]] = {}
        for row in sorted(rows, key=lambda row: row[0].query.id != row[0].base):  # the question itself first
            together.setdefault(row[0].base, []).append(row)
        units = [(group[0][0], tuple(s for _, own in group for s in own)) for group in together.values()]
        first = [row for row in rows if row[0].query.id == row[0].base]
        aggregation = "circular"
        for prefix, part in (("circular", units), ("rotation_0", first), ("all_rows", rows)):
            aggregates |= _aggregates(name, prefix, part)
    else:
        aggregates = _aggregates(name, "", units)
    strict = _rate(units, "strict")
    groups = {
        key: {member: _part(part) for member, part in members.items()}
        for key, members in _groups(units).items()
    }
    out: dict = {
        "benchmark": name,
        "n": len(rows),
        "expected": SIZES.get(name),
        "accuracy": strict["accuracy"],
        "interval": strict["interval"],
        "aggregation": aggregation,
        "strict": {
            **strict,
            "unparsed": _share(units, lambda s: s.strict == "unparsed"),
            "gold_unparsed": _share(units, lambda s: s.strict == "gold-unparsed"),
        },
        "fallback": {
            **_rate(units, "fallback"),
            "unparsed": _share(units, lambda s: s.fallback == "unparsed"),
        },
        "official": {"scorer": _OFFICIAL[name][0], **_rate(units, "official")},
        "variants": {variant: _rate(units, variant) for variant in (scores[0].variants if scores else ())},
        "truncated": _share(units, lambda s: s.truncated),
        "groups": groups,
        "aggregates": aggregates,
    }
    if name == "wemath":
        of_each = {kind: [score.hit(kind) for score in scores] for kind in KINDS}
        out["four_dimensions"] = {kind: fourfold.dimensions(items, hits) for kind, hits in of_each.items()}
    return out


def _part(units: Sequence[_Unit]) -> dict:
    return dict(_rate(units, "strict")) | {
        "unparsed": _share(units, lambda s: s.strict == "unparsed"),
        "truncated": _share(units, lambda s: s.truncated),
        "fallback": _rate(units, "fallback")["accuracy"],
        "official": _rate(units, "official")["accuracy"],
    }
