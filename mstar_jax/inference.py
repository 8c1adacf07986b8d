"""A policy that answers and a reward model that scores, through the stores of a workdir.

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

from mstar_jax import flops, metrics, prm, processes, sampling, selection, sharding, speed, train
from mstar_jax.data import loader
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
        self.texts = sampling.token_texts(processor)
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
    def sampler(self, branches: int, batch: int) -> sampling.Sampler:
        """Samples so many responses of a row, and so many rows at a time."""
        s = self.config.sampling
        settings = sampling.SamplingConfig(
            branches, s.max_new_tokens, s.top_k, s.top_p, s.min_p, tuple(s.stop_strings), s.cache
        )
        return sampling.Sampler(self.processor, settings, batch, sharding.batch_shards(self.mesh))

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
        sampler: sampling.Sampler,
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
            with metrics.progress(len(rows), title, len(rows) - found, "row") as bar:

                def each(count: int, steps: int) -> None:
                    nonlocal taken, ended
                    taken, ended = steps, ended + count
                    bar.update(count)
                    if ended not in whole:  # a shard that is complete is written first
                        self.check_stop(title)

                batches = loader.row_batches(
                    todo, self.processor, size, workers=c.data.workers, share=sharding.share_of(self.mesh)
                )
                answered = sampling.rollouts(
                    sampler,
                    train.for_sampling(params(), self.mesh, jnp.dtype(c.sampling.dtype)),
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


class Scorer:
    """A reward model's host side: responses in, their step scores out."""

    def __init__(self, generator: Generator, processor: Any = None):
        """Takes the generator's processor where the reward model is of its family."""
        self.generator, self.values = generator, generator.config.prm
        self.processor = processor or generator.processor
        self.texts = sampling.token_texts(processor) if processor else generator.texts

    def score(
        self,
        name: str,
        model: Callable[[], Any],
        asked: Asked,
        responses: Groups,
        *,
        how: dict[str, Any],
        only_correct: bool = False,
        longest: int = 0,
    ) -> Groups:
        """The responses with their step scores, through the store of scores.

        Args:
          name: of the rollouts.
          model: the reward model laid out for scoring, called only where something is missing.
          asked: queries with their prompts.
          responses: by query id.
          how: what else the scores depend on, for the store's settings.
          only_correct: leave out responses that cannot be selected.
          longest: tokens of a prompt; 0 for `data.max_prompt`.
        """
        host, v = self.generator, self.values
        asked = [(q, text) for q, text in asked if q.id in responses]
        chunks = [asked[at : at + v.chunk] for at in range(0, len(asked), v.chunk)]
        how = how | {"only_correct": only_correct, "batch": v.batch, "chunk": v.chunk}
        store = Store(host.workdir / "scores" / name, how)
        for number in store.missing(len(chunks)):
            part = {q.id: responses[q.id] for q, _ in chunks[number]}
            some = {key: selection.correct(group) for key, group in part.items()} if only_correct else part
            found = self.scored(model(), chunks[number], some, longest, name)
            store.write(number, [rollout(q, found.get(q.id, part[q.id])) for q, _ in chunks[number]])
            host.check_stop(f"{name}: scores")
        store.complete(len(chunks))
        return dict(store.read(read_rollout))

    def scored(
        self, model: Any, asked: Asked, responses: Groups, longest: int = 0, name: str = "scores"
    ) -> Groups:
        """The responses with their step scores by a reward model; copies of a text are scored once."""
        host, v, buckets = self.generator, self.values, self.generator.config.data.buckets
        some = [(q, text) for q, text in asked if responses[q.id]]
        rows, encode, odd = list[Row](), functools.cache(self.processor.encode_response), 0
        for prompt in host.plan(some, "scores", self.processor, longest):
            group = selection.distinct(responses[prompt.query.id])
            plain = [r for r in group if prm.same_steps(r.text, encode(r.text), self.texts)]
            odd += len(group) - len(plain)
            whole = [prm.row(prompt, plain, encode, self.texts)] if plain else []
            rows += loader.split_rows(whole, max(buckets))
        plans = loader.plan_batches(rows, v.batch, buckets)
        how = {"workers": host.config.data.workers, "share": sharding.share_of(host.mesh)}
        batches = loader.row_batches(plans, self.processor, v.batch, **how)
        found: dict[tuple[str, tuple[int, ...]], tuple[float, ...]] = {}
        watch = host.speeds.of("score", name)
        fed = watch.fed(batches, functools.partial(flops.count, prm.token_scores, model))
        for (_, these), values in zip(plans, watch.read(prm.scores(model, fed, host.mesh))):
            for row, each in zip(these, values):
                found.update(zip(((row.prompt.query.id, tokens) for tokens in row.responses), each))
        if odd:
            log.warning("scores: %d responses have 0: their steps cannot be told from their tokens", odd)
        return {
            q.id: [
                dataclasses.replace(r, step_scores=found.get((q.id, tuple(encode(r.text))), ()))
                for r in responses[q.id]
            ]
            for q, _ in asked
        }
