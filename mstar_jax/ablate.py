"""The paper's ablations at small scale: Tables 1 to 3, and which part of continuous training matters.

    python -m mstar_jax.ablate --config=configs/tiny.py:ablation --tables=1,2,3,4 --seeds=3 [--jobs=2]

Every seed has one base model, one warm-up and one reward model; every row of the tables is a run of the main
job that goes on from them, with its own folder, which can be looked at and reported on like any other.
Started again, finished rows are not run again. The tables stand in <workdir>/tables.md and tables.json.

    <workdir>/seed_0/shared           base, warm-up, reward model
    <workdir>/seed_0/top_2            a row
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import scipy.stats
from absl import app, flags

from mstar_jax.cli import CONFIG, WORKDIR
from mstar_jax.store import write_text

TABLES = flags.DEFINE_list("tables", ["1", "2", "3", "4"], "Which tables.")
ROWS = flags.DEFINE_list("rows", [], "Only these rows of them, in this order; names of their folders.")
SEEDS = flags.DEFINE_integer("seeds", 3, "How many; the first is the config's.")
JOBS = flags.DEFINE_integer("jobs", 1, "Rows that run side by side.")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
      name: of its folder.
      title: in the tables.
      values: what it changes in the config; `interval` stands for the share of the queries an iteration.
      paper: accuracy on MathV360K and MathVista, %, with MiniCPM-V-2.5.
    """

    name: str
    title: str
    values: dict[str, Any]
    paper: tuple[float, float] | None = None


PLAIN = {"evolve.select": "random", "evolve.keep": 0, "prm.queries": 0}  # all correct responses, no PRM
BY_LOT = {"evolve.select": "random", "prm.queries": 0}
MOMENTS, SCHEDULE = {"evolve.reset_moments": True}, {"evolve.reset_schedule": True}
RESET, CONSTANT = MOMENTS | SCHEDULE, {"evolve.final_fraction": 1.0}
ORACLE = {"evolve.unlabelled.mixin": 0.0, "evolve.unlabelled.oracle": True}


def votes(mixin: float) -> dict[str, Any]:
    return {"evolve.unlabelled.mixin": mixin}


ROWS_OF = {
    "1": [
        Row("sft", "SFT", {"evolve.data": "answers", "prm.queries": 0}, (44.3, 54.8)),
        Row("iterative_rft", "Iterative RFT", PLAIN | RESET | {"interval": 1.0}, (42.3, 55.7)),
        Row("rest_em", "ReST^EM", PLAIN | RESET | {"interval": 1.0, "evolve.start": "initial"}, (42.3, 55.1)),
        Row("continuous_100", "Continuous, 100 %", PLAIN | {"interval": 1.0}, (42.2, 56.7)),
        Row("continuous_50", "Continuous, 50 %", PLAIN | {"interval": 0.5}, (43.1, 56.2)),
        Row("continuous_25", "Continuous, 25 %", PLAIN | {"interval": 0.25}, (43.1, 57.2)),
        Row("continuous_12", "Continuous, 12.5 %", PLAIN | {"interval": 0.125}, (42.3, 56.1)),
        Row("continuous_6", "Continuous, 6.25 %", PLAIN | {"interval": 0.0625}, (41.0, 56.8)),
    ],
    "2": [
        Row("continuous_25", "no PRM: all correct", PLAIN | {"interval": 0.25}, (43.1, 57.2)),
        Row("random_2", "Random-2", BY_LOT, (41.0, 55.5)),
        Row("above", "PRM > 0.25", {"evolve.keep": 0, "evolve.threshold": 0.25}, (43.8, 57.5)),
        Row("top_1", "PRM Top-1", {"evolve.keep": 1}, (43.0, 59.0)),
        Row("top_2", "PRM Top-2", {}, (45.3, 59.2)),
        Row("top_4", "PRM Top-4", {"evolve.keep": 4}, (44.0, 58.4)),
        Row("likelihood_2", "warm-up's likelihood, Top-2", {"evolve.select": "likelihood", "prm.queries": 0}),
        Row("frequency_2", "most frequent, Top-2", {"evolve.select": "frequency", "prm.queries": 0}),
        Row("oracle_2", "generator's truth, Top-2", {"evolve.select": "oracle", "prm.queries": 0}),
        Row("adaptive", "PRM Top-2, adaptive T (M-STaR)", {"explore.adapt": True, "explore.every": 2}),
    ],
    "3": [
        Row("continuous_25", "labelled only, no PRM", PLAIN | {"interval": 0.25}, (43.1, 57.2)),
        Row("top_2", "labelled only, PRM", {}, (45.3, 59.2)),
        Row("oracle_mix", "true answers, no PRM, from 0 %", PLAIN | ORACLE, (42.5, 58.2)),
        Row("oracle_mix_prm", "true answers, PRM, from 0 %", ORACLE, (42.9, 59.1)),
        Row("mix_0", "votes, PRM, from 0 %", votes(0.0), (43.3, 58.2)),
        Row("mix_25", "votes, PRM, from 25 %", votes(0.25), (42.4, 57.6)),
        Row("mix_50", "votes, PRM, from 50 %", votes(0.5), (42.9, 58.2)),
        Row("mix_75", "votes, PRM, from 75 %", votes(0.75), (45.0, 58.8)),
    ],
    "4": [
        Row("random_2", "both carried on, cosine over the run", BY_LOT),
        Row("new_moments", "new moments, cosine over the run", BY_LOT | MOMENTS),
        Row("new_schedule", "moments carried on, cosine an iteration", BY_LOT | SCHEDULE),
        Row("new_both", "both new, cosine an iteration", BY_LOT | RESET),
        Row("constant", "both carried on, constant rate", BY_LOT | CONSTANT),
        Row("constant_new_moments", "new moments, constant rate", BY_LOT | CONSTANT | MOMENTS),
    ],
}  # fmt: skip
TITLES = {
    "1": "Table 1: training methods (no reward model)",
    "2": "Table 2: selection of the correct responses (continuous, 25 %)",
    "3": "Table 3: unlabelled queries (continuous, 25 %)",
    "4": "Continuous training, one part at a time (Random-2, 25 %)",
}


def values_of(config: ml_collections.ConfigDict, row: Row | None, seed: int) -> dict[str, Any]:
    """What a row changes in the config; None stands for what the rows of a seed share.

    All rows see as many queries and take as many steps in all as the config says.
    """
    e = config.evolve
    values = {"seed": seed, "data.seed": seed, "explore.adapt": False, "explore.every": 0}
    if "figures" in config.data:  # as many queries without answers as with them
        values["data.figures.unlabelled"] = config.data.figures.train
    if row is None:
        return values | {"evolve.iterations": 0}
    own = dict(row.values)
    if interval := own.pop("interval", None):
        count = round(e.iterations * e.fraction / interval)
        if not math.isclose(count * interval, e.iterations * e.fraction):
            passes = f"evolve.iterations x evolve.fraction = {e.iterations * e.fraction:g} passes"
            raise ValueError(
                f"{row.name}: {passes} over the queries cannot be cut into intervals of {interval}"
            )
        values |= {"evolve.fraction": interval, "evolve.iterations": count}
        values |= {"evolve.steps": e.iterations * e.steps // count}
    values["eval.every"] = max(1, values.get("evolve.iterations", e.iterations) // 4)
    return values | own


def fork(shared: pathlib.Path, folder: pathlib.Path) -> None:
    """A new workdir that stands where another one does; its files are links, so it takes no room."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy2(source, target)

    shutil.copytree(shared, part, copy_function=link, ignore=shutil.ignore_patterns("config.json", "report"))
    part.rename(folder)


def finished(folder: pathlib.Path, iterations: int) -> bool:
    """Whether a row has been measured at its end."""
    path = folder / "results.json"
    records = json.loads(path.read_text())["stages"] if path.exists() else []
    last = "iteration" if iterations else "warmup"
    return any((r["stage"], r["iteration"], r["split"]) == (last, iterations, "test") for r in records)


def run(todo: Sequence[tuple[str, dict[str, Any]]], workdir: pathlib.Path, iterations: int) -> list[str]:
    """Runs (seed_0/top_2, its values) as main jobs, some side by side; returns those that failed."""
    waiting = [
        (name, values)
        for name, values in todo
        if not finished(workdir / name, values.get("evolve.iterations", iterations))
    ]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    compiled = {"JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled").absolute())}
    given = _config_flags(sys.argv[1:])
    (workdir / "logs").mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < JOBS.value:
                name, values = waiting.pop(0)
                folder = workdir / name
                if folder.name != "shared" and not folder.exists():
                    fork(folder.with_name("shared"), folder)
                own = [f"--config.{key}={value}" for key, value in values.items()]
                command = [sys.executable, "-m", "mstar_jax.main", *given, *own, f"--workdir={folder}"]
                with open(_log(workdir, name), "ab") as file:
                    file.write((" ".join(command) + "\n").encode())
                    file.flush()
                    running[name] = subprocess.Popen(
                        command, env=compiled | os.environ, stdout=file, stderr=file
                    )
                print(f"{name}: started, {len(waiting)} wait", flush=True)
            for name, process in list(running.items()):
                try:
                    code = process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    continue
                del running[name]
                if code:
                    failed.append(name)
                    print(f"{name}: ended with {code}, see {_log(workdir, name)}", flush=True)
    finally:  # told to stop: so are the rows, which save and go on another time
        for process in running.values():
            process.terminate()
    return failed


def _config_flags(arguments: Sequence[str]) -> list[str]:
    """Those of --config and below it, as one argument each."""
    found = list[str]()
    for at, argument in enumerate(arguments):
        if argument.lstrip("-").split("=")[0].split(".")[0] == "config" and argument.startswith("-"):
            found.append(argument if "=" in argument else f"{argument}={arguments[at + 1]}")
    return found


def _log(workdir: pathlib.Path, name: str) -> pathlib.Path:
    return workdir / "logs" / f"{name.replace('/', '_')}.txt"


# ---- tables -------------------------------------------------------------------------------------------

MEASURES = {"greedy_accuracy": "greedy", "all_right": "all steps right", "pass_at_k": "Pass@K", "gap": "gap"}
AGAINST = {"1": "continuous_25", "2": "random_2", "3": "top_2", "4": "random_2"}  # whom a table compares with


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Values, their mean, and the half width of its 95 % interval by Student's t (None for one value)."""
    n, width = len(values), None
    if n > 1:
        width = float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return {"values": list(values), "mean": float(np.mean(values)), "interval": width}


def measured(folder: pathlib.Path) -> dict[str, float]:
    """The last test record of a row or, of `shared`, the warm-up's, in %; empty where there is none."""
    path = folder / "results.json"
    records = json.loads(path.read_text())["stages"] if path.exists() else []
    stage = "warmup" if folder.name == "shared" else "iteration"
    found = [r for r in records if r["split"] == "test" and r["stage"] == stage]
    return {key: 100 * found[-1][key] for key in MEASURES if key in found[-1]} if found else {}


def table(
    workdir: pathlib.Path, rows: Sequence[Row], seeds: Sequence[int], against: str
) -> list[dict[str, Any]]:
    """Per row: title, the paper's numbers, `seeds` (how many are there), every measure's summary over the
    seeds in %, and differences seed by seed: of greedy accuracy from the warm-up (`gain`), of greedy accuracy
    and all steps right from the row `against` (`greedy_difference`, `all_right_difference`)."""
    out = []
    for row in [Row("shared", "warm-up", {}, (38.8, 52.6)), *rows]:
        found = [
            tuple(measured(workdir / f"seed_{s}" / name) for name in (row.name, "shared", against))
            for s in seeds
        ]
        there = [each for each in found if each[0]]
        record: dict[str, Any] = {"name": row.name, "title": row.title, "paper": row.paper}
        record["seeds"] = len(there)
        parts = {key: [one[key] for one, _, _ in there if key in one] for key in MEASURES}
        for name, key, other in (
            ("gain", "greedy_accuracy", 1),
            ("greedy_difference", "greedy_accuracy", 2),
            ("all_right_difference", "all_right", 2),
        ):
            if row.name != ("shared", against)[other - 1]:
                parts[name] = [e[0][key] - e[other][key] for e in there if key in e[0] and key in e[other]]
        out.append(record | {name: summary(values) for name, values in parts.items() if values})
    return out


def markdown(title: str, records: Sequence[dict[str, Any]], against: str) -> str:
    """A table as Markdown: mean and 95 % interval over the seeds, beside the paper's numbers."""
    names = MEASURES | {"gain": "greedy over the warm-up"}
    names |= {
        "greedy_difference": f"greedy over {against}",
        "all_right_difference": f"all right over {against}",
    }
    names = {key: name for key, name in names.items() if any(key in record for record in records)}
    lines = [f"### {title}", "", "| | " + " | ".join(names.values()) + " | seeds | paper |"]
    lines.append("|---|" + "---:|" * (len(names) + 1) + "---|")
    for record in (record for record in records if record["seeds"]):
        cells = []
        for key in names:
            found = record.get(key)
            width = f" ± {found['interval']:.1f}" if found and found["interval"] is not None else ""
            signed = "+.1f" if key == "gain" or key.endswith("difference") else ".1f"
            cells.append(f"{found['mean']:{signed}}{width}" if found else "")
        paper = "{} / {}".format(*record["paper"]) if record["paper"] else "not in the paper"
        lines.append(f"| {record['title']} | " + " | ".join(cells) + f" | {record['seeds']} | {paper} |")
    if missing := [record["title"] for record in records if not record["seeds"]]:
        lines += ["", f"Not run: {', '.join(missing)}."]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    if unknown := sorted(set(TABLES.value) - set(ROWS_OF)):
        raise app.UsageError(f"there is no table {', '.join(unknown)}; there are {', '.join(ROWS_OF)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value or "runs/ablation")
    seeds = range(config.seed, config.seed + SEEDS.value)
    rows = {row.name: row for number in TABLES.value for row in ROWS_OF[number]}
    if unknown := sorted(set(ROWS.value) - set(rows)):
        raise app.UsageError(f"these tables have no row {', '.join(unknown)}; they have {', '.join(rows)}")
    rows = {name: rows[name] for name in ROWS.value or rows}
    shared = [(f"seed_{s}/shared", values_of(config, None, s)) for s in seeds]
    failed = run(shared, workdir, 0)
    ready = [s for s in seeds if f"seed_{s}/shared" not in failed]
    todo = [(f"seed_{s}/{name}", values_of(config, row, s)) for name, row in rows.items() for s in ready]
    failed += run(todo, workdir, config.evolve.iterations)
    tables = {number: table(workdir, ROWS_OF[number], seeds, AGAINST[number]) for number in TABLES.value}
    write_text(workdir / "tables.json", json.dumps(tables, indent=1))
    titles = {row.name: row.title for row in rows.values()}
    text = "\n\n".join(
        markdown(TITLES[number], records, titles.get(AGAINST[number], AGAINST[number]))
        for number, records in tables.items()
    )
    write_text(workdir / "tables.md", text + "\n")
    print(f"\n{text}\n\n{workdir.absolute()}: tables.md, tables.json, a folder for every seed and row")
    if failed:
        sys.exit(f"did not finish: {', '.join(failed)}. Start the same command again to go on.")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
