"""Progress bars, and log lines that do not break them."""

import logging
import sys

import tqdm

from mstar_jax import processes


def bar(total: int, text: str, initial: int = 0, unit: str = "it") -> tqdm.tqdm:
    """A progress bar with the time remaining; updated rarely where the output is not a terminal."""
    interval = 0.2 if sys.stderr.isatty() else 15.0  # seconds
    return tqdm.tqdm(
        total=total,
        desc=f"{text:<24}",
        initial=initial,
        unit=unit,
        mininterval=interval,
        dynamic_ncols=True,
        disable=not processes.first(),
        file=sys.stderr,
    )


class ProgressHandler(logging.Handler):
    """Writes log lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(self.format(record), file=sys.stderr)
