"""Scores of the benchmarks: our strict one first, each benchmark's own beside it, and what they add up to.

    strict     `check.grade` without its fallback: the answer is marked, and equal; else no credit
    fallback   `check.grade` with it: an answer without a mark counts too
    official   the benchmark's published scorer, offline and without chance. Where that one asks a language
               model for the final answer, our rules stand in for it, and its name in the output says so

The three differ by design. MathVista's official scorer gives an answer that it cannot read to the option of
the smallest edit distance, M3CoT's takes the last option that is mentioned, VLMEvalKit's `exact_matching`
gives nothing for a reply that it cannot match.

Sources: lupantech/MathVista (evaluation/calculate_score.py), LightChen233/M3CoT (utils/metric.py),
open-compass/VLMEvalKit (vlmeval/utils/matching_util.py, vlmeval/dataset/utils), EvolvingLMMs-Lab/lmms-eval.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mstar_jax.answers import check
from mstar_jax.evaluate.benchmarks import LETTERS, NAMES, SIZES, Item

KINDS = ("strict", "fallback", "official")
Z95 = 1.959963984540054  # standard normal quantile of 97.5 %


@dataclasses.dataclass(frozen=True)
class Score:
    """One judged response.

    Attributes:
      id: the item's `query.id`.
      base: the item's `base`.
      strict: `correct`, `wrong`, `unparsed` or `gold-unparsed`.
      fallback: the same, with an answer without a mark counting too.
      official: the benchmark's own scorer calls it right.
      answer: the marked answer, None where there is none.
      truncated: the length cap ended the response.
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
        """Right by one of KINDS or of the variants."""
        value = self.variants[kind] if kind in self.variants else getattr(self, kind)
        return value if isinstance(value, bool) else value == "correct"


# ---- 1. VLMEvalKit's matching of a reply with an option -----------------------------------------------

_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def infer(reply: str, options: Sequence[str]) -> str | None:
    """VLMEvalKit's `can_infer`: the option's letter that a reply names, `Z` for a refusal, None if unmatched.

    A single option letter stands among the last four words; or the first `answer is B` does; or a reply of
    at most twice the options' length holds the text of exactly one option. `A` as an article counts.
    """
    letters = LETTERS[: len(options)]
    if _FAILED not in reply:
        if any(refusal in reply for refusal in _REFUSALS):
            return "Z"
        words = reply.translate(_PUNCTUATION).split()
        named = [letter for letter in letters if letter in words]
        if len(named) == 1 and words.index(named[0]) > len(words) - 5:
            return named[0]
        if not named and "Z" in words:
            return "Z"
        if (m := _ANSWER_IS.search(reply)) and m[1].upper() in letters:
            return m[1].upper()
    reply = reply.lower()
    if len(reply) > 2 * sum(map(len, options)):
        return None
    held = [letter for letter, option in zip(letters, options) if option.lower() in reply]
    return held[0] if len(held) == 1 else None


def _exact_matching(item: Item, text: str, stand_in: str | None) -> tuple[bool, dict[str, bool]]:
    """VLMEvalKit without a judge model, of the marked answer; of the whole reply as a variant."""
    options, gold = item.query.options or (), item.query.answer
    marked = check.extract(text)
    right = infer(text if marked is None else marked, options) == gold
    return right, {"whole_reply": infer(text, options) == gold}


# ---- 2. MathVista -------------------------------------------------------------------------------------

_BRACKETED = re.compile(r"\(([a-zA-Z])\)")


def _number(text: str, to: type) -> Any:
    try:
        return to(text)
    except ValueError:
        return None


def normalize(extraction: str, item: Item) -> str | None:
    """MathVista's normal form of an extracted answer: an option's text, or a number as it is written.

    An answer that is no option becomes the nearest one by edit distance; an unreadable number None.

    Raises:
      ImportError: rapidfuzz is not installed.
    """
    if item.query.options:
        extraction, options = extraction.strip(), item.query.options
        if m := _BRACKETED.search(extraction):
            extraction = m[1].upper()
        if extraction in list(LETTERS[: len(options)]):
            return options[LETTERS.index(extraction)]
        try:
            from rapidfuzz.distance import Levenshtein
        except ImportError as error:
            hint = "pip install 'mstar_jax[benchmarks]'"
            raise ImportError(f"MathVista's official score needs rapidfuzz: {hint}") from error
        return min(options, key=lambda option: Levenshtein.distance(extraction, option))
    if item.query.answer_type not in ("integer", "float"):
        return extraction
    number = _number(extraction, float)
    if number is None:
        return None
    if item.query.answer_type == "float":
        return str(round(number, item.query.precision)) if math.isfinite(number) else str(number)
    return str(int(number)) if math.isfinite(number) else None


def _mathvista(item: Item, text: str, stand_in: str | None) -> tuple[bool, dict[str, bool]]:
    query, extraction = item.query, stand_in or ""
    options, gold = query.options or (), query.answer or ""
    if not text or text in options:
        extraction = text
    elif query.answer_type in ("integer", "float"):
        whole = _number(text, {"integer": int, "float": float}[query.answer_type])
        extraction = extraction if whole is None else str(whole)
    right = normalize(extraction, item) == (options[LETTERS.index(gold)] if options else gold)
    unread = bool(options) and not extraction.strip()
    return right, {"ignore_empty": right and not unread, "vlmevalkit": _vlmevalkit(item, text, extraction)}


def _vlmevalkit(item: Item, text: str, extraction: str) -> bool:
    """VLMEvalKit's MathVista: no edit distance, no rounding, and a list is never right (as published)."""
    query = item.query
    if query.options:
        return (infer(text, query.options) or infer(extraction, query.options)) == query.answer
    to = {"integer": int, "float": float}.get(query.answer_type)
    gold = _number(query.answer or "", to) if to else None
    return to is not None and gold is not None and gold in (_number(text, to), _number(extraction, to))


# ---- 3. M3CoT -----------------------------------------------------------------------------------------

_PAUSES = str.maketrans(dict.fromkeys("\n.,!?", " "))


def _m3cot(item: Item, text: str, stand_in: str | None) -> tuple[bool, dict[str, bool]]:
    """M3CoT's judge: the last `(B)`, else the last option whose text occurs, else whose letter does alone."""
    if "[Answer]" in text:
        text = text.rpartition("[Answer]")[2].partition("[Rationale]")[0].partition("[Context]")[0]
    if found := _BRACKETED.findall(text):
        return found[-1].upper() == item.query.answer, {}
    options = list(zip(LETTERS, item.query.options or ()))
    held = [letter for letter, option in options if option.lower() in text.lower()]
    words = text.translate(_PAUSES).split(" ")
    held = held or [letter for letter, _ in options if letter in words]
    held = held or [letter for letter, _ in options if letter.lower() in words]
    return bool(held) and held[-1] == item.query.answer, {}


# ---- 4. one response ----------------------------------------------------------------------------------

_Official = Callable[[Item, str, str | None], tuple[bool, dict[str, bool]]]
_EXACT = ("vlmevalkit exact_matching, of the marked answer", _exact_matching)
_OFFICIAL: dict[str, tuple[str, _Official]] = dict.fromkeys(NAMES, _EXACT)
_OFFICIAL["mathvista"] = ("mathvista, rules in place of GPT's extraction", _mathvista)
_OFFICIAL["mathv360k"] = ("as mathvista's, rules in place of GPT's extraction", _mathvista)  # it has none
_OFFICIAL["m3cot"] = ("m3cot judge_answer", _m3cot)


def judge(name: str, item: Item, text: str, truncated: bool) -> Score:
    """Scores one response to an item of benchmark `name`.

    Variants: MathVista and MathV360K `ignore_empty` (its newer flag: no credit where nothing was extracted)
    and `vlmevalkit` (that harness' rules); MMStar, MMBench and AI2D `whole_reply` (the same matching, of
    the whole reply: a long one mostly stays unmatched).

    Raises:
      ValueError: an unknown benchmark, or an item without a gold answer.
      ImportError: MathVista, and rapidfuzz is not installed.
    """
    query = item.query
    if name not in _OFFICIAL:
        raise ValueError(f"benchmark {name!r}: there are {', '.join(NAMES)}")
    if query.answer is None:
        raise ValueError(f"{name}: item {query.id!r} has no gold answer")
    how: dict[str, Any] = {"options": query.options, "answer_type": query.answer_type}
    how["precision"] = item.query.precision
    strict = check.grade(text, query.answer, **how)
    loose = check.grade(text, query.answer, fallback=True, **how)
    right, variants = _OFFICIAL[name][1](item, text, loose.answer)
    verdicts = (strict.verdict, loose.verdict, right, strict.answer)
    return Score(query.id, item.base, *verdicts, truncated, variants)


# ---- 5. a benchmark -----------------------------------------------------------------------------------

_Unit = tuple[Item, tuple[Score, ...]]  # a question, and the scores of its rotations or its only one
_MEANS = {  # of which groups' accuracies a benchmark's mean is one, beside the pooled accuracy
    "mmstar": {"mean_of_categories": "category", "mean_of_l2_categories": "l2_category"},
    "mmstar_r": {"mean_of_categories": "category"},
    "mmbench": {"mean_of_dimensions": "l2_category"},
    "mmbench_r": {"mean_of_dimensions": "l2_category"},
}


def wilson(correct: int, count: int) -> list[float] | None:
    """The 95 % interval of a share by Wilson's formula, [low, high]; None where count is 0."""
    if not count:
        return None
    share, weight = correct / count, Z95**2 / count
    middle = share + weight / 2
    half = math.sqrt(weight * (share * (1 - share) + weight / 4))
    return [max(0.0, (middle - half) / (1 + weight)), min(1.0, (middle + half) / (1 + weight))]


def _rate(units: Sequence[_Unit], kind: str) -> dict[str, Any]:
    """A question counts as right where all of its rotations are."""
    correct, count = sum(all(s.hit(kind) for s in scores) for _, scores in units), len(units)
    accuracy = correct / count if count else None
    return {"correct": correct, "count": count, "accuracy": accuracy, "interval": wilson(correct, count)}


def _share(units: Iterable[_Unit], holds: Callable[[Score], bool]) -> float | None:
    """Share of the responses, rotations each, that something holds for."""
    held = [holds(score) for _, scores in units for score in scores]
    return sum(held) / len(held) if held else None


def _groups(units: Sequence[_Unit]) -> dict[str, dict[str, list[_Unit]]]:
    out: dict[str, dict[str, list[_Unit]]] = {}
    for unit in units:
        for key, members in unit[0].groups.items():
            for member in members:
                out.setdefault(key, {}).setdefault(member, []).append(unit)
    return {key: dict(sorted(members.items())) for key, members in out.items()}


def _aggregates(name: str, prefix: str, units: Sequence[_Unit]) -> dict[str, Any]:
    """The pooled accuracies, and the benchmark's means of groups; `count` is the number of groups there."""
    out: dict[str, Any] = {prefix or "pooled": {kind: _rate(units, kind) for kind in KINDS}}
    for mean, key in _MEANS.get(name, {}).items():
        parts = _groups(units).get(key, {}).values()
        out[f"{prefix}_{mean}".strip("_")] = {
            kind: {
                "accuracy": math.fsum(_rate(part, kind)["accuracy"] for part in parts) / len(parts),
                "count": len(parts),
            }
            for kind in KINDS
            if parts
        }
    return out


def summarise(name: str, items: Sequence[Item], scores: Sequence[Score]) -> dict[str, Any]:
    """What a benchmark's scores add up to, ready for JSON. Accuracies and shares are in 0..1.

    The headline `accuracy` is the strict one: of all items (`aggregation` `pooled`), for MMBench of the
    questions (`circular`: right where all rotations are). `strict`, `fallback`, `official` and `variants`
    have the same aggregation, each with correct, count, accuracy and Wilson's 95 % interval, which for
    `circular` is over questions. Shares of unparsed and truncated ones are of the responses.

    Beside it, in `groups`, the same per kind of group and group (an item with two skills counts in both),
    and in `aggregates` every other way of adding up, by strict, fallback and official:
      pooled                 all items
      circular               MMBench's questions, right where all rotations are
      rotation_0, all_rows   MMBench without the circle: of each question the first row; every row
      ..._mean_of_dimensions of MMBench's l2-categories, as LLaVA-CoT makes MMBench-R of its three
      mean_of_categories     of MMStar's six categories, of MMStar-R's four
      mean_of_l2_categories  of MMStar's 18 l2-categories: lmms-eval's `average`

    Args:
      name: the benchmark.
      items: as `benchmarks.read` gives them; rotations of a question together, wherever they stand.
      scores: of each item, in the same order.

    Raises:
      ValueError: an unknown benchmark, or scores that do not belong to the items.
    """
    if name not in _OFFICIAL:
        raise ValueError(f"benchmark {name!r}: there are {', '.join(NAMES)}")
    if [item.query.id for item in items] != [score.id for score in scores]:
        raise ValueError(f"{name}: {len(scores)} scores are not those of these {len(items)} items, in order")
    rows: list[_Unit] = [(item, (score,)) for item, score in zip(items, scores)]
    units, aggregates, aggregation = rows, dict[str, Any](), "pooled"
    if name.startswith("mmbench"):
        together: dict[str, list[_Unit]] = {}
        for row in sorted(rows, key=lambda row: row[0].query.id != row[0].base):  # the question itself first
            together.setdefault(row[0].base, []).append(row)
        units = [(group[0][0], tuple(s for _, own in group for s in own)) for group in together.values()]
        first, aggregation = [row for row in rows if row[0].query.id == row[0].base], "circular"
        for prefix, part in (("circular", units), ("rotation_0", first), ("all_rows", rows)):
            aggregates |= _aggregates(name, prefix, part)
    else:
        aggregates = _aggregates(name, "", units)
    strict = _rate(units, "strict")
    groups = {
        key: {member: _part(part) for member, part in members.items()}
        for key, members in _groups(units).items()
    }
    return {
        "benchmark": name,
        "n": len(rows),
        "expected": SIZES.get(name),
        "accuracy": strict["accuracy"],
        "interval": strict["interval"],
        "aggregation": aggregation,
        "strict": strict
        | {"unparsed": _share(units, lambda s: s.strict == "unparsed")}
        | {"gold_unparsed": _share(units, lambda s: s.strict == "gold-unparsed")},
        "fallback": _rate(units, "fallback")
        | {"unparsed": _share(units, lambda s: s.fallback == "unparsed")},
        "official": {"scorer": _OFFICIAL[name][0]} | _rate(units, "official"),
        "variants": {variant: _rate(units, variant) for variant in (scores[0].variants if scores else ())},
        "truncated": _share(units, lambda s: s.truncated),
        "groups": groups,
        "aggregates": aggregates,
    }


def _part(units: Sequence[_Unit]) -> dict[str, Any]:
    return _rate(units, "strict") | {
        "unparsed": _share(units, lambda s: s.strict == "unparsed"),
        "truncated": _share(units, lambda s: s.truncated),
        "fallback": _rate(units, "fallback")["accuracy"],
        "official": _rate(units, "official")["accuracy"],
    }
