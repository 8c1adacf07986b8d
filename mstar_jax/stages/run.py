"""What the verbs of the algorithm share: a run's values, opened once, without the algorithm's state."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
from clu import parameter_overview

from mstar_jax import configure, models, processes, records, sharding, sources
from mstar_jax.data import embedded, given, splits, truth
from mstar_jax.evaluate import evaluation
from mstar_jax.inference import generate, score
from mstar_jax.rewards import custom
from mstar_jax.store import digest, update_text, write_text
from mstar_jax.structs import Model, Query, Stage
from mstar_jax.training import optimizer
from mstar_jax.training.checkpoint import Checkpoints
from mstar_jax.training.step import Loss, Step
from mstar_jax.workdir import (
    check_inputs,
    fingerprint,
    keep_images,
    of_checkpoint,
    of_queries,
    recall_images,
)

TRUTH = pathlib.Path("figures", "truth.jsonl")  # in the workdir, of the embedded data


class Program(NamedTuple):
    """The compiled training step of all stages with one loss and one set of frozen parameters.

    Attributes:
      step: see `training.step.make_train_step`.
      plain: the same without accumulation and recomputation: it is only traced, to count FLOPs.
    """

    step: Step
    plain: Step


@dataclasses.dataclass(kw_only=True)
class Run(generate.Inference):
    """A run's values.

    Attributes:
      config: all of them; see `configs/`.
      source: the policy to start from: a checkpoint's files, or the dimensions of one from scratch.
      template: of the prompt that the policy is asked with.
      labelled, unlabelled: training queries, shuffled.
      validation, test: queries to measure on.
      hidden: the answers of the unlabelled queries by id, to measure pseudo-labels with.
      base_set, base_validation: the narrow data that a policy from scratch begins with.
      rationales, steps: responses that exist, of `warmup.data` and `prm.data`.
      truth: of the embedded data set, what its generator knows of each query; it measures and never trains.
      grading: what judges responses, but those to benchmarks.
      benchmarks: what the policies are asked at the end.
      results: results.json.
      checkpoints: of the stages' training.
      tx: the optimizer of all stages.
      programs: compiled training steps, by loss and the patterns of what is frozen.
      since: when the last record was written, seconds of the monotonic clock.
    """

    config: ml_collections.ConfigDict
    source: models.Pretrained | models.FromScratch
    template: str
    labelled: Sequence[Query]
    unlabelled: Sequence[Query]
    validation: Sequence[Query]
    test: Sequence[Query]
    hidden: Mapping[str, str | None]
    base_set: Sequence[embedded.BaseExample]
    base_validation: Sequence[Query]
    rationales: Sequence[given.Given]
    steps: Sequence[given.Given]
    truth: Mapping[str, truth.Truth]
    grading: custom.Grading
    benchmarks: evaluation.Benchmarks
    results: records.Results
    checkpoints: Checkpoints
    tx: optax.GradientTransformation
    programs: dict[tuple[Loss, tuple[str, ...]], Program] = dataclasses.field(default_factory=dict)
    since: float = dataclasses.field(default_factory=time.monotonic)


def start(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    head: Mapping[str, object],
    stop: Callable[[], bool],
) -> Run:
    """Checks the config, reads (or makes) the data, and opens the workdir; see `evolve.evolve`.

    Raises:
      ValueError: a config value is impossible, before anything is compiled.
    """
    configure.check(config, sharding.make_mesh(**config.mesh))
    grading = custom.grading(config.reward, config.reward_seconds)
    results = records.Results(workdir, head)
    with processes.first_alone("data"):  # makes the embedded data set
        recall_images(workdir)
        data = sources.load_data(config, workdir)
        keep_images(workdir)
    if config.evolve.unlabelled.mixin is not None and not data.unlabelled:
        raise ValueError("evolve.unlabelled.mixin is set, and the data has no unlabelled query")
    with processes.first_alone("policy"):  # and its tokenizer
        source = configure.make_policy(config, workdir, data.base)
    policy = jax.eval_shape(source.build)
    optimizer.check_frozen(policy, config.train.frozen)
    if config.prm.path:
        other = models.pretrained(config.prm.path, source.family, config.policy.max_crops)
        score.check(other, config.prm)  # refused now, and not after the warm-up
    with processes.first_alone("benchmarks"):  # writes the images that their files hold
        benchmarks = evaluation.read(config, workdir)
    with processes.first_alone("inputs"):
        check_inputs(workdir, inputs(config, data, source, workdir))
        if config.data.labelled and processes.first():
            names = ("labelled", "validation", "test", "unlabelled")
            ids = {name: [query.id for query in getattr(data, name)] for name in names}
            write_text(workdir / "splits.json", json.dumps(ids, indent=1))
    if processes.first():
        update_text(workdir / "parameters.txt", overview(policy, config) + "\n")
    known = workdir / TRUTH
    host = generate.inference(config, workdir, source.processor(), stop)
    return Run(
        **vars(host),
        config=config,
        source=source,
        template=config.prompts.direct if config.evolve.data == "answers" else config.prompts.cot,
        labelled=splits.shuffled(data.labelled, config.seed, 0),
        unlabelled=splits.shuffled(data.unlabelled, config.seed, 0),
        validation=data.validation,
        test=data.test,
        hidden=data.hidden,
        base_set=data.base,
        base_validation=data.base_validation,
        rationales=data.rationales,
        steps=data.steps,
        truth=truth.read_truth(known) if known.exists() and not config.data.labelled else {},
        grading=grading,
        benchmarks=benchmarks,
        results=results,
        checkpoints=Checkpoints(workdir / "checkpoints"),
        tx=configure.optimizer(config.train),
    )


def inputs(
    config: ml_collections.ConfigDict,
    data: sources.Data,
    source: models.Pretrained | models.FromScratch,
    workdir: pathlib.Path,
) -> dict[str, Mapping[str, object]]:
    """What a run reads, for `workdir.check_inputs`: also what it has made itself at its first start."""
    names = ("labelled", "unlabelled", "validation", "test", "base_validation")
    found: dict[str, Mapping[str, object]] = {
        f"data, {name}": of_queries(getattr(data, name), workdir) for name in names
    }
    found["data, unlabelled"] = {**found["data, unlabelled"], "hidden answers": digest(data.hidden.items())}
    if data.base:
        responses = digest((example.mode, example.response) for example in data.base)
        narrow = of_queries([example.query for example in data.base], workdir)
        found["data, base"] = narrow | {"responses": responses}
    for name, rows in (("rationales", data.rationales), ("labelled steps", data.steps)):
        if rows:
            responses = digest((row.response, row.labels) for row in rows)
            asked = of_queries([row.query for row in rows], workdir)
            found[f"data, {name}"] = asked | {"responses": responses}
    if (known := workdir / TRUTH).exists() and not config.data.labelled:
        found["data, truth"] = {known.name: fingerprint(known)}
    if isinstance(source, models.FromScratch):
        found["tokenizer"] = of_checkpoint(source.folder)
    if custom.is_users(config.reward):
        path, _ = custom.place(config.reward)
        found["reward"] = {path.name: fingerprint(path)}
    for key, path in (("policy.path", config.policy.path), ("prm.path", config.prm.path)):
        if path:
            found[key] = of_checkpoint(models.Pretrained(path).folder)
    return found


def overview(policy: Model, config: ml_collections.ConfigDict) -> str:
    """A table of a policy's parameters, in the layout that they train in; the policy may be abstract."""
    layout = sharding.shardings(policy, sharding.TRAIN, sharding.make_mesh(**config.mesh))
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), policy, layout)
    return parameter_overview.get_parameter_overview(sharding.named(placed), include_stats="sharding")


def superseded(run: Run, stage: Stage) -> bool:
    """Whether a later stage has begun to train, so that everything about this one is done."""
    last = Stage.iteration(max(run.config.evolve.iterations, 1))
    later = (Stage(place) for place in range(stage.place + 1, last.place + 1))
    return any(run.checkpoints.has(each) for each in later)


def lap(run: Run) -> dict[str, Any]:
    """Seconds since the last record, or since the start, and the speeds of the passes in them."""
    before, run.since = run.since, time.monotonic()
    return {"seconds": round(run.since - before, 2), "speed": run.speeds.lap()}
