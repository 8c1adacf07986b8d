"""What a stage of the host costs: time and memory."""

import dataclasses
import pathlib
import re


@dataclasses.dataclass
class Spent:
    """What a stage cost: seconds by the clock, seconds of processors, and GB resident at its peak."""

    what: str
    seconds: float = 0.0
    processor: float = 0.0
    peak: float = 0.0


def highest() -> int:
    """Peak resident memory of this process in bytes since the last `forget` (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0
