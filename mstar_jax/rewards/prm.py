"""The process reward model: Monte-Carlo labels of steps, its loss, and its scores.

    label   of a step: how often completions from its end reach the gold answer; of the last one the verdict
    score   of a step: sigmoid of the reward model's output at the step's last token

A response's branch, with the places where labels and scores stand (| ends a step):

    Bars red 4 blue 2|Sum 4 + 2 = 6|The answer is 6<stop>
                     ^             ^                ^

Labels cost the most, so a query's distinct step prefixes are found first; the responses that hold them lie in
one row behind the query's prompt, and every completion goes on from a place in that row.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mstar_jax import processes, sharding
from mstar_jax.models import layers
from mstar_jax.rewards import steps
from mstar_jax.structs import Batch, Prompt, Response, Row

Prefix = tuple[int, ...]  # a response's tokens up to the end of a step

# ---- 1. labels ----------------------------------------------------------------------------------------


def prefixes(responses: Sequence[Response], texts: Sequence[str]) -> list[Prefix]:
    """The distinct step prefixes of a query's responses that need completions: all but the whole responses.

    Args:
      responses: of one query.
      texts: what each id adds to a text, see `draw.token_texts`.
    """
    found = dict[Prefix, None]()
    for response in responses:
        for end in steps.ends(response.tokens, texts)[:-1]:
            found[response.tokens[: end + 1]] = None
    return list(found)


def stems(prompt: Prompt, found: Sequence[Prefix], completions: int, samples: int, longest: int) -> list[Row]:
    """Rows that continue every prefix `completions` times, up to `samples` at once.

    A prefix that begins a longer one is not laid out again: its completions start within the longer one. A
    completion's key is made of its prefix and number, so it does not depend on the others. A row is filled
    up with samples from the prompt, which nobody reads.

    Args:
      prompt: of the query.
      found: its distinct prefixes.
      completions: of each.
      samples: of a row; a multiple of `completions`.
      longest: most tokens of a row.

    Raises:
      ValueError: `samples` is no multiple of `completions`.
    """
    if samples % completions:
        raise ValueError(f"{samples} samples a row cannot be shared out in {completions} for every step")
    rows, part = list[Row](), list[Prefix]()
    for prefix in sorted(found):  # what begins another comes right before it
        size = prompt.length + sum(map(len, _whole([*part, prefix])))
        if part and (len(part) == samples // completions or size > longest):
            rows.append(_stem(prompt, part, completions, samples))
            part = []
        part.append(prefix)
    return [*rows, _stem(prompt, part, completions, samples)] if part else rows


def _whole(part: Sequence[Prefix]) -> list[Prefix]:
    """Those of sorted prefixes that begin no other one."""
    return [p for p, after in zip(part, [*part[1:], ()]) if after[: len(p)] != p]


def _stem(prompt: Prompt, part: Sequence[Prefix], completions: int, samples: int) -> Row:
    held, starts = _whole(part), list[tuple[int, int, int]]()
    for prefix in part:
        branch = next(i for i, whole in enumerate(held, start=1) if whole[: len(prefix)] == prefix)
        key = zlib.crc32(np.array(prefix, np.int32).tobytes())
        starts += [(branch, len(prefix), (key + number) % 2**32) for number in range(completions)]
    starts += [(0, 0, number) for number in range(samples - len(starts))]
    return Row(prompt, tuple(held), starts=tuple(starts))


def label(
    response: Response, values: dict[Prefix, float], texts: Sequence[str], *, hard: bool = False
) -> tuple[float, ...]:
    """The labels of a response's steps: the share of completions that reached the gold answer from each, and
    at last the verdict. Hard labels are 1 where any did.

    A truncated response has no last step: its unfinished one is wrong. A response of one step has its verdict
    alone, an empty one has no label.

    Raises:
      KeyError: a step prefix is not among the values.
    """
    found = [values[response.tokens[: end + 1]] for end in steps.ends(response.tokens, texts)[:-1]]
    if hard:
        found = [float(value > 0) for value in found]
    verdict = response.verdict == "correct" and not response.truncated
    return (*found, float(verdict)) if steps.split(response.text) else ()


# ---- 2. rows ------------------------------------------------------------------------------------------


def same_steps(text: str, tokens: Sequence[int], texts: Sequence[str]) -> bool:
    """Whether a text and its ids have the same steps: not so where several ids make one odd blank."""
    return len(steps.ends(tokens, texts)) == len(steps.split(text))


def row(
    prompt: Prompt,
    responses: Sequence[Response],
    encode: Callable[[str], list[int]],
    texts: Sequence[str],
    labels: Sequence[Sequence[float]] | None = None,
) -> Row:
    """A query's responses side by side, to train the reward model or, without labels, to score them.

    The text of a response counts and not its tokens: the reward model may be of another family.

    Args:
      prompt: the query's, as the reward model's family encodes it.
      responses: the branches. The correct ones also teach the trunk.
      encode: text -> ids closed by the stop id, the family's.
      texts: what each id of the family adds to a text.
      labels: one a step of every response.

    Raises:
      ValueError: the steps of a text and of its ids differ in number.
    """
    tokens, places = [], []
    for number, response in enumerate(responses):
        ids = encode(response.text)
        ends, count = steps.ends(ids, texts), len(steps.split(response.text))
        if len(ends) != count or (labels is not None and len(labels[number]) != count):
            raise ValueError(
                f"query {prompt.query.id}, sample {response.sample}: {count} steps in the text, "
                f"{len(ends)} in its tokens, {'no' if labels is None else len(labels[number])} labels"
            )
        tokens.append(tuple(ids))
        places.append(tuple(zip(ends, labels[number] if labels is not None else [0.0] * count)))
    right = tuple(float(r.verdict == "correct" and not r.truncated) for r in responses)
    return Row(prompt, tuple(tokens), right if labels is not None else (), tuple(places))


# ---- 3. training --------------------------------------------------------------------------------------


def make_loss(mc: float) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """The reward model's loss, for `step.make_train_step`; of a batch, summed:

        sum over correct responses' tokens  -log p(token)
        + mc  sum over step ends  ( BCE(score, label) + ranking(score, label) )

    The first part makes the trunk a better judge of what is likely. Monte-Carlo labels are noisy where it
    matters (a wrong description often leads to the right answer), and with a weight near 1 they spoil it.
    Cross-entropy alone mostly learns which queries are hard; the ranking is among the steps of one number of
    one query: the mean of softplus(score_j - score_i) over pairs, weighted by label_i - label_j > 0.

    `right` counts the steps whose score is on the label's side of 0.5.
    """

    def loss(model: Any, batch: Batch, remat: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        score, logprob = model(batch, remat)
        ends, label = batch.labels >= 0, jnp.clip(batch.labels, 0.0, 1.0)
        cross_entropy = jnp.where(ends, jax.nn.softplus(score) - label * score, 0.0)
        number = layers.branch_sum(ends.astype(jnp.float32), batch.branch)
        rivals = (number[:, :, None] == number[:, None, :]) & ends[:, :, None] & ends[:, None, :]
        better = jnp.where(rivals, jnp.maximum(label[:, :, None] - label[:, None, :], 0.0), 0.0)
        lost = better * jax.nn.softplus(score[:, None, :] - score[:, :, None])
        ranking = lost.sum((1, 2)) / jnp.maximum(better.sum((1, 2)), 1e-6) * ends.sum(1)
        right = jnp.where(ends, (score > 0) == (label > 0.5), False)
        total = mc * (cross_entropy.sum() + ranking.sum()) - (logprob * batch.loss_mask).sum()
        return total, {"tokens": mc * ends.sum() + batch.loss_mask.sum(), "right": right.sum()}

    return loss


# ---- 4. scores ----------------------------------------------------------------------------------------


@jax.jit
def token_scores(model: Any, batch: Batch) -> jax.Array:
    """float32[B, T] in 0..1 after each token of the rows."""
    return jax.nn.sigmoid(model(batch)[0])


def scores(
    model: Any, batches: Iterable[tuple[tuple[Row, ...], Batch]], mesh: Any
) -> Iterator[list[list[tuple[float, ...]]]]:
    """The step scores of every response of every row, batch by batch; rows as `row` makes them."""
    pending = None  # the device works on a batch while the one before it is read
    for rows, batch in batches:
        result = token_scores(model, sharding.put_batch(batch, mesh))
        if pending is not None:
            yield _read(*pending)
        pending = rows, result
    if pending is not None:
        yield _read(*pending)


def _read(rows: Sequence[Row], result: jax.Array) -> list[list[tuple[float, ...]]]:
    values, out = processes.fetch(result), []
    for at, row in enumerate(rows):
        start, scored = row.prompt.length, list[tuple[float, ...]]()
        for response, marks in zip(row.responses, row.labels):
            scored.append(tuple(float(values[at, start + place]) for place, _ in marks))
            start += len(response)
        out.append(scored)
    return out
