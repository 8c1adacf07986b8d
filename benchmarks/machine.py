"""What measurements share: the machine and the versions they belong to, timing, and how they are shown."""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


def machine() -> dict[str, Any]:
    """The processor, the first accelerator, and how busy the cores are already."""
    text, device = pathlib.Path("/proc/cpuinfo"), jax.devices()[0]
    found = re.search(r"model name\s*: (.*)", text.read_text()) if text.exists() else None
    return {
        "cpu": found[1] if found else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load average": round(os.getloadavg()[0], 2),
        "device": f"{device.platform}: {device.device_kind}",
    }


def versions(*packages: str) -> dict[str, str]:
    """Of Python and these packages."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds by the clock, seconds of processor time) of every repeat of every run; other programs on the
    machine disturb the latter less.

    All take turns, A B A B, so that whatever else the machine does falls on all of them. A run waits for its
    result, and has gone once before: nothing is compiled here.
    """
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter(), time.process_time()
            run()
            spent[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return spent


def spread(spent: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Median, least and greatest by the clock, and the median of processor time."""
    wall, processor = zip(*spent)
    found = {"seconds": statistics.median(wall), "least": min(wall), "greatest": max(wall)}
    return found | {"processor": statistics.median(processor)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a column for every key of the first row; floats with three digits that count."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "" if value is None else str(value)

    cells = [list(rows[0]), ["---"] * len(rows[0]), *([text(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def show(record: dict[str, Any], out: str) -> None:
    """Prints a record, whose `results` are rows of a table, and writes it as JSON to the file `out`."""
    for name, values in record.items():
        if name != "results":
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in values.items())}\n")
    print(table(record["results"]), flush=True)
    if out:
        pathlib.Path(out).write_text(json.dumps(record, indent=2) + "\n")
