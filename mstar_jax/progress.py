"""Progress bars, and log lines beside them."""

import logging
import sys

import tqdm

from mstar_jax import processes


def bar(total: int, text: str, initial: int = 0, unit: str = "it") -> tqdm.tqdm:
    """A progress bar with the time to go; rare lines instead where the output is not a terminal."""
    rare = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm.tqdm(
        total=total,
        desc=f"{text:<24}",
        initial=initial,
        unit=unit,
        mininterval=rare,
        dynamic_ncols=True,
        disable=not processes.first(),
        file=sys.stderr,
    )


class ProgressHandler(logging.Handler):
    """Log lines that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(self.format(record), file=sys.stderr)
