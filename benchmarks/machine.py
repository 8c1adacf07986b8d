"""What the measurements share: a description of the machine and versions, timing, and output."""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence

import jax

Values = dict[str, str | int | float | None]  # by name


def machine() -> Values:
    """The processor, the first accelerator, and how busy the cores already are."""
    text = pathlib.Path("/proc/cpuinfo")
    device = jax.devices()[0]
    found = re.search(r"model name\s*: (.*)", text.read_text()) if text.exists() else None
    return {
        "cpu": found[1] if found else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load average": round(os.getloadavg()[0], 2),
        "device": f"{device.platform}: {device.device_kind}",
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of these packages."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def timed(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(wall time, processor time) in seconds of every repeat of every run.

    Processor time is less disturbed by other programs on the machine. The runs take turns, A B A B, so that
    such disturbances affect all of them. A run must wait for its result, and must have run once before, so
    that nothing is compiled here.
    """
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter(), time.process_time()
            run()
            spent[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return spent


def spread(spent: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Median, minimum and maximum of wall time, and the median of processor time."""
    wall, processor = zip(*spent)
    found = {"seconds": statistics.median(wall), "least": min(wall), "greatest": max(wall)}
    return found | {"processor": statistics.median(processor)}


def table(rows: Sequence[Values]) -> str:
    """A Markdown table with a column for every key of the first row; floats have three significant digits."""

    def text(value: str | int | float | None) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "" if value is None else str(value)

    cells = [list(rows[0]), ["---"] * len(rows[0]), *([text(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def show(record: dict, out: str) -> None:
    """Prints a record, whose `results` are the rows of a table, and writes it to the file `out` as JSON."""
    for name, values in record.items():
        if name != "results":
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in values.items())}\n")
    print(table(record["results"]), flush=True)
    if out:
        pathlib.Path(out).write_text(json.dumps(record, indent=2) + "\n")
