"""Training curves: TensorBoard and CSV.

Only process 0 writes. The CSV files contain no times, so a run that was killed and restarted ends with the
same files as one that was not.
"""

import csv
import logging
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import tensorboardX

from mstar_jax import processes
from mstar_jax.store import write_text
from mstar_jax.structs import Stage

log = logging.getLogger(__name__)

MEANS = ("loss", "accuracy", "grad_norm", "tokens")  # of a row: over the steps since the row before


class StageLog:
    """The curves of one stage's training: `<workdir>/metrics/<stage>.csv` and TensorBoard events."""

    FIELDS = ("step", *MEANS, "learning_rate")

    def __init__(
        self, workdir: pathlib.Path, stage: Stage, start: int, pending: dict[str, list[float]] | None = None
    ):
        """Begins, or continues after step `start`: rows of later steps are dropped.

        Args:
          workdir: the run's folder.
          stage: which one; the files are called after it.
          start: steps that are done.
          pending: what `pending()` returned after step `start`.
        """
        self.path = workdir / "metrics" / f"{stage}.csv"
        self.writing = processes.first()
        self.unread: list[dict[str, jax.Array]] = []  # of the steps since the row before
        self.sums = {name: np.float32(pending[name][0]) if pending else np.float32(0) for name in MEANS}
        self.count = int(pending["loss"][1]) if pending else 0  # of the steps in the sums
        if not self.writing:
            return
        kept = []
        if self.path.exists():
            with open(self.path, newline="") as file:
                whole = [row for row in csv.reader(file) if len(row) == len(self.FIELDS)]
                rows = [row for row in whole if row[0].isdigit()]
            # one a step, in their order, whatever two runs at once have left there
            kept = [
                row for _, row in sorted({int(row[0]): row for row in rows}.items()) if int(row[0]) <= start
            ]
        last = start - self.count  # the row that the sums go on from
        if last != (there := int(kept[-1][0]) if kept else 0):
            log.warning("%s: ends at step %d, not %d; the rows between are lost", self.path, there, last)
        write_text(self.path, "".join(",".join(row) + "\n" for row in [list(self.FIELDS), *kept]))
        self.events = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard" / stage.name), purge_step=start, write_to_disk=True
        )

    def add(self, values: dict[str, jax.Array]) -> None:
        """Adds one step's metrics; they stay on the device until `write`."""
        self.unread.append(values)

    def _read(self) -> None:
        """Adds up on the host, in float32: on the device every sum would be a program."""
        for values in jax.device_get(self.unread):
            self.sums = {name: total + np.float32(values[name]) for name, total in self.sums.items()}
        self.count += len(self.unread)
        self.unread = []

    def write(
        self, step: int, learning_rate: float, speed: Callable[[], dict[str, float]] = dict
    ) -> dict[str, float]:
        """Writes and returns the averages since the last call.

        Args:
          step: steps that are done.
          learning_rate: of the last one.
          speed: returns rates to write; called once the device has finished these steps.
        """
        self._read()
        if not self.count:
            return {}
        means = {name: float(total / np.float32(self.count)) for name, total in self.sums.items()}
        means["learning_rate"] = learning_rate
        self.sums, self.count = dict.fromkeys(MEANS, np.float32(0)), 0
        rates = speed()
        if self.writing:
            with open(self.path, "a", newline="") as file:
                row = [step, *(f"{means[name]:.8g}" for name in self.FIELDS[1:])]
                csv.writer(file, lineterminator="\n").writerow(row)
            for name, value in means.items():
                self.events.add_scalar(f"train/{name}", value, step)
            for name, value in rates.items():
                self.events.add_scalar(f"speed/{name}", value, step)
        return means

    def pending(self) -> dict[str, list[float]]:
        """[sum, count] of every mean since the last row, so that a checkpoint between two rows keeps them."""
        self._read()
        return {name: [float(total), self.count] for name, total in self.sums.items()} if self.count else {}

    def close(self) -> None:
        """Flushes the events."""
        if self.writing:
            self.events.close()
