"""The paper's ablations at small scale: Tables 1 to 3, which part of continuous training matters, objectives.

    python -m mstar_jax.ablate --config=configs/tiny.py:ablation --tables=1,2,3,4 --seeds=3 [--jobs=2]
    python -m mstar_jax.ablate --config=configs/tiny.py:ablation --tables=5 --seeds=3

Every seed has one base model, one warm-up and one reward model. Every row of the tables is a run of the main
job that continues from them, in a folder of its own that can be looked at and reported on like any other run.
A second start of the same command skips finished rows. Results are in <workdir>/tables.md and tables.json.

    <workdir>/seed_0/shared           base, warm-up, reward model
    <workdir>/seed_0/top_2            a row
"""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import scipy.stats
from absl import app, flags

from configs.ablations import SHARED, TABLES_BY_NUMBER, Row, values_of
from configs.variants import Values
from mstar_jax import cli
from mstar_jax.cli import CONFIG, WORKDIR
from mstar_jax.store import read_json, write_text
from mstar_jax.workdir import FREE, changes

TABLES = flags.DEFINE_list("tables", ["1", "2", "3", "4"], "Which tables.")
ROWS = flags.DEFINE_list("rows", [], "Only these rows of them, in this order, by the names of their folders.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds; the first is the config's.")
JOBS = flags.DEFINE_integer("jobs", 1, "Rows that run at the same time.")

# ---- 1. runs ------------------------------------------------------------------------------------------


def fork(shared: pathlib.Path, folder: pathlib.Path) -> None:
    """A new workdir in the state of another one; its files are hard links, so it takes no space."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy2(source, target)

    own = shutil.ignore_patterns("config.json", "lock", "report")
    shutil.copytree(shared, part, copy_function=link, ignore=own)
    part.rename(folder)


def claim(workdir: pathlib.Path, values: dict[str, Any]) -> None:
    """Notes the values in a new workdir; its finished rows are not looked at again.

    Raises:
      UsageError: its rows have other values.
    """
    path = workdir / "config.json"
    there = read_json(path) if path.exists() else values
    told = [f"{key}: {a} there, {b} now" for key, a, b in changes(there, values) if key not in FREE]
    if told:
        raise app.UsageError(f"{workdir} has other values ({'; '.join(told)}): name another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=1))


def finished(folder: pathlib.Path, iterations: int) -> bool:
    """Whether a row has been measured at its end."""
    path = folder / "results.json"
    records = json.loads(path.read_text())["stages"] if path.exists() else []
    last = "iteration" if iterations else "warmup"
    return any((r["stage"], r["iteration"], r["split"]) == (last, iterations, "test") for r in records)


def run(todo: Mapping[str, Values], workdir: pathlib.Path, iterations: int) -> list[str]:
    """Runs main jobs, up to `--jobs` at the same time.

    Args:
      todo: by the folder in `workdir` (seed_0/top_2), what the run changes in the config.
      workdir: of the ablation.
      iterations: of a run that does not change them.

    Returns:
      The folders of those that failed.
    """
    waiting = [
        name
        for name, values in todo.items()
        if not finished(workdir / name, values.get("evolve.iterations", iterations))
    ]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    (workdir / "logs").mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < JOBS.value:
                name = waiting.pop(0)
                folder = workdir / name
                if folder.name != SHARED.name and not folder.exists():
                    fork(folder.with_name(SHARED.name), folder)
                running[name] = _start(workdir, name, todo[name])
                print(f"{name}: started, {len(waiting)} waiting", flush=True)
            for name, process in list(running.items()):
                try:
                    code = process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    continue
                del running[name]
                if code:
                    failed.append(name)
                    print(f"{name}: ended with {code}, see {_log(workdir, name)}", flush=True)
    finally:  # when this command is stopped, so are its rows; they save and can continue later
        for process in running.values():
            process.terminate()
        for process in running.values():  # they hold their folders until then
            process.wait()
    return failed


def _start(workdir: pathlib.Path, name: str, values: Values) -> subprocess.Popen[bytes]:
    """Starts the main job of a row."""
    command = [sys.executable, "-m", "mstar_jax.main", *_passed_on(sys.argv[1:])]
    command += [f"--config.{key}={value}" for key, value in values.items()]
    command += [f"--workdir={workdir / name}"]
    with open(_log(workdir, name), "ab") as file:
        file.write((" ".join(command) + "\n").encode())
        file.flush()
        return subprocess.Popen(command, stdout=file, stderr=file)


def _passed_on(arguments: Sequence[str]) -> list[str]:
    """The command line without this command's own flags: a row reads the others by the same rules."""
    own = {flag.name for flag in (TABLES, ROWS, SEEDS, JOBS, WORKDIR)}
    found, value = list[str](), False
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name in own:
            value = not equals  # of an own flag comes next
        elif value:
            value = False
        else:
            found.append(argument)
    return found


def _shared(name: str) -> str:
    """seed_0/top_2 -> seed_0/shared"""
    return f"{name.split('/')[0]}/{SHARED.name}"


def _log(workdir: pathlib.Path, name: str) -> pathlib.Path:
    return workdir / "logs" / f"{name.replace('/', '_')}.txt"


# ---- 2. tables ----------------------------------------------------------------------------------------

MEASURES = {"greedy_accuracy": "greedy", "all_right": "all steps right", "pass_at_k": "Pass@K", "gap": "gap"}
MEASURES |= {"entropy": "entropy (nats)"}
NATS = ("entropy",)  # the others are shares, in %


class Summary(TypedDict):
    """Values over the seeds, their mean, and the half-width of its 95 % interval (None for one value)."""

    values: list[float]
    mean: float
    interval: float | None


def summary(values: Sequence[float]) -> Summary:
    """The summary of a measure; its interval is Student's t."""
    n = len(values)
    width = None
    if n > 1:
        width = float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return {"values": list(values), "mean": float(np.mean(values)), "interval": width}


def last_record(folder: pathlib.Path) -> dict[str, Any]:
    """A row's test record at its end (for `shared` the warm-up's); empty before it: a row that was killed may
    have been tested on the way (`eval.test_at`)."""
    path = folder / "results.json"
    there = json.loads(path.read_text()) if path.exists() else {"stages": []}
    stage = "warmup" if folder.name == SHARED.name else "iteration"
    found = [r for r in there["stages"] if r["split"] == "test" and r["stage"] == stage]
    found = [r for r in found if r["iteration"] == there["config"]["evolve"]["iterations"]]
    return found[-1] if found else {}


def measured(folder: pathlib.Path) -> dict[str, float]:
    """MEASURES of a row at its end, shares in %."""
    last = last_record(folder)
    return {key: (1 if key in NATS else 100) * last[key] for key in MEASURES if key in last}


def measured_by_part(folder: pathlib.Path) -> dict[str, float]:
    """MEASURES of each part of the test split, such as held-out figures, by their columns, in %."""
    parts = last_record(folder).get("parts", {})
    return {
        f"{title}, {part}": 100 * values[key]
        for key, title in MEASURES.items()
        for part, values in parts.items()
        if key in values
    }


def table(
    workdir: pathlib.Path, rows: Sequence[Row], seeds: Sequence[int], against: str
) -> list[dict[str, Any]]:
    """The records of a table, one for each row and first for the warm-up.

    Each has name, title, the paper's numbers, `seeds` (how many are finished), the summary of every measure
    over the seeds in %, and summaries of differences within a seed: of greedy accuracy from the warm-up
    (`gain`), and of greedy accuracy and all steps right from the row `against` (`greedy_difference`,
    `all_right_difference`). `parts` has the summaries for each part of the test split, if it has several.
    """
    out = []
    for row in (SHARED, *rows):
        found, by_part = [], []
        for seed in seeds:
            folder = workdir / f"seed_{seed}"
            if values := measured(folder / row.name):
                found.append((values, measured(folder / SHARED.name), measured(folder / against)))
                by_part.append(measured_by_part(folder / row.name))
        shown = {key: [values[key] for values, _, _ in found if key in values] for key in MEASURES}
        if row.name != SHARED.name:
            shown["gain"] = differences([(values, shared) for values, shared, _ in found], "greedy_accuracy")
        if row.name != against:
            pairs = [(values, other) for values, _, other in found]
            shown["greedy_difference"] = differences(pairs, "greedy_accuracy")
            shown["all_right_difference"] = differences(pairs, "all_right")
        record: dict[str, Any] = {"name": row.name, "title": row.title, "paper": row.paper}
        record["seeds"] = len(found)
        names = dict.fromkeys(name for values in by_part for name in values)
        record["parts"] = {name: summary([v[name] for v in by_part if name in v]) for name in names}
        out.append(record | {name: summary(values) for name, values in shown.items() if values})
    return out


def differences(pairs: Sequence[tuple[dict[str, float], dict[str, float]]], key: str) -> list[float]:
    """first[key] - second[key] of the pairs in which both have the key."""
    return [first[key] - second[key] for first, second in pairs if key in first and key in second]


def markdown(title: str, records: Sequence[dict[str, Any]], against: str) -> str:
    """A table as Markdown: means and 95 % intervals over the seeds, and the paper's numbers; a second one for
    the parts of the test split, if it has any."""
    names = MEASURES | {
        "gain": "greedy over the warm-up",
        "greedy_difference": f"greedy over {against}",
        "all_right_difference": f"all right over {against}",
    }
    names = {key: name for key, name in names.items() if any(key in record for record in records)}
    lines = [f"### {title}", "", "| | " + " | ".join(names.values()) + " | seeds | paper |"]
    lines.append("|---|" + "---:|" * (len(names) + 1) + "---|")
    for record in (record for record in records if record["seeds"]):
        n = record["seeds"]
        cells = [
            cell(record.get(key), n, signed=key not in MEASURES, digits=2 if key in NATS else 1)
            for key in names
        ]
        paper = "{} / {}".format(*record["paper"]) if record["paper"] else "not in the paper"
        lines.append(f"| {record['title']} | " + " | ".join(cells) + f" | {record['seeds']} | {paper} |")
    if columns := list(dict.fromkeys(name for record in records for name in record["parts"])):
        lines += ["", "| by part of the test split | " + " | ".join(columns) + " | seeds |"]
        lines.append("|---|" + "---:|" * (len(columns) + 1))
        for record in (record for record in records if record["parts"]):
            n = record["seeds"]
            cells = [cell(record["parts"].get(name), n, signed=False) for name in columns]
            lines.append(f"| {record['title']} | " + " | ".join(cells) + f" | {n} |")
    if missing := [record["title"] for record in records if not record["seeds"]]:
        lines += ["", f"Not run: {', '.join(missing)}."]
    return "\n".join(lines)


def cell(found: Summary | None, seeds: int, *, signed: bool, digits: int = 1) -> str:
    """A summary as text, and over how many if not over all seeds (the row compared with has fewer); empty if
    there is none."""
    if found is None:
        return ""
    width = "" if found["interval"] is None else f" ± {found['interval']:.{digits}f}"
    count = len(found["values"])
    few = f" (n = {count})" if count < seeds else ""
    return f"{found['mean']:{'+' if signed else ''}.{digits}f}{width}{few}"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    if unknown := sorted(set(TABLES.value) - set(TABLES_BY_NUMBER)):
        known = ", ".join(TABLES_BY_NUMBER)
        raise app.UsageError(f"--tables={','.join(unknown)}: choose of {known}")
    chosen = {number: TABLES_BY_NUMBER[number] for number in TABLES.value}
    rows = {row.name: row for each in chosen.values() for row in each.rows}
    if unknown := sorted(set(ROWS.value) - set(rows)):
        raise app.UsageError(f"--rows={','.join(unknown)}: these tables have {', '.join(rows)}")
    if any(argument.lstrip("-").startswith("flagfile") for argument in sys.argv[1:]):
        raise app.UsageError("--flagfile does not reach the rows: write its flags on the command line")
    for number in cli.STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: sys.exit(143))
    config = CONFIG.value
    workdir = pathlib.Path(WORKDIR.value or "runs/ablation")
    seeds = range(config.seed, config.seed + SEEDS.value)
    try:  # of all rows, before hours go into the first
        shared = {f"seed_{seed}/{SHARED.name}": values_of(config, SHARED, seed) for seed in seeds}
        todo = {
            f"seed_{seed}/{name}": values_of(config, rows[name], seed)
            for name in ROWS.value or rows
            for seed in seeds
        }
    except ValueError as error:
        raise app.UsageError(f"{error}; choose other --rows, or change the config") from error
    claim(workdir, json.loads(config.to_json_best_effort()))
    failed = run(shared, workdir, 0)
    ready = {name: values for name, values in todo.items() if _shared(name) not in failed}
    failed += run(ready, workdir, config.evolve.iterations)
    records = {number: table(workdir, each.rows, seeds, each.against) for number, each in chosen.items()}
    write_text(workdir / "tables.json", json.dumps(records, indent=1))
    text = "\n\n".join(
        markdown(each.title, records[number], rows[each.against].title) for number, each in chosen.items()
    )
    write_text(workdir / "tables.md", text + "\n")
    print(f"\n{text}\n\n{workdir.absolute()}: tables.md, tables.json, a folder for every seed and row")
    if failed:
        sys.exit(f"did not finish: {', '.join(failed)}. Start the same command again to continue.")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.main(main)
