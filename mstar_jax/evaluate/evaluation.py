"""Benchmarks: what a policy answers, how that scores, and what a published harness can score again.

<workdir>/rollouts/<policy>_<benchmark>/              every response; a restart goes on behind the last
<workdir>/scores/<policy>_<benchmark>/                the samples' step scores, where a reward model votes
<workdir>/benchmarks/images/                          images that came inside the official files
<workdir>/benchmarks/<policy>/<benchmark>.json        scores, by category too, and how they came about
<workdir>/benchmarks/<policy>/<benchmark>.jsonl       an item a line: prompt, gold, response, verdicts
<workdir>/benchmarks/<policy>/<policy>_<VLMEvalKit's name>.xlsx, .tsv
<workdir>/benchmarks/table.md                         the paper's table, with paired comparisons
"""

import csv
import dataclasses
import io
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from mstar_jax import processes
from mstar_jax.data import prompts
from mstar_jax.evaluate import benchmarks, scoring
from mstar_jax.inference.generate import Asked, Generator, Groups
from mstar_jax.inference.score import Scorer
from mstar_jax.records import speeds
from mstar_jax.rewards import metrics, selection
from mstar_jax.store import write_text
from mstar_jax.structs import Response

log = logging.getLogger(__name__)

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
VLMEVALKIT = {  # the names that it knows the data sets by; it has neither M3CoT nor MathV360K
    "mathvista": "MathVista_MINI",
    "mmstar": "MMStar",
    "mmstar_r": "MMStar",
    "mmbench": "MMBench_DEV_EN_V11",
    "mmbench_r": "MMBench_DEV_EN_V11",
    "ai2d": "AI2D_TEST",
    "ai2d_no_mask": "AI2D_TEST_NO_MASK",
}


@dataclasses.dataclass(frozen=True)
class Policy:
    """Who is asked.

    Attributes:
      name: in the files and in the table.
      host: its host side.
      params: its parameters, called only where a response is missing.
      identity: what tells these parameters from others of the same name.
    """

    name: str
    host: Generator
    params: Callable[[], Any]
    identity: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Voter:
    """A reward model that votes over a policy's samples: its host side, itself, and what tells it apart."""

    scorer: Scorer
    model: Callable[[], Any]
    identity: Mapping[str, Any]


class Evaluation:
    """Benchmarks that were read, and the policies that were asked so far."""

    def __init__(self, workdir: pathlib.Path, settings: Any):
        """Reads the benchmarks, so that a missing file ends a run before it begins.

        Args:
          workdir: where all of it goes.
          settings: `config.benchmarks`: names, root, limit, prompt, samples, temperature, paper.

        Raises:
          ValueError: an unknown benchmark, or its files are not there.
        """
        self.folder, self.settings = workdir / "benchmarks", settings
        self.items: dict[str, list[benchmarks.Item]] = {}
        self.records: dict[str, dict[str, dict[str, Any]]] = {}  # by policy and benchmark
        self.hits: dict[str, dict[str, dict[str, bool]]] = {}  # and by question
        for name in settings.names:
            own = pathlib.Path(settings.root) / name.removesuffix("_r")
            place = own if own.is_dir() else pathlib.Path(settings.root)
            try:
                found, report = benchmarks.read(name, place, self.folder / "images")
            except (OSError, ImportError) as error:
                raise ValueError(f"{name}: {error}") from error
            log.info("%s", report)
            if not found:
                raise ValueError(f"{name}: no usable item in {place} (benchmarks.root)")
            some = set(list(dict.fromkeys(item.base for item in found))[: settings.limit or None])
            self.items[name] = [item for item in found if item.base in some]

    def evaluate(self, policy: Policy, voter: Voter | None = None) -> None:
        """Asks a policy all the questions and writes what came of it."""
        host = policy.host
        for name, items in self.items.items():
            asked = [(item.query, self._prompt(item, host)) for item in items]
            found = self._sampled(f"{policy.name}_{name}", policy, voter, asked)
            methods = self._methods(items, found, voter is not None)
            record = self._record(policy.name, name, items, found, methods, host)
            self.records.setdefault(policy.name, {})[name] = record
            if processes.first():
                prompts_of = {q.id: text for q, text in asked}
                self._write(policy.name, name, record, prompts_of, items, methods)
            log.info("%s, %s: %s", policy.name, name, line(record))
        if shown := speeds([{"speed": host.speeds.lap()}]):
            log.info("%s:\n%s", policy.name, shown)
        self._write_table()

    def _prompt(self, item: benchmarks.Item, host: Generator) -> str:
        how = self.settings.prompt
        return item.prompt if how == "official" else prompts.render(host.config.prompts[how], item.query)

    def _sampled(self, name: str, policy: Policy, voter: Voter | None, asked: Asked) -> Groups:
        """Per query its greedy response, then its samples, scored where there is a reward model."""
        s, host, longest = self.settings, policy.host, max(policy.host.config.data.buckets)
        temperatures = [0.0] + [s.temperature] * s.samples
        how = dict(policy.identity) | {"prompt": s.prompt}
        if s.prompt != "official":
            how |= {"template": host.config.prompts[s.prompt]}
        more = {"longest": longest, "kind": "evaluation"}
        found = host.sample(name, policy.params, asked, temperatures, how=how, **more)
        if voter is None or not s.samples:
            return found
        how |= {"reward": dict(voter.identity)}
        return voter.scorer.score(name, voter.model, asked, found, how=how, longest=longest)

    def _methods(self, items, found: Groups, scored: bool) -> dict[str, list[Response | None]]:
        """By method, of every item the response that it answers with."""
        groups = [found.get(item.query.id, []) for item in items]
        out: dict[str, list[Response | None]] = {"greedy": [group[0] if group else None for group in groups]}
        if self.settings.samples:
            out["majority"] = [self._voted(item, group[1:], None) for item, group in zip(items, groups)]
        if self.settings.samples and scored:
            rewards = [[selection.reward(r) for r in group[1:]] for group in groups]
            out["weighted_vote"] = [
                self._voted(item, group[1:], each) for item, group, each in zip(items, groups, rewards)
            ]
            out["best_of_n"] = [
                next(iter(selection.top_k(group[1:], each, 1)), None) for group, each in zip(groups, rewards)
            ]
        return out

    def _voted(self, item, samples: Sequence[Response], weights: Sequence[float] | None) -> Response | None:
        """The first sample of the class of answers that won."""
        won = selection.vote(samples, weights or [1.0] * len(samples), selection.checker(item.query))
        return next((r for r in samples if won and r.answer == won.answer and not r.truncated), None)

    def _record(self, policy, name, items, found: Groups, methods, host: Generator) -> dict[str, Any]:
        s = self.settings
        record: dict[str, Any] = {"policy": policy, "benchmark": name}
        for method, chosen in methods.items():
            scores = judged(name, items, chosen)
            record[method] = scoring.summarise(name, items, scores)
            if method == "greedy":
                self.hits.setdefault(policy, {})[name] = hits(scores)
        if s.samples:
            groups = [found[item.query.id] for item in items if item.query.id in found]
            record["samples"] = metrics.dynamics(groups, s.samples) | {"k": s.samples}
        c = host.config.sampling
        settings = {"prompt": s.prompt, "max_new_tokens": c.max_new_tokens, "dtype": c.dtype}
        settings |= {"top_k": c.top_k, "top_p": c.top_p, "min_p": c.min_p, "stop": list(c.stop_strings)}
        settings |= {"samples": s.samples, "temperature": s.temperature, "seed": host.config.seed}
        device = jax.devices()[0]
        settings |= {"jax": jax.__version__, "device": f"{jax.device_count()} x {device.device_kind}"}
        left_out = sum(item.query.id not in found for item in items)
        return record | {"left_out": left_out, "settings": settings}

    def _write(self, policy, name, record, asked, items, methods) -> None:
        folder = self.folder / policy
        folder.mkdir(parents=True, exist_ok=True)
        scores = {method: judged(name, items, chosen) for method, chosen in methods.items()}
        lines = []
        for at, item in enumerate(items):
            q = item.query
            out: dict[str, Any] = {"id": q.id, "prompt": asked[q.id], "images": q.images, "gold": q.answer}
            for method, chosen in methods.items():
                r, score = chosen[at], scores[method][at]
                shown = {"response": r.text if r else None, "answer": score.answer, "verdict": score.strict}
                out[method] = shown | {"fallback": score.fallback, "official": score.official}
            lines.append(json.dumps(out, ensure_ascii=False) + "\n")
        write_text(folder / f"{name}.jsonl", "".join(lines))
        if name in VLMEVALKIT and not (name.endswith("_r") and name[:-2] in self.items):
            answered = [(item.record, r.text if r else "") for item, r in zip(items, methods["greedy"])]
            write_vlmevalkit(folder / f"{policy}_{VLMEVALKIT[name]}", answered)
        write_text(folder / f"{name}.json", json.dumps(record, indent=1, ensure_ascii=False))

    # ---------------------------------------------------------------------------------------- tables
    def table(self) -> str:
        """The policies' headline scores as Markdown, the paper's beside them, and each against the first."""
        names = [name for name in TITLES if name in self.items]
        five = [name for name in FIVE if name in names]
        head = ["", *(TITLES[name] for name in names), *(["mean of five"] if len(five) == 5 else [])]
        lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
        for policy, records in self.records.items():
            values = {name: 100 * records[name]["greedy"]["accuracy"] for name in names}
            cells = [f"{values[name]:.1f}" for name in names]
            cells += [f"{sum(values[name] for name in five) / 5:.1f}"] if len(five) == 5 else []
            lines.append(f"| {policy} | {' | '.join(cells)} |")
        for policy, row in PAPER.get(self.settings.paper, {}).items() if five else ():
            paper = dict(zip(FIVE, row))
            cells = [f"{paper[name]:.1f}" if name in paper else "" for name in names]
            cells += [f"{sum(row) / 5:.1f}"] if len(five) == 5 else []
            lines.append(f"| the paper's {self.settings.paper}, {policy} | {' | '.join(cells)} |")
        return "\n".join([*lines, *self._details(names), *self._parts(names), *self._pairs(names)])

    def _details(self, names: Sequence[str]) -> list[str]:
        head = "policy | benchmark | method | n | accuracy | 95 % | unparsed | with fallback | official"
        lines = ["", f"| {head} | truncated | left out |", "|---|---|---|" + "---:|" * 8]
        for policy, records in self.records.items():
            for name in names:
                record = records[name]
                for method in (
                    m for m in ("greedy", "majority", "weighted_vote", "best_of_n") if m in record
                ):
                    cells = [policy, TITLES[name], method.replace("_", " "), *row(record[method])]
                    lines.append(f"| {' | '.join([*cells, str(record['left_out'])])} |")
        return lines

    def _parts(self, names: Sequence[str]) -> list[str]:
        """The greedy accuracy of each of a benchmark's own parts."""
        lines = []
        for name in (name for name in names if PARTS.get(name)):
            found = {policy: records[name]["greedy"]["groups"] for policy, records in self.records.items()}
            parts = next(iter(found.values())).get(PARTS[name], {})
            if len(parts) > 1:
                titles = [f"{part} ({one['count']})" for part, one in parts.items()]
                lines += ["", f"| {TITLES[name]} | {' | '.join(titles)} |", "|---|" + "---:|" * len(parts)]
            for policy, groups in found.items() if len(parts) > 1 else ():
                cells = [f"{100 * groups[PARTS[name]][part]['accuracy']:.1f}" for part in parts]
                lines.append(f"| {policy} | {' | '.join(cells)} |")
        return lines

    def _pairs(self, names: Sequence[str]) -> list[str]:
        first, *others = self.hits
        if not others:
            return []
        lines = ["", f"| against {first} | benchmark | difference | 95 % | gained | lost | p |"]
        lines.append("|---|---|" + "---:|" * 5)
        for policy in others:
            for name in names:
                a, b = self.hits[first][name], self.hits[policy][name]
                found = metrics.paired([a[key] for key in a], [b[key] for key in a])
                low, high = (f"{100 * end:+.1f}" for end in found["interval"])
                cells = [policy, TITLES[name], f"{100 * found['difference']:+.1f}", f"{low} to {high}"]
                cells += [str(found["gained"]), str(found["lost"]), f"{found['p']:.2g}"]
                lines.append(f"| {' | '.join(cells)} |")
        return lines

    def _write_table(self) -> None:
        if processes.first() and self.items:
            write_text(self.folder / "table.md", self.table() + "\n")


def judged(name: str, items: Sequence[benchmarks.Item], chosen: Sequence[Response | None]) -> list[Any]:
    """The scores of one response for every item; an item without one is unparsed."""
    return [
        scoring.judge(name, item, r.text if r else "", r.truncated if r else False)
        for item, r in zip(items, chosen)
    ]


def hits(scores: Sequence[scoring.Score]) -> dict[str, bool]:
    """By question: is the strict verdict right, in all its rotations."""
    out: dict[str, bool] = {}
    for score in scores:
        out[score.base] = out.get(score.base, True) and score.strict == "correct"
    return out


def row(summary: Mapping[str, Any]) -> list[str]:
    """n, accuracy, interval, unparsed, with fallback, official and truncated of a summary, as text."""
    strict = summary["strict"]
    low, high = (f"{100 * end:.1f}" for end in summary["interval"])
    shares = (strict["unparsed"], summary["fallback"]["accuracy"], summary["official"]["accuracy"])
    cells = [f"{100 * share:.1f}" for share in (*shares, summary["truncated"])]
    return [str(strict["count"]), f"{100 * summary['accuracy']:.1f}", f"{low} to {high}", *cells]


def line(record: Mapping[str, Any]) -> str:
    """A record for the log."""
    found = [m for m in ("greedy", "majority", "weighted_vote", "best_of_n") if m in record]
    return ", ".join(f"{m} {100 * record[m]['accuracy']:.1f}%" for m in found)


def write_vlmevalkit(stem: pathlib.Path, answered: Sequence[tuple[Mapping[str, str], str]]) -> None:
    """`stem`.tsv and, where openpyxl is installed, `stem`.xlsx in VLMEvalKit's layout: the columns of its
    data set without the images, and `prediction`."""
    names = [*dict.fromkeys(name for record, _ in answered for name in record), "prediction"]
    rows = [[*(record.get(name, "") for name in names[:-1]), text] for record, text in answered]
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows([names, *rows])
    write_text(stem.with_name(stem.name + ".tsv"), text.getvalue())
    try:
        import openpyxl
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        log.warning("no %s.xlsx: openpyxl is missing (pip install 'mstar_jax[benchmarks]')", stem.name)
        return
    book = openpyxl.Workbook()
    sheet = book.active
    for at, row in enumerate([names, *rows], start=1):
        for column, value in enumerate(row, start=1):
            cell = sheet.cell(at, column)
            if names[column - 1] == "index" and value.isdigit():
                cell.value = int(value)
            else:  # as a string, even where it begins like a formula
                cell.value = ILLEGAL_CHARACTERS_RE.sub("", value)[:32767]
                cell.data_type = "s"
    part = stem.with_name(stem.name + ".part.xlsx")
    book.save(part)
    part.replace(stem.with_name(stem.name + ".xlsx"))


def identity(path: pathlib.Path, stage: str = "") -> dict[str, Any]:
    """What tells a checkpoint's weights from others in the same place: path, stage, files, sizes, times."""
    found = sorted(path.glob("*.safetensors")) if not stage else []
    files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in found]
    return {"policy": str(path.absolute()), "stage": stage, "files": files}
