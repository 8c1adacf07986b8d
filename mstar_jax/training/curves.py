"""Training curves: TensorBoard and CSV.

Only process 0 writes. The CSV files contain no times, so a run that was killed and restarted ends with the
same files as one that was not.
"""

import csv
import logging
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import tensorboardX
from clu import metrics as clu_metrics

from mstar_jax import processes
from mstar_jax.store import write_text
from mstar_jax.structs import Stage

log = logging.getLogger(__name__)

MEANS = ("loss", "accuracy", "grad_norm", "tokens")  # of a row: over the steps since the row before
TrainMetrics = clu_metrics.Collection.create(
    **{name: clu_metrics.Average.from_output(name) for name in MEANS}
)


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
        self.collected: clu_metrics.Collection | None = _metrics(pending) if pending else None
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
        last = start - int(pending["loss"][1] if pending else 0)  # the row that the sums go on from
        if last != (there := int(kept[-1][0]) if kept else 0):
            log.warning("%s: ends at step %d, not %d; the rows between are lost", self.path, there, last)
        write_text(self.path, "".join(",".join(row) + "\n" for row in [list(self.FIELDS), *kept]))
        self.events = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard" / stage.name), purge_step=start, write_to_disk=True
        )

    def add(self, values: dict[str, jax.Array]) -> None:
        """Adds one step's metrics; they stay on the device until `write`."""
        new = TrainMetrics.single_from_model_output(**values)
        self.collected = new if self.collected is None else self.collected.merge(new)

    def write(
        self, step: int, learning_rate: float, speed: Callable[[], dict[str, float]] = dict
    ) -> dict[str, float]:
        """Writes and returns the averages since the last call.

        Args:
          step: steps that are done.
          learning_rate: of the last one.
          speed: returns rates to write; called once the device has finished these steps.
        """
        if self.collected is None:
            return {}
        means = {name: float(value) for name, value in self.collected.compute().items()}
        means["learning_rate"] = learning_rate
        self.collected = None
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
        if self.collected is None:
            return {}
        found = {name: getattr(self.collected, name) for name in MEANS}
        return {name: [float(mean.total), int(mean.count)] for name, mean in found.items()}

    def close(self) -> None:
        """Flushes the events."""
        if self.writing:
            self.events.close()


def _metrics(pending: dict[str, list[float]]) -> clu_metrics.Collection:
    """The metrics that `StageLog.pending` summarised."""
    empty = TrainMetrics.empty()
    means = {
        name: getattr(empty, name).replace(total=jnp.float32(total), count=jnp.int32(count))
        for name, (total, count) in pending.items()
    }
    return empty.replace(**means)
