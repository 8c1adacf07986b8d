"""The process reward model: Monte-Carlo labels of steps, its loss, and its scores.

    label   of a step: the fraction of completions from its end that reach the gold answer; of the last step,
            the verdict
    score   of a step: sigmoid of the reward model's output at the last token of the step, or of a mark that
            follows it

The branch of a response, with the places of its labels and scores (| ends a step):

    Bars red 4 blue 2|Sum 4 + 2 = 6|The answer is 6<stop>
                     ^             ^                ^

Labels dominate the cost. So the distinct step prefixes of a query are collected first; the responses that
contain them share one row, after the prompt of the query, and every completion continues from a place in that
row.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mstar_jax import processes, sharding
from mstar_jax.models import layers
from mstar_jax.rewards import selection, steps
from mstar_jax.structs import Batch, Processor, Prompt, Response, Row, ScoringModel

Prefix = tuple[int, ...]  # the tokens of a response up to the end of a step

# ---- 1. labels ----------------------------------------------------------------------------------------


def prefixes(responses: Sequence[Response], texts: Sequence[str]) -> list[Prefix]:
    """The distinct step prefixes of a query's responses that need completions: all but whole responses.

    Args:
      responses: to one query.
      texts: the text that each id adds, see `draw.token_texts`.
    """
    found = dict[Prefix, None]()
    for response in responses:
        for end in steps.ends(response.tokens, texts)[:-1]:
            found[tuple(response.tokens[: end + 1])] = None
    return list(found)


def stems(prompt: Prompt, found: Sequence[Prefix], completions: int, samples: int, longest: int) -> list[Row]:
    """Rows that continue every prefix `completions` times, with `samples` completions per row.

    A prefix of a longer prefix takes no space of its own: its completions start inside the longer one. The
    key of a completion is made from its prefix and number, so it does not depend on the others. Unused places
    of a row sample from the prompt; these samples are ignored.

    Args:
      prompt: of the query.
      found: the distinct prefixes.
      completions: of each prefix.
      samples: of a row; a multiple of `completions`.
      longest: maximum number of tokens in a row.

    Raises:
      ValueError: `samples` is not a multiple of `completions`.
    """
    if samples % completions:
        raise ValueError(f"{samples} samples per row are not a multiple of {completions} completions")
    rows = list[Row]()
    part = list[Prefix]()
    for prefix in sorted(found):  # a prefix of another one comes before it
        size = prompt.length + sum(map(len, _whole([*part, prefix])))
        if part and (len(part) == samples // completions or size > longest):
            rows.append(_stem(prompt, part, completions, samples))
            part = []
        part.append(prefix)
    return [*rows, _stem(prompt, part, completions, samples)] if part else rows


def _whole(part: Sequence[Prefix]) -> list[Prefix]:
    """Those of the sorted prefixes that are not a prefix of another one."""
    return [p for p, after in zip(part, [*part[1:], ()]) if after[: len(p)] != p]


def _stem(prompt: Prompt, part: Sequence[Prefix], completions: int, samples: int) -> Row:
    branches = _whole(part)
    starts = list[tuple[int, int, int]]()
    for prefix in part:
        branch = next(i for i, whole in enumerate(branches, start=1) if whole[: len(prefix)] == prefix)
        key = zlib.crc32(np.array(prefix, np.int32).tobytes())
        starts += [(branch, len(prefix), (key + number) % 2**32) for number in range(completions)]
    starts += [(0, 0, number) for number in range(samples - len(starts))]
    return Row(prompt, tuple(branches), starts=tuple(starts))


def label(
    response: Response, values: dict[Prefix, float], texts: Sequence[str], *, hard: bool = False
) -> tuple[float, ...]:
    """The labels of a response's steps: the fraction of completions from each that reach the gold answer, and
    for the last step the verdict. A hard label is 1 if any completion does.

    The unfinished last step of a truncated response is wrong. A response of one step has only its verdict as
    a label; an empty one has none.

    Raises:
      KeyError: a step prefix is not among the values.
    """
    found = [values[tuple(response.tokens[: end + 1])] for end in steps.ends(response.tokens, texts)[:-1]]
    if hard:
        found = [float(value > 0) for value in found]
    return (*found, float(selection.is_correct(response))) if steps.split(response.text) else ()


# ---- 2. rows ------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A response as a reward model reads it.

    Attributes:
      tokens: its ids.
      ends: the index of the token at which each step is scored, ascending.
    """

    tokens: list[int]
    ends: list[int]


Encode = Callable[[str], Encoded]  # of a response's text


def as_written(processor: Processor, texts: Sequence[str]) -> Encode:
    """Responses as the family's policies write them, scored at the last token of each step.

    Args:
      processor: of the reward model's family.
      texts: the text that each of its ids adds, see `draw.token_texts`.
    """

    def encode(text: str) -> Encoded:
        tokens = processor.encode_response(text)
        return Encoded(tokens, steps.ends(tokens, texts))

    return encode


def marked(processor: Processor, mark: Sequence[int], between: Sequence[int]) -> Encode:
    """Responses with a mark after each step, at whose end the step is scored. Every part is tokenised alone.

        Bars red 4 blue 2 <mark> <between> Sum 4 + 2 = 6 <mark> <between> The answer is 6 <mark>
                               ^                              ^                                ^

    Args:
      processor: of the reward model's family.
      mark: its ids, control tokens or not; without any, a step is scored at its own last token.
      between: what comes before the next step.
    """

    def encode(text: str) -> Encoded:
        tokens, ends = list[int](), list[int]()
        for step in steps.split(text):
            tokens += between if tokens else ()
            tokens += [*processor.encode_response(step)[:-1], *mark]  # without the stop id
            ends.append(len(tokens) - 1)
        return Encoded(tokens, ends)

    return encode


def same_steps(text: str, encoded: Encoded) -> bool:
    """Whether a text and its ids have the same steps; not if several ids form one unusual line break."""
    return len(encoded.ends) == len(steps.split(text))


def row(
    prompt: Prompt,
    responses: Sequence[Response],
    encode: Encode,
    labels: Sequence[Sequence[float]] | None = None,
) -> Row:
    """The responses to a query as the branches of one row, to train on or, without labels, to score.

    The text of a response is encoded again, since the reward model may be of another family.

    Args:
      prompt: of the query, encoded by the reward model's family.
      responses: the branches. The correct ones also train the trunk.
      encode: of that family, `as_written` or `marked`.
      labels: one for each step of every response.

    Raises:
      ValueError: a text and its ids have different numbers of steps.
    """
    tokens = []
    places = []
    for number, response in enumerate(responses):
        ids, ends = encode(response.text)
        count = len(steps.split(response.text))
        if len(ends) != count or (labels is not None and len(labels[number]) != count):
            raise ValueError(
                f"query {prompt.query.id}, sample {response.sample}: {count} steps in the text, "
                f"{len(ends)} in its tokens, {'no' if labels is None else len(labels[number])} labels"
            )
        tokens.append(tuple(ids))
        places.append(tuple(zip(ends, labels[number] if labels is not None else [0.0] * count)))
    right = tuple(float(selection.is_correct(r)) for r in responses)
    return Row(prompt, tuple(tokens), right if labels is not None else (), tuple(places))


# ---- 3. training --------------------------------------------------------------------------------------


def make_loss(mc: float) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """The reward model's loss, for `step.make_train_step`, summed over a batch:

        sum over tokens of correct responses  -log p(token)
        + mc * sum over step ends  ( BCE(score, label) + ranking(score, label) )

    The first part makes the trunk a better judge of what is likely. Monte-Carlo labels are noisy where it
    matters (a wrong description often leads to the right answer), and with a weight near 1 they hurt.
    Cross-entropy alone mostly learns which queries are hard. The ranking compares steps with the same number
    and of the same query: it is the mean of softplus(score_j - score_i) over pairs with label_i > label_j,
    weighted by the difference of the labels.

    `right` counts the steps whose score is on the same side of 0.5 as the label.
    """

    def loss(
        model: ScoringModel, batch: Batch, remat: Callable | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        score, logprob = model(batch, remat)
        ends = batch.labels >= 0
        label = jnp.clip(batch.labels, 0.0, 1.0)
        cross_entropy = jnp.where(ends, jax.nn.softplus(score) - label * score, 0.0)
        number = layers.branch_sum(ends.astype(jnp.float32), batch.branch)
        rivals = (number[:, :, None] == number[:, None, :]) & ends[:, :, None] & ends[:, None, :]
        better = jnp.where(rivals, jnp.maximum(label[:, :, None] - label[:, None, :], 0.0), 0.0)
        lost = better * jax.nn.softplus(score[:, None, :] - score[:, :, None])
        ranking = lost.sum((1, 2)) / jnp.maximum(better.sum((1, 2)), 1e-6) * ends.sum(1)
        right = jnp.where(ends, (score > 0) == (label > 0.5), False)
        total = mc * (cross_entropy.sum() + ranking.sum()) - (logprob * batch.loss_mask).sum()
        tokens = mc * ends.sum() + batch.loss_mask.sum()
        counted = ends.sum().astype(jnp.float32)
        return total, {"tokens": tokens, "counted": counted, "right": right.sum().astype(jnp.float32)}

    return loss


# ---- 4. scores ----------------------------------------------------------------------------------------


@jax.jit
def token_scores(model: ScoringModel, batch: Batch) -> jax.Array:
    """The score in 0..1 after each token of the rows: float32[B, T]."""
    return jax.nn.sigmoid(model(batch)[0])


def scores(
    model: ScoringModel, batches: Iterable[tuple[tuple[Row, ...], Batch]], mesh: jax.sharding.Mesh
) -> Iterator[list[list[tuple[float, ...]]]]:
    """The step scores of every response of every row, batch by batch; the rows are made by `row`."""
    pending = None  # the device computes a batch while the host reads the one before
    for rows, batch in batches:
        result = token_scores(model, sharding.put_batch(batch, mesh))
        if pending is not None:
            yield _step_scores(*pending)
        pending = rows, result
    if pending is not None:
        yield _step_scores(*pending)


def _step_scores(rows: Sequence[Row], result: jax.Array) -> list[list[tuple[float, ...]]]:
    values = processes.fetch(result)
    out = []
    for at, row in enumerate(rows):
        start = row.prompt.length
        scored = list[tuple[float, ...]]()
        for response, marks in zip(row.responses, row.labels):
            scored.append(tuple(float(values[at, start + place]) for place, _ in marks))
            if not np.isfinite(scored[-1]).all():
                raise ValueError(
                    f"query {row.prompt.query.id!r}: step scores {scored[-1]}, so the reward model's logits "
                    "are not finite. Set sampling.dtype to bfloat16 or float32 (float16 ends at 65504); if "
                    "that does not help, its parameters have diverged"
                )
            start += len(response)
        out.append(scored)
    return out
