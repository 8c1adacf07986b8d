"""Teaches a vision tower to read, before a language model listens to it (see `assemble_smolvlm.py`).

From captions alone a tower finds the digits late, since a language model has to learn at the same time what
to do with them. Here a linear layer on the tower says of each of the image's tokens which digits have their
middle in it (two at most, from left to right), and is thrown away in the end. The figures are new ones of
`data.figures`; 2,000 that nothing is trained on tell how well it reads.
"""

import functools
import multiprocessing
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mstar_jax import sharding
from mstar_jax.data import figures
from mstar_jax.models.smolvlm import merge
from mstar_jax.models.vision import Vit, patchify

CELL = 16  # pixels a side of a token's part of the image
CELLS = figures.SIZE // CELL
NONE = 10  # the class of no digit
SLOTS = 2  # digits of a cell
BATCH, PIECE = 64, 500
EMPTY = 0.1  # weight of a slot without a digit: most are


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """PIECE figures: uint8[n, S, S, 3], and uint8[n, cells, SLOTS], the digits in each cell or NONE."""
    rng = np.random.default_rng([1, seed])
    images = np.zeros((PIECE, figures.SIZE, figures.SIZE, 3), np.uint8)
    digits = np.full((PIECE, CELLS**2, SLOTS), NONE, np.uint8)
    for image, cells in zip(images, digits, strict=True):
        printed: list[figures.Digit] = []
        image[:] = np.asarray(figures.render(rng, *figures.draw_objects(rng), printed))
        for digit, x, y in sorted(printed, key=lambda one: one.x):
            cell = cells[min(int(y) // CELL, CELLS - 1) * CELLS + min(int(x) // CELL, CELLS - 1)]
            cell[int(cell[0] != NONE)] = digit
    return images, digits


def figures_of(seeds: range) -> tuple[np.ndarray, np.ndarray]:
    """`drawn` of many seeds, by all cores."""
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, len(seeds))) as pool:
        images, digits = zip(*pool.map(drawn, seeds, chunksize=1))
    return np.concatenate(images), np.concatenate(digits)


class Reader(nnx.Module):
    """The tower with a linear layer that names the digits of each cell."""

    def __init__(self, tower: Vit):
        width = tower.config.hidden_size * (CELL // tower.config.patch_size) ** 2
        self.tower = tower
        self.head = nnx.Param(jnp.zeros((width, SLOTS * (NONE + 1))))

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8[B, S, S, 3] -> float32[B, cells, SLOTS, NONE + 1]."""
        size = self.tower.config.patch_size
        patches = patchify((images / 127.5 - 1).astype(self.head[...].dtype), size)
        scores = merge(self.tower(patches), CELL // size) @ self.head[...]
        return scores.reshape(*scores.shape[:-1], SLOTS, NONE + 1).astype(jnp.float32)


def loss(
    reader: Reader, images: jax.Array, digits: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats of a slot, and the share of the digits that are read."""
    scores = sharding.cast(reader, dtype)(images)
    there = digits != NONE
    weight = jnp.where(there, 1.0, EMPTY)
    each = optax.softmax_cross_entropy_with_integer_labels(scores, digits.astype(jnp.int32))
    right = (scores.argmax(-1) == digits) & there
    return (each * weight).sum() / weight.sum(), right.sum() / there.sum()


def teach(tower: Vit, steps: int, count: int, rate: float = 1e-3, held: int = 2000) -> Vit:
    """Trains a tower, and prints how well it reads.

    Args:
      tower: of images of figures.SIZE pixels a side, one token for each CELL x CELL of them; is not changed.
      steps: of BATCH figures.
      count: how many figures.
      rate: the highest learning rate.
      held: how many further figures tell how well it reads.
    """
    began = time.monotonic()
    images, digits = (part[: held + count] for part in figures_of(range(-(-(held + count) // PIECE))))
    print(f"{len(images)} figures, {time.monotonic() - began:.0f} s", flush=True)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps, 0.02 * rate)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    measure = jax.jit(functools.partial(loss, dtype=dtype))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(reader, state, images, digits):
        values, grads = jax.value_and_grad(loss, has_aux=True)(reader, images, digits, dtype)
        updates, state = tx.update(grads, state, reader)
        return optax.apply_updates(reader, updates), state, values

    reader = jax.tree.map(jnp.copy, Reader(tower))
    state = tx.init(reader)
    rng = np.random.default_rng(0)
    recent = []
    for at in range(1, steps + 1):
        rows = rng.integers(held, len(images), BATCH)
        reader, state, (_, read) = step(reader, state, images[rows], digits[rows])
        recent.append(read)
        if at % 100 == 0 or at == steps:
            print(f"step {at} of {steps}: {100 * np.mean(recent):.1f} % of the digits are read", flush=True)
            recent = []
    parts = [slice(at, at + PIECE) for at in range(0, held, PIECE)]
    read = np.mean([measure(reader, images[part], digits[part])[1] for part in parts])
    print(f"held-out figures: {100 * read:.1f} %; {time.monotonic() - began:.0f} s in all", flush=True)
    return reader.tower
