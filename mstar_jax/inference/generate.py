"""A policy that answers, through the stores of a workdir.

What is in a store is not computed again, so whatever is killed here goes on where it was.
"""

import dataclasses
import functools
import itertools
import logging
import math
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mstar_jax import processes, progress, sharding
from mstar_jax.data import loader
from mstar_jax.inference import draw, rollouts
from mstar_jax.inference.sampler import Sampler, for_sampling
from mstar_jax.profiling import speed
from mstar_jax.rewards import selection
from mstar_jax.store import Store, read_rollout, rollout
from mstar_jax.structs import Prompt, Query, Response, Row

log = logging.getLogger(__name__)

Asked = Sequence[tuple[Query, str]]  # queries, each with its rendered prompt
Groups = dict[str, list[Response]]  # by query id


class Stopped(Exception):
    """The run was told to stop and has saved where it stands."""


def entering(batch: int, share: float, shards: int) -> int:
    """How many rows are prefilled together: a share of the batch, in as many for each of its shards."""
    return min(batch, shards * math.ceil(share * batch / shards))


class Generator:
    """A policy's host side and compiled programs: prompts in, judged responses out."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: pathlib.Path,
        processor: Any,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.config, self.workdir, self.processor, self.stop = config, workdir, processor, stop
        self.mesh = sharding.make_mesh(**config.mesh)
        self.texts = draw.token_texts(processor)
        self.key = jax.random.key(config.seed)
        self.speeds = speed.Speeds(self.mesh.size, sharding.share_of(self.mesh))

    def stopping(self, at: int = 0, every: int = 1) -> bool:
        """Whether any process was told to stop; several ask each other at every `every`-th place only, where
        they wait for the device anyway."""
        if jax.process_count() == 1:
            return self.stop()
        return at % every == 0 and processes.agree(self.stop())

    def check_stop(self, where: str) -> None:
        """Raises Stopped if the run was told to stop; what is on disk by now is whole."""
        if self.stopping():
            raise Stopped(f"{where}: stopped")

    @functools.cache  # noqa: B019  (a Generator lives as long as the process)
    def sampler(self, branches: int, batch: int) -> Sampler:
        """Samples so many responses of a row, and so many rows at a time."""
        s = self.config.sampling
        settings = draw.SamplingConfig(
            branches, s.max_new_tokens, s.top_k, s.top_p, s.min_p, tuple(s.stop_strings), s.cache
        )
        return Sampler(self.processor, settings, batch, sharding.batch_shards(self.mesh))

    def plan(self, asked: Asked, name: str, processor: Any = None, longest: int = 0) -> list[Prompt]:
        """The prompts that fit, for the policy or another model's processor; the others are reported."""
        longest = longest or self.config.data.max_prompt
        planned, left_out = loader.plan_prompts(asked, processor or self.processor, longest)
        if left_out:
            ids = ", ".join(q.id for q in left_out[:3])
            text = "%s: left out %d prompts (%s ...): over data.max_prompt = %d tokens, or no room to answer"
            log.warning(text, name, len(left_out), ids, longest)
        return planned

    def sample(
        self,
        name: str,
        params: Callable[[], Any],
        asked: Asked,
        temperatures: Sequence[float],
        *,
        how: dict[str, Any],
        iteration: int = 0,
        batch: int | None = None,
        longest: int = 0,
        kind: str = "rollouts",
    ) -> Groups:
        """Samples and judges responses through the store of rollouts.

        Args:
          name: of the pass; samples depend on it.
          params: the policy's parameters, called only where something is missing.
          asked: queries with their prompts.
          temperatures: one for every response of a query; 0 is greedy.
          how: what else the samples depend on, for the store's settings.
          iteration: written into the responses.
          batch: queries sampled side by side; None for `sampling.batch`.
          longest: tokens of a prompt; 0 for `data.max_prompt`.
          kind: of work, in the table of speeds.
        """
        sampler = self.sampler(len(temperatures), batch or self.config.sampling.batch)
        planned = self.plan(asked, name, longest=longest)
        rows = [Row(p) for p in planned]
        how = dataclasses.asdict(sampler.config) | {"temperatures": list(temperatures)} | how
        key = jax.random.fold_in(self.key, zlib.crc32(name.encode()))

        def records(rows, answered):
            queries = [row.prompt.query for row in rows]
            judged = [[selection.judge(q, r) for r in group] for q, group in zip(queries, answered)]
            return [rollout(q, group) for q, group in zip(queries, judged)]

        return dict(
            self.rollouts(
                f"rollouts/{name}", sampler, rows, params, key, temperatures, records, how, iteration, kind
            ).read(read_rollout)
        )

    def rollouts(
        self,
        name: str,
        sampler: Sampler,
        rows: Sequence[Row],
        params: Callable[[], Any],
        key: jax.Array,
        temperatures: Sequence[float],
        records: Callable[[list[Row], list[list[Response]]], list[dict[str, Any]]],
        how: dict[str, Any],
        iteration: int = 0,
        kind: str = "rollouts",
    ) -> Store:
        """The store `name` of the workdir with the missing shards sampled.

        Args:
          name: of the store, under the workdir.
          sampler: from `sampler`.
          rows: what is sampled from.
          params: the policy's parameters, called only where something is missing.
          key: of all samples.
          temperatures: one for every response of a row.
          records: (rows of a shard, their responses) -> what the store keeps of them.
          how: what else the records depend on, for the store's settings.
          iteration: written into the responses.
          kind: of work, in the table of speeds.
        """
        c, batch = self.config, sampler.slots
        plans = loader.plan_batches(rows, batch * c.sampling.shard, c.data.buckets)
        size = entering(batch, c.sampling.refill, sampler.shards)
        title = name.split("/")[1] + ": " + name.split("/")[0]
        how = how | {"seed": c.seed, "batch": batch, "refill": size, "shard": c.sampling.shard}
        store = Store(self.workdir / name, how)
        if missing := store.missing(len(plans)):
            todo, shards = [plans[i] for i in missing], [plans[i][1] for i in missing]
            found, watch, taken = sum(map(len, shards)), self.speeds.of(kind, name.split("/")[1]), 0
            ended, whole = 0, set(itertools.accumulate(map(len, shards)))
            with progress.bar(len(rows), title, len(rows) - found, "row") as bar:

                def each(count: int, steps: int) -> None:
                    nonlocal taken, ended
                    taken, ended = steps, ended + count
                    bar.update(count)
                    if ended not in whole:  # a shard that is complete is written first
                        self.check_stop(title)

                batches = loader.row_batches(
                    todo, self.processor, size, workers=c.data.workers, share=sharding.share_of(self.mesh)
                )
                answered = rollouts.rollouts(
                    sampler,
                    for_sampling(params(), self.mesh, jnp.dtype(c.sampling.dtype)),
                    shards,
                    watch.fed(batches),
                    self.processor,
                    key=key,
                    temperatures=np.asarray(temperatures),
                    iteration=iteration,
                    mesh=self.mesh,
                    each=each,
                )
                answered = watch.sampled(shards, answered, lambda: taken * batch * len(temperatures))
                for number, these, responses in zip(missing, shards, answered):
                    store.write(number, records(these, responses))
                    self.check_stop(title)
        store.complete(len(plans))
        return store
