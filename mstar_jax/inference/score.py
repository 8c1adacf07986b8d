"""Scoring through the stores of a workdir: responses in, their step scores out."""

import dataclasses
import functools
import logging
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import ml_collections
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mstar_jax import models, sharding
from mstar_jax.data import loader, prompts
from mstar_jax.inference import draw
from mstar_jax.inference.generate import Asked, Groups, Inference, check_stop, plan, told
from mstar_jax.models import vlm
from mstar_jax.models.processor import Opened
from mstar_jax.models.tokenizer import literal, token_id
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
      encode: the responses as it reads them, see `prm.as_written`.
      template: of its prompts; empty for those that the policy was asked with.
    """

    load: Callable[[], ScoringModel]
    identity: Mapping[str, object]
    processor: Processor
    encode: prm.Encode
    template: str = ""


def check(files: models.Pretrained, settings: ml_collections.ConfigDict) -> None:
    """Refuses a folder that is no such reward model as `config.prm` says, by its vocabulary and the headers
    of its files.

    Raises:
      ValueError: it has no head, or several; or, where a token scores, it has one, or there is no such token.
        Or its tokenizer is not its family's, or lacks a control token that is written around steps.
    """
    if settings.token:
        files.check_headless()
        _tokens(files, settings)
    else:
        files.find_head(settings.head)
    known = files.tokenizer().get_vocab()
    for key in ("mark", "between"):
        for token in re.findall(r"<\|\w+\|>", settings[key]):
            if token not in known:  # it would be read as the words that it consists of
                raise ValueError(f"prm.{key} = {settings[key]!r}: {token} is no token of this vocabulary")
    files.processor()


def of_folder(
    files: models.Pretrained,
    settings: ml_collections.ConfigDict,
    mesh: Mesh,
    dtype: DTypeLike,
    identity: Mapping[str, object],
) -> Scorer:
    """The reward model of a folder, with a head or, as `prm.token` says, without one.

    Args:
      files: of any family.
      settings: `config.prm`.
      mesh, dtype: that it is laid out for.
      identity: what tells its files from others.

    Raises:
      ValueError: see `check`.
    """
    check(files, settings)
    s, processor = settings, files.processor()
    told = {key: s[key] for key in ("token", "against", "prompt", "open") if s[key]}
    if s.token or s.mark:
        told |= {"mark": s.mark, "between": s.between}
        mark, between = (literal(files.tokenizer(), text) for text in (s.mark, s.between))
        encode = prm.marked(processor, mark, between)
    else:
        encode = prm.as_written(processor, draw.token_texts(processor))

    def load() -> ScoringModel:
        if s.token:
            policy = files.load(dtype, mesh=mesh, rules=sharding.SAMPLE)
            return vlm.TokenRewardModel(policy, *_tokens(files, s))
        return files.load_reward(dtype, mesh=mesh, rules=sharding.SAMPLE, chosen=s.head)

    asked = Opened(processor) if s.open else processor
    return Scorer(load, {**identity, **told}, asked, encode, s.prompt)


def _tokens(files: models.Pretrained, settings: ml_collections.ConfigDict) -> tuple[int, int | None]:
    """The ids of `prm.token` and `prm.against`."""
    found: list[int | None] = []
    words = files.tokenizer()
    for key in ("token", "against"):
        try:
            found.append(token_id(words, settings[key]) if settings[key] else None)
        except ValueError as error:
            raise ValueError(f"prm.{key}: {error}") from error
    good, bad = found
    if good is None or good == bad:
        raise ValueError(
            f"prm.token = {settings.token!r}, prm.against = {settings.against!r}: both are {bad}"
        )
    return good, bad


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
    text are scored once. What cannot be scored gets no scores, and is counted in a warning."""
    buckets = host.data.buckets
    encode = functools.cache(scorer.encode)
    rows: list[Row] = []
    odd = long = 0
    some = [each for each in asked if responses[each.query.id]]
    if scorer.template:
        some = [Asked(query, prompts.render(scorer.template, query)) for query, _ in some]
    for prompt in plan(host, some, "scores", processor=scorer.processor, longest=longest):
        if prompt is None:
            continue
        group = selection.distinct(responses[prompt.query.id])
        plain = [r for r in group if prm.same_steps(r.text, encode(r.text))]
        odd += len(group) - len(plain)
        room = max(buckets) - prompt.length  # marks, or another tokenizer, may make it too small
        fits = [r for r in plain if len(encode(r.text).tokens) <= room]
        long += len(plain) - len(fits)
        if fits:
            rows += loader.split_rows([prm.row(prompt, fits, encode)], max(buckets))
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
    if long:
        text = "%s: %d responses get 0: with their prompt over %d tokens, the largest of data.buckets"
        log.warning(text, name, long, max(buckets))

    def scored(response: Response) -> Response:
        key = response.query_id, tuple(encode(response.text).tokens)
        return dataclasses.replace(response, step_scores=found.get(key, ()))

    return {each.query.id: [scored(r) for r in responses[each.query.id]] for each in asked}
