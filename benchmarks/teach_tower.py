"""Teaches a vision tower to read, before a language model listens to it (see `assemble_smolvlm.py`).

From captions alone a tower finds the digits late, since a language model has to learn at the same time what
to do with them. Here a linear layer on the tower says of each of the image's tokens what has its middle in
it (two marks at most, from left to right): a shape, or which digit, of units, tens or hundreds; and the
colour and the form that it belongs to. So a token tells whose number it is a part of. The layer is thrown
away in the end: `connector` says the same in the language model's own embeddings. The figures are new ones of
`data.figures`; 2,000 that nothing is trained on tell how well it reads.
"""

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mstar_jax import sharding
from mstar_jax.data import figures, truth
from mstar_jax.models.smolvlm import merge
from mstar_jax.models.vision import Vit, patchify

CELL = 16  # pixels a side of a token's part of the image
CELLS = figures.SIZE // CELL
SLOTS = 2  # marks of a cell
SHAPE, NOTHING = 10, 11  # beside the ten digits
COLOURS, FORMS = list(truth.COLOURS), list(truth.SHAPES)
# Answers to each question about a slot: the mark, its place, colour and form; the last is "none".
ANSWERS = (NOTHING + 1, 3 + 1, len(COLOURS) + 1, len(FORMS) + 1)
# Tokens that the answers are like for the language model, where there is one, and how much they count
WORDS: tuple[tuple[list[str], float], ...] = (
    ([str(digit) for digit in range(10)], 1.0),
    ([" ones", " tens", " hundreds"], 0.5),
    ([f" {name}" for name in COLOURS], 1.0),
    ([f" {name}" for name in FORMS], 1.0),
)
BATCH, PIECE = 64, 500
EMPTY = 0.1  # weight of a slot with nothing in it: most are


def described(mark: figures.Mark) -> tuple[int, ...]:
    """The answers for a mark."""
    digit = SHAPE if mark.digit is None else mark.digit
    place = ANSWERS[1] - 1 if mark.place is None else mark.place
    words = mark.name.split()
    named = (next((i for i, n in enumerate(names) if n in words), len(names)) for names in (COLOURS, FORMS))
    return digit, place, *named


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """PIECE figures: uint8[n, S, S, 3], and uint8[n, cells, SLOTS, 4], the answers for each cell."""
    rng = np.random.default_rng([1, seed, 1])  # no stream of `figures.make` has three numbers
    images = np.zeros((PIECE, figures.SIZE, figures.SIZE, 3), np.uint8)
    answers = np.full((PIECE, CELLS**2, SLOTS, len(ANSWERS)), np.array(ANSWERS) - 1, np.uint8)
    for image, cells in zip(images, answers, strict=True):
        marks: list[figures.Mark] = []
        image[:] = np.asarray(figures.render(rng, *figures.draw_objects(rng), marks))
        for mark in sorted(marks, key=lambda one: one.x):
            cell = cells[min(int(mark.y) // CELL, CELLS - 1) * CELLS + min(int(mark.x) // CELL, CELLS - 1)]
            cell[int(cell[0, 0] != NOTHING)] = described(mark)
    return images, answers


def figures_of(seeds: range) -> tuple[np.ndarray, np.ndarray]:
    """`drawn` of many seeds, by all cores."""
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, len(seeds))) as pool:
        images, answers = zip(*pool.map(drawn, seeds, chunksize=1))
    return np.concatenate(images), np.concatenate(answers)


def features(tower: Vit, images: jax.Array) -> jax.Array:
    """What a connector gets of uint8[B, S, S, 3]: [B, cells, features of a cell]."""
    size = tower.config.patch_size
    patches = patchify((images / 127.5 - 1).astype(tower.patch[...].dtype), size)
    return merge(tower(patches), CELL // size)


class Reader(nnx.Module):
    """The tower with a linear layer that says what is in each cell."""

    def __init__(self, tower: Vit):
        width = tower.config.hidden_size * (CELL // tower.config.patch_size) ** 2
        self.tower = tower
        self.head = nnx.Param(jnp.zeros((width, SLOTS * sum(ANSWERS))))

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8[B, S, S, 3] -> float32[B, cells, SLOTS, sum(ANSWERS)]."""
        scores = features(self.tower, images) @ self.head[...]
        return scores.reshape(*scores.shape[:-1], SLOTS, sum(ANSWERS)).astype(jnp.float32)


def loss(
    reader: Reader, images: jax.Array, answers: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats of a slot; and float32[2], the share of the digits that are read, and of those
    that are read with their place and what they belong to."""
    scores = jnp.split(sharding.cast(reader, dtype)(images), np.cumsum(ANSWERS)[:-1], axis=-1)
    there = answers[..., 0] != NOTHING
    total = jnp.zeros(())
    for at, one in enumerate(scores):
        weight = jnp.where(there, 1.0, EMPTY if at == 0 else 0.0)
        each = optax.softmax_cross_entropy_with_integer_labels(one, answers[..., at].astype(jnp.int32))
        total += (each * weight).sum() / weight.sum()
    right = jnp.stack([one.argmax(-1) for one in scores], axis=-1) == answers
    digits = answers[..., 0] < SHAPE
    read = [(what & digits).sum() / digits.sum() for what in (right[..., 0], right.all(-1))]
    return total, jnp.stack(read)


def shares(read: Sequence[jax.Array]) -> str:
    """The shares that `loss` gives, of several batches, in words."""
    digits, whole = 100 * np.mean(read, axis=0)
    return f"{digits:.1f} % of the digits are read, {whole:.1f} % with what they belong to"


def teach(
    tower: Vit,
    steps: int,
    count: int,
    dtype: jax.typing.DTypeLike,
    rate: float = 1e-3,
    held: int = 2000,
) -> Vit:
    """Trains a tower, and prints how well it reads.

    Args:
      tower: of images of figures.SIZE pixels a side, one token for each CELL x CELL of them; is not changed.
      steps: of BATCH figures.
      count: how many figures.
      dtype: of the computation.
      rate: the highest learning rate.
      held: how many further figures tell how well it reads.
    """
    began = time.monotonic()
    images, answers = (part[: held + count] for part in figures_of(range(-(-(held + count) // PIECE))))
    print(f"{len(images)} figures, {time.monotonic() - began:.0f} s", flush=True)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps, 0.02 * rate)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    measure = jax.jit(functools.partial(loss, dtype=dtype))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(reader, state, images, answers):
        values, grads = jax.value_and_grad(loss, has_aux=True)(reader, images, answers, dtype)
        updates, state = tx.update(grads, state, reader)
        return optax.apply_updates(reader, updates), state, values

    reader = jax.tree.map(jnp.copy, Reader(tower))
    state = tx.init(reader)
    rng = np.random.default_rng(0)
    recent = []
    for at in range(1, steps + 1):
        rows = rng.integers(held, len(images), BATCH)
        reader, state, (_, read) = step(reader, state, images[rows], answers[rows])
        recent.append(read)
        if at % 100 == 0 or at == steps:
            print(f"step {at} of {steps}: {shares(recent)}", flush=True)
            recent = []
    parts = [slice(at, at + PIECE) for at in range(0, held, PIECE)]
    read = [measure(reader, images[part], answers[part])[1] for part in parts]
    print(f"held-out figures: {shares(read)}; {time.monotonic() - began:.0f} s in all", flush=True)
    return reader.tower


def connector(tower: Vit, embedding: Callable[[str], np.ndarray], count: int = 4000) -> np.ndarray:
    """float32[features of a cell, width of the language model]: says what a tower reads in its embeddings.

    The language model knows its own embeddings, so it can look for a colour and copy a digit at once. By
    least squares, a token is the sum of the embeddings of what has its middle in the token's cell; nothing is
    zero.

    Args:
      tower: see `teach`.
      embedding: of one of WORDS' tokens.
      count: figures that nothing else is trained on.
    """
    tables = []
    for at, (words, weight) in enumerate(WORDS):
        table = weight * np.stack([embedding(word) for word in words])
        tables.append(np.pad(table, ((0, ANSWERS[at] - len(words)), (0, 0))))
    measure = jax.jit(functools.partial(features, tower))
    square: np.ndarray = np.zeros(())
    product: np.ndarray = np.zeros(())
    offset = 1000  # no figure of `teach`
    for piece in range(offset, offset + -(-count // PIECE)):  # all at once would take gigabytes
        images, answers = drawn(piece)
        found = np.concatenate([measure(images[at : at + 100]) for at in range(0, PIECE, 100)])
        wanted = np.zeros((*found.shape[:2], tables[0].shape[1]), np.float32)
        for at, table in enumerate(tables):
            said = table[answers[..., at]]
            wanted += said.sum(axis=2) if at < 2 else said[:, :, 0]  # two digits have one owner
        x, y = (part.reshape(-1, part.shape[-1]) for part in (found, wanted))
        square, product = square + x.T @ x, product + x.T @ y
    ridge = 1e-3 * np.trace(square) / len(square) * np.eye(len(square))
    return np.linalg.solve(square + ridge, product).astype(np.float32)
