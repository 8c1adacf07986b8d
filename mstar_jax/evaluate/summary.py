"""The Markdown tables of an evaluation, with the paper's numbers next to it and paired comparisons."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mstar_jax.rewards import metrics

TITLES = {
    "mathvista": "MathVista",
    "m3cot": "M3CoT",
    "mmstar_r": "MMStar-R",
    "mmbench_r": "MMBench-R",
    "ai2d": "AI2D",
    "mmstar": "MMStar",
    "mmbench": "MMBench",
    "ai2d_no_mask": "AI2D, no mask",
    "mathv360k": "MathV360K",
    "mathverse": "MathVerse",
    "mathvision": "MATH-Vision",
    "wemath": "We-Math",
    "mmmu": "MMMU",
    "geometry3k": "Geometry3K",
}
FIVE = ("mathvista", "m3cot", "mmstar_r", "mmbench_r", "ai2d")  # whose mean the paper gives
PAPER = {  # accuracy, %: arXiv 2412.17451, the table over the five
    "MiniCPM-V-2.5": {
        "base": (52.4, 41.2, 44.6, 72.6, 64.4),
        "warm-up": (52.6, 47.8, 45.1, 76.9, 65.9),
        "M-STaR": (59.5, 48.7, 50.7, 79.9, 69.1),
    },
    "Phi-3.5-vision": {
        "base": (46.5, 39.4, 42.5, 56.8, 47.5),
        "warm-up": (49.3, 46.5, 44.2, 70.9, 65.5),
        "M-STaR": (54.5, 51.3, 48.8, 73.6, 67.9),
    },
    "InternVL2-2B": {
        "base": (46.4, 16.7, 20.0, 14.2, 33.5),
        "warm-up": (47.6, 45.6, 41.8, 68.8, 60.0),
        "M-STaR": (50.3, 47.1, 42.0, 67.3, 59.7),
    },
}
PARTS = dict.fromkeys(("mathvista", "mathv360k"), "task") | {"m3cot": "domain"}
PARTS |= dict.fromkeys(("mmstar", "mmstar_r"), "category")
PARTS |= dict.fromkeys(("mmbench", "mmbench_r"), "l2_category")
PARTS |= {"mathverse": "problem_version", "mathvision": "level", "wemath": "steps", "mmmu": "discipline"}
PARTS |= {"geometry3k": "goal"}
METHODS = ("greedy", "majority", "weighted_vote", "best_of_n")


class Result(NamedTuple):
    """What came of one policy on one benchmark.

    Attributes:
      record: what `<benchmark>.json` holds: scores by method, and how they came about.
      hits: by question, whether the greedy response is right.
    """

    record: dict[str, Any]
    hits: dict[str, bool]


Results = Mapping[str, Mapping[str, Result]]  # by policy and benchmark


def table(results: Results, paper: str) -> str:
    """The policies' headline scores as Markdown, then details, parts, and each policy against the first one.

    Args:
      results: every policy has the same benchmarks.
      paper: whose numbers of the paper's table are shown too, a key of PAPER; empty for none.
    """
    names = [name for name in TITLES if name in next(iter(results.values()), {})]
    lines = [*_headline(results, names, paper), *_details(results, names)]
    return "\n".join([*lines, *_parts(results, names), *_fourfold(results), *_pairs(results, names)])


def _headline(results: Results, names: Sequence[str], paper: str) -> list[str]:
    five = [name for name in FIVE if name in names]
    whole = len(five) == len(FIVE)
    head = ["", *(TITLES[name] for name in names), *(["mean of five"] if whole else [])]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for policy, found in results.items():
        values = {name: 100 * found[name].record["greedy"]["accuracy"] for name in names}
        cells = [f"{values[name]:.1f}" for name in names]
        cells += [f"{sum(values[name] for name in five) / 5:.1f}"] if whole else []
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    for policy, row in PAPER.get(paper, {}).items() if five else ():
        printed = dict(zip(FIVE, row))
        cells = [f"{printed[name]:.1f}" if name in printed else "" for name in names]
        cells += [f"{sum(row) / 5:.1f}"] if whole else []
        lines.append(f"| the paper's {paper}, {policy} | {' | '.join(cells)} |")
    return lines


def _details(results: Results, names: Sequence[str]) -> list[str]:
    head = "policy | benchmark | method | n | accuracy | 95 % | unparsed | with fallback | official"
    lines = ["", f"| {head} | truncated | left out |", "|---|---|---|" + "---:|" * 8]
    for policy, found in results.items():
        for name in names:
            record = found[name].record
            for method in (method for method in METHODS if method in record):
                cells = [policy, TITLES[name], method.replace("_", " "), *row(record[method])]
                lines.append(f"| {' | '.join([*cells, str(record['left_out'])])} |")
    return lines


def _parts(results: Results, names: Sequence[str]) -> list[str]:
    """The greedy accuracy on each of a benchmark's own parts."""
    lines: list[str] = []
    for name in (name for name in names if PARTS.get(name)):
        groups = {policy: found[name].record["greedy"]["groups"] for policy, found in results.items()}
        parts = next(iter(groups.values())).get(PARTS[name], {})
        if len(parts) < 2:
            continue
        titles = [f"{part} ({one['count']})" for part, one in parts.items()]
        lines += ["", f"| {TITLES[name]} | {' | '.join(titles)} |", "|---|" + "---:|" * len(parts)]
        for policy, own in groups.items():
            cells = [f"{100 * own[PARTS[name]][part]['accuracy']:.1f}" for part in parts]
            lines.append(f"| {policy} | {' | '.join(cells)} |")
    return lines


def _fourfold(results: Results) -> list[str]:
    """We-Math's own score from the strict verdicts, in both of its settings."""
    found = {policy: own["wemath"].record["greedy"] for policy, own in results.items() if "wemath" in own}
    lines: list[str] = []
    for policy, record in found.items():
        if own := record["four_dimensions"]["strict"]:
            for setting in ("strict", "loose"):
                part = own[setting]
                shares = [part["score"], own["insufficient_knowledge"], own["inadequate_generalization"]]
                shares += [part["complete_mastery"], part["rote_memorization"]]
                cells = ["" if share is None else f"{100 * share:.1f}" for share in shares]
                lines.append(f"| {policy} | {setting} | {own['problems']} | {' | '.join(cells)} |")
    head = ["", "| We-Math | setting | problems | score | IK | IG | CM | RM |", "|---|---|" + "---:|" * 6]
    return [*head, *lines] if lines else []


def _pairs(results: Results, names: Sequence[str]) -> list[str]:
    """Every policy against the first one, question by question."""
    first, *others = results
    if not others:
        return []
    lines = ["", f"| against {first} | benchmark | difference | 95 % | gained | lost | p |"]
    lines.append("|---|---|" + "---:|" * 5)
    for policy in others:
        for name in names:
            a, b = results[first][name].hits, results[policy][name].hits
            found = metrics.paired([a[key] for key in a], [b[key] for key in a])
            low, high = (f"{100 * end:+.1f}" for end in found["interval"])
            cells = [policy, TITLES[name], f"{100 * found['difference']:+.1f}", f"{low} to {high}"]
            cells += [str(found["gained"]), str(found["lost"]), f"{found['p']:.2g}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def row(summary: Mapping[str, Any]) -> list[str]:
    """n, accuracy, interval, unparsed, with fallback, official and truncated of a summary, as text."""
    strict = summary["strict"]
    low, high = (f"{100 * end:.1f}" for end in summary["interval"])
    shares = (strict["unparsed"], summary["fallback"]["accuracy"], summary["official"]["accuracy"])
    cells = [f"{100 * share:.1f}" for share in (*shares, summary["truncated"])]
    return [str(strict["count"]), f"{100 * summary['accuracy']:.1f}", f"{low} to {high}", *cells]


def line(record: Mapping[str, Any]) -> str:
    """A record for the log."""
    found = [m for m in METHODS if m in record]
    return ", ".join(f"{m} {100 * record[m]['accuracy']:.1f}%" for m in found)
