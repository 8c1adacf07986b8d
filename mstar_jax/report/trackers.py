"""A run in Weights & Biases or MLflow, from what is in its workdir.

    python -m mstar_jax.main --config=configs/tiny.py --config.tracker=wandb     # or mlflow

results.json and metrics/*.csv are the truth. A thread reads them every few seconds and sends what the
tracker does not have, so that nothing waits for a tracker, and a run that was killed goes on where the
tracker stands. Nothing leaves the machine unless the user's own settings say so: W&B is offline without
WANDB_MODE=online, and MLflow writes to <workdir>/mlruns without MLFLOW_TRACKING_URI. <workdir>/tracker.json
holds the ids of the runs there.
"""

import base64
import contextlib
import csv
import html
import io
import itertools
import json
import logging
import os
import pathlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from mstar_jax.data import prompts
from mstar_jax.ranges import flat
from mstar_jax.report import gallery, markup, runs
from mstar_jax.store import read_json, write_text
from mstar_jax.structs import Stage

EVERY = 5.0  # seconds between two looks into the workdir
PATIENCE = 120.0  # seconds that the end of a run waits for its tracker
LATER = ("seconds", "speed", "chosen")  # of a record: what another pass may still add to it
COLUMNS = ("query", "image", "question", "gold", "T", "verdict", "response")

log = logging.getLogger("mstar_jax")


class Row(NamedTuple):
    """What is sent together.

    Attributes:
      step: grows from row to row: the optimizer steps and the records before it, over all stages.
      values: numbers by name, such as `validation/greedy_accuracy`.
      samples: the store of responses, such as `base_validation`, whose table goes with it; empty for none.
    """

    step: int
    values: dict[str, float]
    samples: str = ""


class Tracker(NamedTuple):
    """Where rows go.

    Attributes:
      send: sends those of the rows that the tracker does not have.
      finish: ends the run there; is given whether it is complete, and then sends the report.
    """

    send: Callable[[Sequence[Row]], None]
    finish: Callable[[bool], None]


# ---- 1. what the workdir holds --------------------------------------------------------------------------


def rows(workdir: pathlib.Path) -> list[Row]:
    """Everything to send, in an order to which later calls only append.

    The curves of a stage and of those before it come before its records. What `explore` adds to a record
    comes after the last record of the stage, a row for each temperature.
    """
    path = workdir / "results.json"
    while True:
        before = path.read_text(encoding="utf-8") if path.exists() else '{"stages": []}'
        curves = {Stage.parse(name): found for name, found in _curves(workdir).items()}
        if not path.exists() or path.read_text(encoding="utf-8") == before:
            break  # no record has come between the two
    found: list[Row] = []
    at = 0

    def take(until: Stage | None) -> None:
        nonlocal at
        for stage in sorted(each for each in curves if until is None or each <= until):
            steps = curves.pop(stage)
            found.extend(Row(at + step, values) for step, values in steps)
            at += steps[-1][0] if steps else 0

    for (kind, number), group in itertools.groupby(
        json.loads(before)["stages"], key=lambda record: (record["stage"], record["iteration"])
    ):
        stage = Stage.parse(f"{kind}_{number:02d}" if number else kind)
        records = list(group)
        take(stage)
        for record in records:
            at += 1
            split = record["split"]
            values = {f"{split}/stage": 0.0 if stage == Stage.base else number + 1.0}
            values |= numbers({k: v for k, v in record.items() if k not in LATER}, f"{split}/")
            found.append(Row(at, values, "" if stage == Stage.reward_model else f"{stage}_{split}"))
        for record in records:
            for point in record.get("grid") or ():
                at += 1
                found.append(Row(at, numbers(point, "explore/")))
            if record.get("grid") and record.get("chosen") is not None:
                found[-1].values["explore/chosen"] = float(record["chosen"])
    take(None)
    return found


def numbers(record: Mapping[str, object], prefix: str) -> dict[str, float]:
    """The numbers of a record and of the objects in it, by their path."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found


def _curves(workdir: pathlib.Path) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """(step, values) of the rows of each stage's curve, but for a line that is being written."""
    found = {}
    for path in (workdir / "metrics").glob("*.csv"):
        with contextlib.suppress(ValueError):  # dynamics.csv is no stage's
            kind = Stage.parse(path.stem).kind
            text = path.read_text(encoding="utf-8")
            lines = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
            found[path.stem] = [
                (int(line["step"]), {f"{kind}/{k}": float(v) for k, v in line.items() if k != "step"})
                for line in lines
            ]
    return found


def samples(workdir: pathlib.Path, name: str) -> list[list[str]]:
    """A table with COLUMNS of a store's first responses; images as data URIs, empty where there is none."""
    folders = (workdir / kind / name for kind in ("scores", "rollouts"))
    folder = next((each for each in folders if each.exists()), workdir / "rollouts" / name)
    show = read_json(workdir / "config.json", "eval")["eval"]["show"]
    table = []
    for query in itertools.islice(runs.lines(folder), show):
        image = ""
        with contextlib.suppress(OSError, ValueError, IndexError):
            image = gallery.thumbnail(pathlib.Path(query["images"][0]))
        question = str(query.get("question", "")) + prompts.listed(query.get("options") or ())
        for r in query["responses"][:4]:
            said = (query.get("gold"), r.get("temperature"), r.get("verdict"), r.get("text"))
            table.append([str(query["query"]), image, question, *map(str, said)])
    return table


def _id(workdir: pathlib.Path, kind: str, make: Callable[[], str]) -> str:
    """The id of the run in a tracker, made at its first start."""
    path = workdir / "tracker.json"
    known = read_json(path) if path.exists() else {}
    if kind not in known:
        write_text(path, json.dumps({**known, kind: make()}))
    return str(read_json(path, kind)[kind])


# ---- 2. the trackers --------------------------------------------------------------------------------------


def _wandb(workdir: pathlib.Path) -> Tracker:
    """Online it goes on after the server's last step. Offline nobody knows what an earlier start has left on
    the disk, so each start writes the whole run again, in a folder of its own."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # goes to W&B, even offline
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "mstar_jax",
        name=os.environ.get("WANDB_NAME") or workdir.absolute().name,
        id=_id(workdir, "wandb", lambda: uuid.uuid4().hex[:12]),
        resume="allow",
        mode=os.environ.get("WANDB_MODE") or "offline",
        dir=os.environ.get("WANDB_DIR") or str(workdir),
        config=read_json(workdir / "config.json"),
        settings=wandb.Settings(console="off", silent=True),  # what a run prints stays its own
    )
    first = run.starting_step

    def send(found: Sequence[Row]) -> None:
        nonlocal first
        for row in found:
            if row.step < first:
                continue
            values: dict[str, object] = dict(row.values)
            if row.samples:
                table = wandb.Table(columns=list(COLUMNS))
                for query, image, *said in samples(workdir, row.samples):
                    picture = (
                        Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))) if image else None
                    )
                    table.add_data(query, wandb.Image(picture) if picture else None, *said)
                values[f"samples/{row.samples}"] = table
            run.log(values, step=row.step)
            first = row.step + 1

    def finish(complete: bool) -> None:
        report = workdir / "report" / "report.html"
        if complete and report.exists():
            artifact = wandb.Artifact(f"report-{run.id}", type="report")
            artifact.add_file(str(report))
            run.log_artifact(artifact)
        run.finish(exit_code=0 if complete else 1)

    return Tracker(send, finish)


def _mlflow(workdir: pathlib.Path) -> Tracker:
    """Goes on after the last step that the store has."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 would refuse its own files
        uri = (workdir.absolute() / "mlruns").as_uri()
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    title = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "mstar_jax"
    experiment = client.get_experiment_by_name(title)

    def create() -> str:
        number = experiment.experiment_id if experiment else client.create_experiment(title)
        made: str = client.create_run(number, run_name=workdir.absolute().name).info.run_id
        values = [Param(k, str(v)) for k, v in flat(read_json(workdir / "config.json")).items()]
        for start in range(0, len(values), 100):  # of a call, at most
            client.log_batch(made, params=values[start : start + 100])
        return made

    run = _id(workdir, "mlflow", create)
    client.update_run(run, status="RUNNING")
    there = {
        key: max(metric.step for metric in client.get_metric_history(run, key))
        for key in client.get_run(run).data.metrics
    }
    last = max(there.values(), default=-1)  # of this one, a kill may have left a part

    def send(found: Sequence[Row]) -> None:
        nonlocal last
        for row in found:
            if row.step < last:
                continue
            now = int(1000 * time.time())
            new = {_key(name): value for name, value in row.values.items()}
            new = {key: value for key, value in new.items() if there.get(key, -1) < row.step}
            if not new:
                continue
            if row.samples:  # first: numbers that are there mean that all is
                table = _html(samples(workdir, row.samples), row.samples)
                client.log_text(run, table, f"samples/{row.samples}.html")
            client.log_batch(run, metrics=[Metric(key, value, now, row.step) for key, value in new.items()])
            there.update(dict.fromkeys(new, row.step))
            last = row.step

    def finish(complete: bool) -> None:
        report = workdir / "report" / "report.html"
        if complete and report.exists():
            client.log_artifact(run, str(report))
        client.set_terminated(run, "FINISHED" if complete else "KILLED")

    return Tracker(send, finish)


def _key(name: str) -> str:
    """A name with the characters that MLflow allows."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)


def _html(table: Sequence[Sequence[str]], caption: str) -> str:
    cells = [
        [
            f'<img src="{html.escape(cell)}" alt="">' if i == 1 and cell else html.escape(cell)
            for i, cell in enumerate(row)
        ]
        for row in table
    ]
    return f'<!doctype html><meta charset="utf-8">{markup.table(COLUMNS, cells, caption)}'


# ---- 3. beside a run --------------------------------------------------------------------------------------


@contextlib.contextmanager
def following(kind: str, workdir: pathlib.Path) -> Iterator[None]:
    """Sends a run to a tracker while the block runs, and the report at its end.

    A tracker that fails, in whatever way, is given up with a warning; a later start tries again.

    Args:
      kind: `wandb` or `mlflow`; empty for neither.
      workdir: the run's, with its config.json.
    """
    if not kind:
        yield
        return
    over, complete = threading.Event(), False

    def follow() -> None:
        try:
            tracker = {"wandb": _wandb, "mlflow": _mlflow}[kind](workdir)
            while not over.wait(EVERY):
                tracker.send(rows(workdir))
            tracker.send(rows(workdir))
            tracker.finish(complete)
        except ImportError as error:
            log.warning(
                "tracker %s: %s; pip install 'mstar_jax[%s]'. The run goes on without it", kind, error, kind
            )
        except Exception as error:
            log.warning("tracker %s: %s: %s. The run goes on without it", kind, type(error).__name__, error)

    thread = threading.Thread(target=follow, name=f"tracker {kind}", daemon=True)
    thread.start()
    try:
        yield
        complete = True
    finally:
        over.set()
        thread.join(PATIENCE)
        if thread.is_alive():
            log.warning("tracker %s: has not taken everything in %.0f s, and is left", kind, PATIENCE)
