"""A reward model that scores, through the stores of a workdir."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

from mstar_jax import sharding
from mstar_jax.data import loader
from mstar_jax.inference import draw
from mstar_jax.inference.generate import Asked, Generator, Groups
from mstar_jax.profiling import flops
from mstar_jax.rewards import prm, selection
from mstar_jax.store import Store, read_rollout, rollout
from mstar_jax.structs import Row

log = logging.getLogger(__name__)


class Scorer:
    """A reward model's host side: responses in, their step scores out."""

    def __init__(self, generator: Generator, processor: Any = None):
        """Takes the generator's processor where the reward model is of its family."""
        self.generator, self.values = generator, generator.config.prm
        self.processor = processor or generator.processor
        self.texts = draw.token_texts(processor) if processor else generator.texts

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
