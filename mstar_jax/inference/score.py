"""Scoring through the stores of a workdir: responses in, their step scores out."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence

from mstar_jax import sharding
from mstar_jax.data import loader
from mstar_jax.inference.generate import Asked, Groups, Inference, check_stop, plan, told
from mstar_jax.profiling import flops
from mstar_jax.rewards import prm, selection
from mstar_jax.store import Store, digest, line, rollout
from mstar_jax.structs import Processor, Query, Response, Row, ScoringModel

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A reward model; it holds no parameters.

    Attributes:
      load: its parameters, laid out for scoring. Every pass that has something to score loads them and drops
        them at its end, so that they are never in memory while a policy trains.
      identity: what tells it from other reward models, for the settings of the stores.
      processor: its host side.
      texts: what each id of the processor adds to a text, see `draw.token_texts`.
    """

    load: Callable[[], ScoringModel]
    identity: Mapping[str, object]
    processor: Processor
    texts: Sequence[str]


def score(
    host: Inference,
    scorer: Scorer,
    name: str,
    asked: Sequence[Asked],
    responses: Groups,
    *,
    settings: Mapping[str, object],
    only_correct: bool = False,
    longest: int = 0,
) -> Groups:
    """The responses with their step scores, through the store of scores.

    Args:
      host: see `Inference`.
      scorer: the reward model.
      name: of the pass that sampled the responses.
      asked: queries with their prompts.
      responses: by query id.
      settings: what the scores depend on, for the store's settings.
      only_correct: leave out responses that cannot be selected.
      longest: most tokens of a prompt; 0 for `data.max_prompt`.
    """
    size = host.prm.chunk
    asked = [each for each in asked if each.query.id in responses]
    chunks = [asked[at : at + size] for at in range(0, len(asked), size)]
    batch = host.prm.score_batch or host.prm.batch
    own = {"only_correct": only_correct, "batch": batch, "chunk": size}
    own["dtype"] = host.sampling.dtype
    store = Store(host.workdir / "scores" / name, {**settings, **own})

    def asked_in(responses: Groups, number: int) -> str:
        return digest_of(host.workdir, chunks[number], responses)

    model = None
    for number in store.missing(len(chunks), functools.partial(asked_in, responses)):
        model = model or scorer.load()
        part = {each.query.id: responses[each.query.id] for each in chunks[number]}
        some = {key: selection.correct(group) for key, group in part.items()} if only_correct else part
        found = score_with(host, scorer, model, chunks[number], some, longest=longest, name=name)
        queries = [each.query for each in chunks[number]]
        lines = (line(rollout(query, found.get(query.id, part[query.id]))) for query in queries)
        store.write(number, lines, functools.partial(asked_in, part))
        check_stop(host.stop, f"{name}: scores")
    store.complete(len(chunks))
    return store.groups(len(chunks))


def digest_of(workdir: pathlib.Path, asked: Sequence[Asked], responses: Groups) -> str:
    """Of all that scores, and the responses in their records, depend on besides a store's settings."""

    def one(query: Query, prompt: str) -> list[object]:
        of_each = [
            (r.sample, r.text, len(r.tokens), r.logprob, r.truncated, r.answer, r.verdict, r.temperature)
            + (() if r.score is None else (r.score,))
            for r in responses[query.id]
        ]
        return [*told(workdir, query), prompt, of_each]

    return digest(one(query, prompt) for query, prompt in asked)


def score_with(
    host: Inference,
    scorer: Scorer,
    model: ScoringModel,
    asked: Sequence[Asked],
    responses: Groups,
    *,
    longest: int = 0,
    name: str = "scores",
) -> Groups:
    """The responses with their step scores by a model of the scorer's family, without a store. Copies of a
    text are scored once."""
    buckets = host.data.buckets
    encode = functools.cache(scorer.processor.encode_response)
    rows: list[Row] = []
    odd = 0
    some = [each for each in asked if responses[each.query.id]]
    for prompt in plan(host, some, "scores", processor=scorer.processor, longest=longest):
        if prompt is None:
            continue
        group = selection.distinct(responses[prompt.query.id])
        plain = [r for r in group if prm.same_steps(r.text, encode(r.text), scorer.texts)]
        odd += len(group) - len(plain)
        if plain:
            rows += loader.split_rows([prm.row(prompt, plain, encode, scorer.texts)], max(buckets))
    size = host.prm.score_batch or host.prm.batch
    plans = loader.full_batches(rows, size, buckets)
    batches = loader.row_batches(
        plans,
        scorer.processor,
        size,
        workers=host.data.workers,
        share=sharding.share_of(host.mesh),
    )
    found: dict[tuple[str, tuple[int, ...]], tuple[float, ...]] = {}
    watch = host.speeds.of("score", name)
    fed = watch.fed(batches, functools.partial(flops.count, prm.token_scores, model))
    for (_, these), values in zip(plans, watch.read(prm.scores(model, fed, host.mesh))):
        for row, each in zip(these, values):
            keys = [(row.prompt.query.id, tuple(tokens)) for tokens in row.responses]
            found.update(zip(keys, each, strict=True))
    if odd:
        log.warning("scores: %d responses get 0: their steps cannot be told from their tokens", odd)

    def scored(response: Response) -> Response:
        key = response.query_id, tuple(encode(response.text))
        return dataclasses.replace(response, step_scores=found.get(key, ()))

    return {each.query.id: [scored(r) for r in responses[each.query.id]] for each in asked}
