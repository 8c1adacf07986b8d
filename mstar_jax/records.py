"""What a run records: results.json, its tables, tables of samples. Only process 0 writes."""

import collections
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import tensorboardX

from mstar_jax import processes
from mstar_jax.store import write_text
from mstar_jax.structs import Query, Response


class Results:
    """`<workdir>/results.json`: a head (config, seed, versions, device), a record per evaluated stage."""

    def __init__(self, workdir: pathlib.Path, head: dict[str, Any]):
        self.workdir = workdir
        self.path = workdir / "results.json"
        self.data: dict[str, Any] = {**head, "stages": []}
        if processes.first():
            (workdir / "metrics").mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.data["stages"] = json.loads(self.path.read_text())["stages"]
        processes.barrier("results")  # read by all before one adds to them

    def find(self, stage: str, iteration: int, split: str) -> dict[str, Any] | None:
        """The record of a stage, None where it is not there yet."""
        key = (stage, iteration, split)
        return next((s for s in self.data["stages"] if (s["stage"], s["iteration"], s["split"]) == key), None)

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record and writes the file; also as TensorBoard events and a CSV of all records."""
        self.data["stages"].append(record)
        if not processes.first():
            return
        stages = self.data["stages"]
        flat = [{k: v for k, v in stage.items() if not isinstance(v, dict | list)} for stage in stages]
        names = list(dict.fromkeys(name for stage in flat for name in stage if name != "seconds"))
        rows = [names, *([stage.get(name, "") for name in names] for stage in flat)]
        text = "".join(",".join(map(str, row)) + "\n" for row in rows)
        write_text(self.workdir / "metrics" / "dynamics.csv", text)
        write_text(self.path, json.dumps(self.data, indent=1))  # last: a record here means all is written
        events = tensorboardX.SummaryWriter(str(self.workdir / "tensorboard" / "dynamics"))
        step = {"base": -1, "warmup": 0}.get(record["stage"], record["iteration"])
        for name, value in record.items():
            if isinstance(value, float) and name != "seconds":
                events.add_scalar(f"{record['split']}/{name}", value, step + 1)
        events.close()


def table(stages: Iterable[dict[str, Any]]) -> str:
    """The stages as a table for the terminal."""
    names = "stage split n greedy pass@k gap reward-pass@2 unparsed kept T seconds"
    head = tuple(names.split())
    shares = ("greedy_accuracy", "pass_at_k", "gap", "reward_pass_at_2", "unparsed")
    rows: list[Sequence[str]] = [head]
    for s in stages:
        name = s["stage"] if s["stage"] != "iteration" else f"iteration {s['iteration']}"
        percent = [f"{100 * s[key]:5.1f}%" if key in s else "" for key in shares]
        kept = "" if s["kept"] is None else str(s["kept"])
        used = "" if s["temperature"] is None else f"{s['temperature']:g}"
        end = (kept, used, f"{s['seconds']:.0f}")
        rows.append((name, s["split"], str(s["n"]), *percent, *end))
    return _aligned(rows, left=2)


def speeds(stages: Iterable[dict[str, Any]]) -> str:
    """What the stages say of their speed, by kind of work, as a table for the terminal; empty without any."""
    found: dict[str, list[dict[str, float]]] = {}
    for s in stages:
        for kind, passes in s.get("speed", {}).items():
            found.setdefault(kind, []).extend(passes.values())
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
        out[key] /= out["seconds"]
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


def write_samples(
    path: pathlib.Path, queries: Sequence[Query], groups: Sequence[Sequence[Response]], show: int
) -> None:
    """A readable Markdown table of the first responses: question, link to the image, responses, verdicts."""
    if not processes.first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("query", "image", "question", "gold", "T", "verdict", "response")
    lines = [f"# Samples: {path.stem}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for query, group in list(zip(queries, groups))[:show]:
        image = " ".join(f"[{pathlib.Path(p).name}]({os.path.relpath(p, path.parent)})" for p in query.images)
        for r in group[:4]:
            text = r.text.replace("|", "\\|").replace("\n", "<br>")
            question = query.question.replace("|", "\\|").replace("\n", " ")
            cells = (query.id, image, question, query.answer, f"{r.temperature:g}", r.verdict, text)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    write_text(path, "\n".join(lines) + "\n")
