"""What a run records: results.json, its tables, tables of samples. Only process 0 writes."""

import collections
import html
import json
import os
import pathlib
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import tensorboardX

from mstar_jax import processes
from mstar_jax.data import prompts
from mstar_jax.store import digest, read_json, write_text
from mstar_jax.structs import Query, Response, Stage


class Record(TypedDict, total=False):
    """What results.json says of a stage on a split; what is not known is absent.

    Attributes:
      stage, iteration: `Stage.kind` and `Stage.number`.
      split: `validation` or `test`; of the reward model `held-out`.
      n: queries.
      k: K of Pass@K.
      temperature: what the stage's training responses were sampled at; None for the base.
      kept: how many responses it was trained on; None for the base and the reward model.
      dropped: where none was kept, how many there were by cause; see `stages.select.dropped`.
      given: of `warmup.data`, its rationales by verdict.
      greedy_accuracy, ..., length: see `rewards.metrics.dynamics`.
      entropy, ..., length_wrong: how diverse the samples are, see `rewards.diversity.diversity`.
      trained_groups, ..., skipped_other: queries of the stage, see `stages.weigh.teaching`.
      sampler_mean, sampler_greatest, sampler_ess: sampler against trainer, see `rewards.diversity.agreement`.
      kl: of the policy that sampled what the stage was trained on, from the warm-up; see
        `rewards.diversity.divergence`.
      all_right, unfaithful: of the embedded data's greedy responses, see `stages.measure.right_steps`.
      parts: on the parts of the embedded data, see `stages.measure.by_part`.
      pseudo_coverage, pseudo_precision: of unlabelled queries that joined, see `stages.select.pseudo_label`.
      curriculum: what the choice of an iteration's queries was worth, see `data.splits.spared`.
      reward_failed: where a user's reward failed, see `stages.generate.failures`.
      grid, chosen: the dynamics at several temperatures, and the temperature that was chosen by them.
      responses, ..., truth: of the reward model, see `stages.reward_model.report`.
      seconds: since the record before.
      speed: of the passes since then, by kind of work and name; see `profiling.speed`.
    """

    stage: str
    iteration: int
    split: str
    n: int
    k: int
    temperature: float | None
    kept: int | None
    dropped: dict[str, int]
    given: dict[str, int]
    greedy_accuracy: float
    pass_at_k: float
    gap: float
    sampled_accuracy: float
    distinct_answers: float
    reward_pass_at_2: float
    balance_score: float
    unparsed: float
    gold_unparsed: float
    truncated: float
    length: float
    entropy: float
    groups_all_right: float
    groups_all_wrong: float
    distinct_correct: float
    length_right: float
    length_wrong: float
    trained_groups: int
    skipped_right: int
    skipped_wrong: int
    skipped_other: int
    sampler_mean: float
    sampler_greatest: float
    sampler_ess: float
    kl: float
    all_right: float
    unfaithful: float
    parts: dict[str, dict[str, float]]
    pseudo_coverage: float
    pseudo_precision: float
    curriculum: dict[str, Any]
    reward_failed: dict[str, dict[str, Any]]
    grid: list[dict[str, float]]
    chosen: float | None
    responses: int
    steps: int
    label_auc: float | None
    label_auc_within: float | None
    ece: float | None
    brier: float | None
    calibration: list[dict[str, float]] | None
    curve: list[dict[str, float]]
    truth: dict[str, float | None]
    seconds: float
    speed: dict[str, dict[str, dict[str, float]]]


class Results:
    """`<workdir>/results.json`: a head (config, seed, versions, device), the best iteration, a record per
    stage and split.

    Attributes:
      records: the records, in the order of their writing.
    """

    def __init__(self, workdir: pathlib.Path, head: Mapping[str, object]):
        """Reads the records that are there.

        Raises:
          ValueError: the file is damaged, or its records were changed.
        """
        self.workdir, self.head = workdir, head
        self.path = workdir / "results.json"
        self.records: list[Record] = []
        if processes.first():
            (workdir / "metrics").mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            there = read_json(self.path, "stages")
            self.records = there["stages"]
            if there.get("digest") != digest(self.records):  # the run reads what they say, such as `chosen`
                raise ValueError(
                    f"{self.path}: its records are not those that the run wrote; restore it from a copy"
                )
        processes.barrier("results")  # read by all processes before one adds to them

    def find(self, stage: Stage, split: str) -> Record | None:
        """The record of a stage on a split, None where it is not there yet."""
        key = (stage.kind, stage.number, split)
        return next((r for r in self.records if (r["stage"], r["iteration"], r["split"]) == key), None)

    def best(self) -> Stage | None:
        """The iteration that `best` finds."""
        found = best(self.records)
        return Stage.iteration(found["iteration"]) if found else None

    def add(self, stage: Stage, values: Mapping[str, object]) -> None:
        """Appends a record and writes the file; also as TensorBoard events and a CSV of all records."""
        record: Any = {"stage": stage.kind, "iteration": stage.number, **values}
        self.records.append(record)
        self._write(stage, record["split"], record)

    def extend(self, stage: Stage, split: str, values: Mapping[str, Any]) -> None:
        """Adds values to a record that is there; seconds and speeds are added to its own."""
        record: Any = self.find(stage, split)
        seconds = record["seconds"] + values["seconds"]
        speed = {kind: dict(passes) for kind, passes in record["speed"].items()}
        for kind, passes in values["speed"].items():
            speed.setdefault(kind, {}).update(passes)
        record |= {**values, "seconds": round(seconds, 2), "speed": speed}
        self._write(stage, split, values)

    def _write(self, stage: Stage, split: str, new: Mapping[str, object]) -> None:
        if not processes.first():
            return
        flat = [
            {key: value for key, value in record.items() if not isinstance(value, dict | list)}
            for record in self.records
        ]
        names = list(dict.fromkeys(name for record in flat for name in record if name != "seconds"))
        rows: list[Sequence[object]] = [names, *([record.get(name, "") for name in names] for record in flat)]
        text = "".join(",".join(str(cell) for cell in row) + "\n" for row in rows)
        write_text(self.workdir / "metrics" / "dynamics.csv", text)
        data: dict[str, object] = {**self.head, "digest": digest(self.records)}
        data |= {"best": str(self.best() or "") or None, "stages": self.records}
        write_text(self.path, json.dumps(data, indent=1))  # last: a record here means that all is written
        events = tensorboardX.SummaryWriter(str(self.workdir / "tensorboard" / "dynamics"))
        at = 0 if stage == Stage.base else stage.number + 1
        for name, value in new.items():
            if isinstance(value, float) and name != "seconds":
                events.add_scalar(f"{split}/{name}", value, at)
        events.close()


def best(stages: Iterable[Record]) -> Record | None:
    """The validation record of the iteration with the highest greedy accuracy, the first of equal ones; None
    where no iteration has been measured."""
    kind = Stage.iteration(1).kind
    measured = [s for s in stages if (s["stage"], s["split"]) == (kind, "validation")]
    measured = [s for s in measured if "greedy_accuracy" in s]
    return max(measured, key=lambda s: s["greedy_accuracy"], default=None)


def shown_best(stages: Iterable[Record]) -> str:
    """A line about the best iteration, and whether the warm-up was better; empty without an iteration."""
    stages = list(stages)
    found = best(stages)
    if found is None:
        return ""
    greedy = f"{100 * found['greedy_accuracy']:.1f}%"
    line = f"best on validation: iteration {found['iteration']}, greedy {greedy} (export --stage=best)"
    kind = Stage.warmup.kind
    before = [s for s in stages if (s["stage"], s["split"]) == (kind, "validation")]
    accuracy = before[0].get("greedy_accuracy", 0.0) if before else 0.0
    if accuracy > found["greedy_accuracy"]:
        line += f"; the warm-up was better, {100 * accuracy:.1f}% (--stage={kind})"
    return line


def table(stages: Iterable[Record]) -> str:
    """The records as a table for the terminal; above it, which stages trained nothing, and why."""
    stages = list(stages)
    names = "stage split n greedy pass@k gap reward-pass@2 unparsed kept T seconds"
    head = tuple(names.split())
    shares = ("greedy_accuracy", "pass_at_k", "gap", "reward_pass_at_2", "unparsed")
    rows: list[Sequence[str]] = [head]
    for s in stages:
        name = s["stage"] if s["stage"] != "iteration" else f"iteration {s['iteration']}"
        values: Mapping[str, Any] = s
        percent = [f"{100 * values[key]:5.1f}%" if key in values else "" for key in shares]
        kept = "" if s["kept"] is None else str(s["kept"])
        used = "" if s["temperature"] is None else f"{s['temperature']:g}"
        end = (kept, used, f"{s['seconds']:.0f}")
        rows.append((name, s["split"], str(s["n"]), *percent, *end))
    return untrained(stages) + _aligned(rows, left=2)


def untrained(stages: Iterable[Record]) -> str:
    """A line that says which stages trained nothing, and what became of their responses; empty for none."""
    lost = [s for s in stages if s["kept"] == 0]
    causes = {(s["stage"], s["iteration"]): s.get("dropped", {}) for s in lost}
    if not causes:
        return ""
    gradients = ["trained_groups" in s for s in lost]
    reasons = ["no response was kept"] * (not all(gradients))
    reasons += ["no query's responses had different rewards"] * any(gradients)
    names = ", ".join(f"{stage} {number}" if number else stage for stage, number in causes)
    total = collections.Counter[str]()
    for each in causes.values():
        total.update(each)
    found = ", ".join(f"{count} {cause}" for cause, count in total.most_common() if count)
    return f"Nothing was trained in {names}, for {' or '.join(reasons)}. What became of them: {found}\n\n"


def speeds(stages: Iterable[Record]) -> str:
    """The speeds in the records, by kind of work, as a table for the terminal; empty without any."""
    found: dict[str, list[dict[str, float]]] = {}
    for s in stages:
        for kind, passes in s.get("speed", {}).items():
            if worked := [each for each in passes.values() if each.get("slots")]:  # others had nothing to do
                found.setdefault(kind, []).extend(worked)
    totals = {kind: _total(passes) for kind, passes in found.items()}
    mfu = any(key.startswith("mfu/") for total in totals.values() for key in total)
    unit, title, scale = ("mfu/", "MFU %", 100.0) if mfu else ("flops/", "GFLOP/s", 1e-9)
    parts = ("vision", "projector", "language")
    rows: list[Sequence[str]] = [("work", "tokens/s", "padding", title, *parts, "seconds", "compiling")]
    for kind, total in totals.items():
        costs = [
            sum(total[key] for key in list(total) if key.startswith(unit + part)) for part in ("", *parts)
        ]
        shown = [_number(scale * cost, 1) for cost in costs]
        shown += [f"{total[key]:.1f}" for key in ("seconds", "left_out")]
        speed, padding = _number(total["tokens_per_second"]), 1 - total["tokens"] / total["slots"]
        two = bool(total["decode_slots"])
        rows.append((f"{kind}: prefill" if two else kind, speed, f"{100 * padding:.1f}%", *shown))
        if two:
            speed, padding = (
                _number(total["decoded_per_second"]),
                1 - total["decoded"] / total["decode_slots"],
            )
            rows.append((f"{kind}: decode", speed, f"{100 * padding:.1f}%", *[""] * len(shown)))
    return _aligned(rows, left=1) if found else ""


def _total(passes: Iterable[dict[str, float]]) -> dict[str, float]:
    """Several passes as one: counts are added up, rates weighted by their seconds."""
    out: dict[str, float] = collections.defaultdict(float)
    for each in passes:
        for key, value in each.items():
            out[key] += value * (each["seconds"] if _is_rate(key) else 1)
    for key in filter(_is_rate, list(out)):
        out[key] /= out["seconds"] or 1.0
    return out


def _is_rate(key: str) -> bool:
    return "/" in key or key.endswith("_per_second")


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}" if value else ""


def _aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """A table with a line under its head; so many columns are set flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(text: str) -> str:
    """Text as a cell of a Markdown table shows it: what a model wrote is no markup and ends no row."""
    shown = html.escape(text, quote=False).replace("|", "\\|").replace("`", "&#96;")
    return "<br>".join(shown.splitlines())


def write_samples(
    path: pathlib.Path, queries: Sequence[Query], groups: Sequence[Sequence[Response]], show: int
) -> None:
    """A readable Markdown table of the first responses: question with its options, link to the image,
    responses, verdicts."""
    if not processes.first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("query", "image", "question", "gold", "T", "verdict", "response")
    lines = [f"# Samples: {path.stem}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for query, group in list(zip(queries, groups))[:show]:
        image = " ".join(
            f"[{_cell(pathlib.Path(p).name)}]({urllib.parse.quote(os.path.relpath(p, path.parent))})"
            for p in query.images
        )
        for r in group[:4]:
            question = " ".join(query.question.split()) + prompts.listed(query.options)
            said = [_cell(str(each)) for each in (query.answer, f"{r.temperature:g}", r.verdict, r.text)]
            lines.append(f"| {' | '.join([_cell(query.id), image, _cell(question), *said])} |")
    write_text(path, "\n".join(lines) + "\n")
