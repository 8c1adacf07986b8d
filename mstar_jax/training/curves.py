"""Training curves: TensorBoard and CSV.

Only process 0 writes. The CSV files hold no times, so a run that was killed and restarted ends with the
same files as one that was not.
"""

import csv
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tensorboardX
from clu import metrics as clu_metrics

from mstar_jax import processes
from mstar_jax.store import write_text

MEANS = ("loss", "accuracy", "grad_norm", "tokens")  # of a row: over the steps since the row before
TrainMetrics = clu_metrics.Collection.create(
    **{name: clu_metrics.Average.from_output(name) for name in MEANS}
)


class StageLog:
    """Curves of one stage's training: `<workdir>/metrics/<stage>.csv` and TensorBoard events."""

    FIELDS = ("step", *MEANS, "learning_rate")

    def __init__(
        self, workdir: pathlib.Path, stage: str, start: int, pending: dict[str, list[float]] | None = None
    ):
        """Begins, or goes on behind step `start`: rows of later steps are dropped.

        Args:
          workdir: of the run.
          stage: its name, which the files bear.
          start: steps already done.
          pending: what `pending()` gave after step `start`.
        """
        self.path = workdir / "metrics" / f"{stage}.csv"
        self.writing = processes.first()
        self.collected: Any = None  # a TrainMetrics
        if pending:
            empty = TrainMetrics.empty()
            sums = {
                name: getattr(empty, name).replace(total=jnp.float32(total), count=jnp.int32(count))
                for name, (total, count) in pending.items()
            }
            self.collected = empty.replace(**sums)
        if not self.writing:
            return
        kept = []
        if self.path.exists():
            with open(self.path, newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit()]
            kept = [row for row in rows if int(row[0]) <= start]
        write_text(self.path, "".join(",".join(row) + "\n" for row in [list(self.FIELDS), *kept]))
        self.events = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard" / stage), purge_step=start, write_to_disk=True
        )

    def add(self, values: dict[str, jax.Array]) -> None:
        """Takes one step's metrics; they stay on the device until `write`."""
        new = TrainMetrics.single_from_model_output(**values)
        self.collected = new if self.collected is None else self.collected.merge(new)

    def write(
        self, step: int, learning_rate: float, speed: Callable[[], dict[str, float]] = dict
    ) -> dict[str, float]:
        """Writes the averages since the last call and returns them; `speed` is asked for the rates once the
        device has been waited for."""
        if self.collected is None:
            return {}
        means = {k: float(v) for k, v in self.collected.compute().items()} | {"learning_rate": learning_rate}
        self.collected, rates = None, speed()
        if self.writing:
            with open(self.path, "a", newline="") as file:
                row = [step, *(f"{means[k]:.8g}" for k in self.FIELDS[1:])]
                csv.writer(file, lineterminator="\n").writerow(row)
            for name, value in means.items():
                self.events.add_scalar(f"train/{name}", value, step)
            for name, value in rates.items():
                self.events.add_scalar(f"speed/{name}", value, step)
        return means

    def pending(self) -> dict[str, list[float]]:
        """[sum, count] of every mean since the last row: a checkpoint between two rows must not lose them."""
        if self.collected is None:
            return {}
        found = {name: getattr(self.collected, name) for name in MEANS}
        return {name: [float(mean.total), int(mean.count)] for name, mean in found.items()}

    def close(self) -> None:
        """Flushes the events."""
        if self.writing:
            self.events.close()
