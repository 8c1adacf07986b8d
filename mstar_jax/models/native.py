"""Images in native resolution, as Qwen2.5-VL and Qwen3-VL read them: patches and positions.

Source: transformers' get_rope_index. How an image becomes crops is in `crops.native`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mstar_jax.crops.native import Crops, Layout, Native, rounded
from mstar_jax.models.vision import VitConfig, normalised, patchify
from mstar_jax.models.vlm import PolicyConfig

FRAMES = 2  # a patch embedding is of two frames of a video; an image is both


@dataclasses.dataclass(frozen=True)
class QwenConfig(PolicyConfig):
    """Dimensions of the policy.

    Attributes:
      decoder: the decoder, with M-RoPE.
      vision: the tower; its `image_size` is the side of a crop.
      num_crops: the most pixels of an image, in crops. An image whose sides are no multiples of a crop's has
        more of them, partly filled.
      merged: patches along a side of the square that becomes one feature.
      min_pixels, max_pixels: of an image, once it is resized.
      mean, std: of red, green and blue, which pixels are normalised with.
      image_token_id: what stands for a feature in official prompts.
    """

    merged: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_token_id: int = 151655

    def __post_init__(self):
        side, head = self.vision.image_size, self.vision.hidden_size // self.vision.num_heads
        if side % self.unit:
            raise ValueError(
                f"a crop of {side} pixels a side holds no whole number of {self.unit}, a feature's"
            )
        if head % 4:
            raise ValueError(
                f"the tower's heads are {head} wide, no multiple of 4, as its rotary positions need"
            )
        if not self.unit**2 <= self.min_pixels <= self.most_pixels:
            raise ValueError(
                f"min_pixels = {self.min_pixels} is not between a feature's {self.unit**2} and the most, "
                f"{self.most_pixels}: of max_pixels = {self.max_pixels}, or of {self.num_crops} crops of "
                f"{side} x {side} (policy.max_crops)"
            )

    @property
    def unit(self) -> int:
        """Pixels along the side of a feature."""
        return self.merged * self.vision.patch_size

    @property
    def units(self) -> int:
        """Features along the side of a crop."""
        return self.vision.image_size // self.unit

    @property
    def most_pixels(self) -> int:
        """The most pixels of an image."""
        return min(self.max_pixels, self.num_crops * self.vision.image_size**2)

    @property
    def most_crops(self) -> int:
        # an image of no whole number of crops along its sides has more than its pixels fill
        sides = [self.vision.image_size * self.num_crops * share for share in (1, 2, 4)]
        shapes = [(sides[0], side * 3 // 4) for side in sides]
        return rounded(max(self.num_crops, *(self.cut.layout(size).crops for size in shapes)))

    @property
    def cut(self) -> Native:
        """What makes crops of a query's images."""
        v = self.vision
        return Native(v.patch_size, self.unit, v.image_size, self.min_pixels, self.most_pixels)


def feature_index(config: QwenConfig, cut: Layout, first: int) -> np.ndarray:
    """int32[features]: the rows of the feature table of an image whose first crop is number `first`, in the
    order of the prompt, line by line. In the table, the features of a crop are together."""
    row, column = np.indices((cut.rows, cut.columns)).reshape(2, -1)
    units = config.units
    crop = first + row // units * cut.across + column // units
    return (crop * units**2 + row % units * units + column % units).astype(np.int32)


def token_positions(images: np.ndarray, cuts: Sequence[Layout]) -> np.ndarray:
    """int32[3, P]: time, height and width of a prompt's tokens, for bool[P], whether they stand for features.

    Three words and an image of 2 x 3 features between them:

        time     0 1  2 2 2 2 2 2  5
        height   0 1  2 2 2 3 3 3  5
        width    0 1  2 3 4 2 3 4  5     text goes on after the image's greatest position
    """
    out = np.empty((3, len(images)), np.int32)
    at = position = 0
    for cut in cuts:
        start = at + int(np.argmax(images[at:]))
        out[:, at:start] = position + np.arange(start - at)
        position += start - at
        at = start + cut.features
        out[0, start:at] = position
        out[1:, start:at] = position + np.indices((cut.rows, cut.columns)).reshape(2, -1)
        position += max(cut.rows, cut.columns)
    out[:, at:] = position + np.arange(len(images) - at)
    return out


# --------------------------------------------------------------------------------- the tower's input
class Patches(NamedTuple):
    """The patches of B queries, crop by crop, T in all; those of a crop line by line.

    Attributes:
      values: [B, T, 3 * 2 * patch_size**2], each frame's pixels in the order (channel, frame, y, x).
      segment: int32[B, T], the number of the image, 0 for a patch that only fills up.
      row, column: int32[B, T], in the image.
      grid: int32[B, T, 2], rows and columns of the image; 0 where there is none.
    """

    values: jax.Array
    segment: jax.Array
    row: jax.Array
    column: jax.Array
    grid: jax.Array


def patches_of(config: QwenConfig, crops: Crops[jax.Array], dtype: DTypeLike) -> Patches:
    """The patches of crops with leading [B, C], normalised; their values have this dtype, the tower's."""
    rows, count, size = *crops.pixels.shape[:2], config.vision.patch_size
    side = config.vision.side
    number, row, column, down, across = jnp.moveaxis(crops.places[..., None, None], 2, 0)
    row = row + jnp.arange(side)[:, None] + jnp.zeros((1, side), jnp.int32)
    column = column + jnp.arange(side) + jnp.zeros((side, 1), jnp.int32)
    own = (row < down) & (column < across)
    values = patchify(crops.pixels.reshape(-1, *crops.pixels.shape[2:]), size)
    mean, std = (np.repeat(x, size**2).tolist() for x in (config.mean, config.std))  # by channel first
    values = normalised(values, own.reshape(-1, side**2, 1), mean, std, dtype)
    values = values.reshape(*values.shape[:2], 3, 1, size**2)
    values = jnp.broadcast_to(values, (*values.shape[:3], FRAMES, size**2))

    def flat(x: jax.Array) -> jax.Array:  # [B, C, side, side] -> [B, T]
        return x.reshape(rows, -1)

    return Patches(
        values.reshape(rows, count * side**2, -1),
        flat(jnp.where(own, number, 0)),
        flat(row),
        flat(column),
        jnp.repeat(crops.places[..., 3:], side**2, axis=1),
    )


def axial_rope(config: VitConfig, patches: Patches) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), float32[B, T, N/2]: half the frequencies turn with a patch's row, half with its column."""
    quarter = config.hidden_size // config.num_heads // 4
    inverse = 10000.0 ** -(jnp.arange(quarter, dtype=jnp.float32) / quarter)
    place = jnp.stack([patches.row, patches.column], axis=-1).astype(jnp.float32)
    angle = (place[..., None] * inverse).reshape(*place.shape[:2], -1)
    return jnp.cos(angle), jnp.sin(angle)
