"""Sampling through the stores of a workdir: prompts in, judged responses out.

What a store holds is not computed again, so a pass that was killed continues where it was.
"""

import dataclasses
import functools
import itertools
import logging
import math
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from mstar_jax import processes, progress, sharding
from mstar_jax.data import loader, pictures, prompts
from mstar_jax.inference import draw, rollouts
from mstar_jax.inference.sampler import Sampler, for_sampling
from mstar_jax.profiling import speed
from mstar_jax.rewards import selection
from mstar_jax.store import Store, digest, line, rollout
from mstar_jax.structs import Model, Processor, Prompt, Query, Response, Row

log = logging.getLogger(__name__)

Groups = Mapping[str, list[Response]]  # by query id; see `store.Groups`


class Stopped(Exception):
    """The run was told to stop, and has saved its state."""


class Asked(NamedTuple):
    """A query and the prompt that it is asked with."""

    query: Query
    prompt: str


@dataclasses.dataclass(kw_only=True)
class Inference:
    """What sampling and scoring need: values, without a policy and without a place in the algorithm.

    Attributes:
      workdir: where the stores are.
      processor: the policy's host side.
      texts: what each of its ids adds to a text, see `draw.token_texts`.
      mesh: the device mesh.
      seed: of the run.
      sampling, data, prm: `config.sampling`, `config.data` and `config.prm`.
      stop: asked between device batches and steps; true ends the run.
      speeds: how fast the passes since the last record were.
      samplers: compiled programs by (branches, rows sampled together).
      shapes: of the prompts that were measured, by processor: most are planned several times.
    """

    workdir: pathlib.Path
    processor: Processor
    texts: Sequence[str]
    mesh: Mesh
    seed: int
    sampling: ml_collections.ConfigDict
    data: ml_collections.ConfigDict
    prm: ml_collections.ConfigDict
    stop: Callable[[], bool]
    speeds: speed.Speeds
    samplers: dict[tuple[int, int], Sampler] = dataclasses.field(default_factory=dict)
    shapes: dict[Processor, loader.Shapes] = dataclasses.field(default_factory=dict)


def inference(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    processor: Processor,
    stop: Callable[[], bool] = lambda: False,
) -> Inference:
    """The `Inference` of a config."""
    mesh = sharding.make_mesh(**config.mesh)
    return Inference(
        workdir=workdir,
        processor=processor,
        texts=draw.token_texts(processor),
        mesh=mesh,
        seed=config.seed,
        sampling=config.sampling,
        data=config.data,
        prm=config.prm,
        stop=stop,
        speeds=speed.Speeds(mesh.size, sharding.share_of(mesh)),
    )


# ---- 1. stopping --------------------------------------------------------------------------------------


def stopping(stop: Callable[[], bool], at: int = 0, every: int = 1) -> bool:
    """Whether any process was told to stop. Several processes ask each other, which takes time, at every
    `every`-th place only."""
    if jax.process_count() == 1:
        return stop()
    return at % every == 0 and processes.agree(stop())


def check_stop(stop: Callable[[], bool], where: str) -> None:
    """Raises Stopped if the run was told to stop; what is on disk by now is whole."""
    if stopping(stop):
        raise Stopped(f"{where}: stopped")


# ---- 2. prompts ---------------------------------------------------------------------------------------


def ask(queries: Sequence[Query], template: str) -> list[Asked]:
    """The queries with their prompts, rendered from a template."""
    return [Asked(query, prompts.render(template, query)) for query in queries]


def plan(
    host: Inference,
    asked: Sequence[Asked],
    name: str,
    *,
    processor: Processor | None = None,
    longest: int = 0,
) -> list[Prompt | None]:
    """The measured prompts, None for each that does not fit; how many do not is logged.

    Args:
      host: see `Inference`.
      asked: queries with their prompts.
      name: of the pass, for the log.
      processor: of another model than the policy.
      longest: most tokens of a prompt; 0 for `data.max_prompt`.
    """
    longest = longest or host.data.max_prompt
    processor = processor or host.processor
    shapes = host.shapes.setdefault(processor, {})
    planned = loader.plan_prompts(asked, processor, longest, shapes)
    left_out = [each.query.id for each, prompt in zip(asked, planned) if prompt is None]
    if left_out:
        ids = ", ".join(left_out[:3])
        text = "%s: left out %d prompts (%s ...): over data.max_prompt = %d tokens, or no room for an answer"
        log.warning(text, name, len(left_out), ids, longest)
    return planned


# ---- 3. sampling --------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A pass of sampling into a store.

    Attributes:
      folder: of the store, under the workdir: what kind of samples, and the name of the pass.
      temperatures: one for every response of a row; 0 is greedy.
      key: of all its samples.
      settings: what the records depend on; a store refuses other ones.
      iteration: written into the responses.
      kind: of work, in the table of speeds.
      logprobs: whether they keep the log probability of each token.
    """

    folder: str
    temperatures: Sequence[float]
    key: jax.Array
    settings: Mapping[str, object]
    iteration: int = 0
    kind: str = "rollouts"
    logprobs: bool = False


def pass_key(seed: int, name: str) -> jax.Array:
    """The PRNG key of a pass: it depends on the run's seed and the name alone."""
    return _folded(seed, np.uint32(zlib.crc32(name.encode())))


@functools.partial(jax.jit, static_argnums=0)  # one program for all passes of a run
def _folded(seed: int, number: np.uint32) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), number)


def entering(batch: int, share: float, shards: int) -> int:
    """How many rows are prefilled together: a share of the batch, equally many for each of its shards."""
    return min(batch, shards * math.ceil(share * batch / shards))


def places(most: int, branches: int) -> int:
    """How many of a query's responses are decoded at a time, see `sampling.places`."""
    return min(most or branches, branches)


def sampler_for(host: Inference, branches: int, batch: int) -> Sampler:
    """The sampler of so many responses of a row and so many rows at a time."""
    if (branches, batch) not in host.samplers:
        s = host.sampling
        settings = draw.SamplingConfig(
            branches=branches,
            max_new_tokens=s.max_new_tokens,
            places=places(s.places, branches),
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            stop_strings=tuple(s.stop_strings),
            cache=s.cache,
        )
        shards = sharding.batch_shards(host.mesh)
        host.samplers[branches, batch] = Sampler(host.processor, settings, batch, shards)
    return host.samplers[branches, batch]


def sample(
    host: Inference,
    name: str,
    params: Callable[[], Model],
    asked: Sequence[Asked],
    temperatures: Sequence[float],
    *,
    settings: Mapping[str, object],
    iteration: int = 0,
    batch: int = 0,
    longest: int = 0,
    kind: str = "rollouts",
    judge: selection.Judge = selection.judge_all,
    logprobs: bool = False,
) -> Groups:
    """Samples and judges responses through the store of rollouts.

    Args:
      host: see `Inference`.
      name: of the pass; the samples depend on it.
      params: the policy, called only where something is missing.
      asked: queries with their prompts; those that do not fit get no responses.
      temperatures: one for every response of a query; 0 is greedy.
      settings: what else the samples depend on, for the store's settings.
      iteration: written into the responses.
      batch: queries sampled together; 0 for `sampling.batch`.
      longest: most tokens of a prompt; 0 for `data.max_prompt`.
      kind: of work, in the table of speeds.
      judge: what judges them; by default the answer checker.
      logprobs: whether the responses keep the log probability of each token.
    """
    sampler = sampler_for(host, len(temperatures), batch or host.sampling.batch)
    rows = [Row(prompt) for prompt in plan(host, asked, name, longest=longest) if prompt is not None]
    own = dataclasses.asdict(sampler.config) | {"temperatures": list(temperatures)}
    own["dtype"] = host.sampling.dtype
    own |= {"logprobs": True} if logprobs else {}
    task = Task(
        folder=f"rollouts/{name}",
        temperatures=temperatures,
        key=pass_key(host.seed, name),
        settings={**own, **settings},
        iteration=iteration,
        kind=kind,
        logprobs=logprobs,
    )

    def record(row: Row, responses: Sequence[Response]) -> dict[str, object]:
        return rollout(row.prompt.query, judge(row.prompt.query, responses))

    store, shards = sample_rows(host, task, sampler, rows, params, record)
    return store.groups(shards)


def sample_rows(
    host: Inference,
    task: Task,
    sampler: Sampler,
    rows: Sequence[Row],
    params: Callable[[], Model],
    record: Callable[[Row, Sequence[Response]], Mapping[str, object]],
) -> tuple[Store, int]:
    """The store of a task, and how many shards it has; missing ones are sampled. Several processes share the
    making of the records: text, verdicts and JSON.

    Args:
      host: see `Inference`.
      task: which store, and how it is sampled.
      sampler: from `sampler_for`.
      rows: what is sampled from.
      params: the policy, called only where something is missing.
      record: (a row, its responses) -> what the store keeps of them.
    """
    s, data, batch = host.sampling, host.data, sampler.slots
    plans = loader.plan_batches(rows, batch * s.shard, data.buckets)
    size = entering(batch, s.refill, sampler.shards)
    store = Store(
        host.workdir / task.folder,
        {**task.settings, "seed": host.seed, "batch": batch, "refill": s.refill, "shard": s.shard},
    )

    def asked(number: int) -> str:
        return digest_of(host.workdir, plans[number][1])

    def lines(rows: Sequence[Row], responses: Sequence[Sequence[Response]]) -> list[bytes]:
        return processes.shared(lambda at: line(record(rows[at], responses[at])), len(rows))

    if missing := store.missing(len(plans), asked):
        kind, _, name = task.folder.partition("/")
        title = f"{name}: {kind}"
        shards = [plans[number][1] for number in missing]
        watch = host.speeds.of(task.kind, name)
        whole = set(itertools.accumulate(map(len, shards)))
        steps_taken = 0
        tokens_taken = 0
        ended = 0
        with progress.bar(len(rows), title, len(rows) - sum(map(len, shards)), "row") as bar:

            def each(count: int, steps: int, tokens: int) -> None:
                nonlocal steps_taken, tokens_taken, ended
                steps_taken = steps
                tokens_taken += tokens
                ended += count
                bar.update(count)
                if ended not in whole:  # a complete shard is written before the run may stop
                    check_stop(host.stop, title)

            batches = loader.row_batches(
                [plans[number] for number in missing],
                host.processor,
                size,
                workers=data.workers,
                share=sharding.share_of(host.mesh),
            )
            answered = rollouts.rollouts(
                sampler,
                for_sampling(params(), host.mesh, jnp.dtype(s.dtype)),
                shards,
                watch.fed(batches),
                host.processor,
                key=task.key,
                temperatures=np.asarray(task.temperatures),
                iteration=task.iteration,
                mesh=host.mesh,
                each=each,
                logprobs=task.logprobs,
            )
            room = batch * sampler.config.places
            for number, these, responses in zip(missing, shards, answered):
                watch.done(decoded=tokens_taken, decode_slots=steps_taken * room)
                tokens_taken = 0
                store.write(number, lines(these, responses), asked)
                check_stop(host.stop, title)
    store.complete(len(plans))
    return store, len(plans)


def digest_of(workdir: pathlib.Path, rows: Sequence[Row]) -> str:
    """Of all that the samples of rows, and what is made of them, depend on besides a store's settings."""

    def one(row: Row) -> list[object]:
        prompt = row.prompt
        asked = [prompt.text, prompt.length, prompt.crops]
        return [*told(workdir, prompt.query), *asked, row.responses, row.starts]

    return digest(map(one, rows))


def told(workdir: pathlib.Path, query: Query) -> list[object]:
    """What tells a query from others, with what its pictures show; a copied workdir has the same."""
    own = f"{workdir.absolute()}{os.sep}"
    shown = [(image.removeprefix(own), pictures.content(image)) for image in query.images]
    return [query.id, query.options, query.answer, query.answer_type, query.precision, shown]
