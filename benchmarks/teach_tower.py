"""Teaches the vision tower of an assembled checkpoint to read, before a language model listens to it.

    python benchmarks/assemble_smolvlm.py /checkpoints/smollm2
    python benchmarks/teach_tower.py /checkpoints/smollm2 /checkpoints/smollm2-seeing [--steps=1000]

From captions alone a tower finds the digits late, since a language model has to learn at the same time what
to do with them. Here a linear layer on the tower says of each of the image's tokens which digits have their
middle in it (two at most, from left to right), and is thrown away in the end. The figures are new ones of
`data.figures`; 2,000 that nothing is trained on tell how well it reads. OUTPUT is INPUT with another tower,
in a new or empty folder. INPUT may be any checkpoint in SmolVLM's format that reads an image of 128 pixels a
side as one token for each 16 x 16 of them; others are refused.
"""

import argparse
import functools
import multiprocessing
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mstar_jax import models, sharding
from mstar_jax.data import figures
from mstar_jax.models.smolvlm import SmolVLM, SmolVLMConfig, merge
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


def checked(source: pathlib.Path, output: pathlib.Path, steps: int, count: int) -> models.Pretrained:
    """The checkpoint to begin with, if all values fit.

    Args:
      source: its folder.
      output: a new or empty folder.
      steps, count: see `teach`.

    Raises:
      ValueError: a value is out of range, `output` holds something, or the tower does not fit the figures.
    """
    if min(steps, count) < 1:
        raise ValueError(f"--steps={steps} --figures={count}: at least 1 of each")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: nothing is overwritten")
    found = models.Pretrained(source)
    if not isinstance(found.config, SmolVLMConfig):
        raise ValueError(f"{source}/config.json: not a checkpoint in SmolVLM's format")
    vision, scale = found.config.vision, found.config.scale_factor
    if vision.image_size != figures.SIZE or vision.patch_size * scale != CELL:
        raise ValueError(
            f"{source}/config.json: image_size {vision.image_size}, patch_size {vision.patch_size} and "
            f"scale_factor {scale}; a tower of {figures.SIZE} pixels and patch_size * scale_factor = {CELL} "
            "can be taught here, as assemble_smolvlm.py writes it"
        )
    return found


def teach(tower: Vit, steps: int, count: int, rate: float, held: int = 2000) -> Vit:
    """Trains a tower, and prints how well it reads.

    Args:
      tower: is not changed.
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=1000, help="of 64 figures")
    parser.add_argument("--figures", type=int, default=32_000, help="that it is trained on")
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    values = parser.parse_args()
    try:
        source = checked(values.input, values.output, values.steps, values.figures)
    except ValueError as error:
        parser.error(str(error))
    policy = source.load(jnp.float32)
    assert isinstance(policy, SmolVLM)
    policy.tower = teach(policy.tower, values.steps, values.figures, values.rate)
    source.save(policy, values.output)
    print(values.output)


if __name__ == "__main__":
    main()
