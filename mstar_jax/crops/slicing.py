"""MiniCPM-V's image slices: their sizes, their pixels as patches, their position ids in the encoder.

Source: openbmb/MiniCPM-Llama3-V-2_5. The encoder sees the whole image (the source) and, if it has more pixels
than the encoder's resolution squared, also a grid of slices. Aspect ratios are kept, so every image has its
own grid of patches. Sizes are (width, height) in pixels, as in PIL.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Generic, NamedTuple

import numpy as np
from PIL import Image

from mstar_jax.crops.arrays import Array

Size = tuple[int, int]
LENGTH = 128  # the number of patches is padded to a multiple of this


class Slices(NamedTuple, Generic[Array]):
    """The images of a query, each with its own grid of patches; in a `Batch`, with a leading B.

    Attributes:
      patches: uint8[C, L, 3 * patch_size**2]; zeros after an image's own patches. The device normalises the
        image's own ones (`models.vision.normalised`).
      positions: int32[C, L], rows of the encoder's position table.
      attended: int32[C], the number of columns that the encoder attends to, padding or not; 0 for no image.
      grid: int32[C, 2], rows and columns of the image's own patches, which the resampler attends to.
    """

    patches: Array
    positions: Array
    attended: Array
    grid: Array


class Layout(NamedTuple):
    """How an image is resized and sliced.

    Attributes:
      source: size that the whole image is resized to.
      columns, rows: grid of slices; both 0 if there are none.
      slice: size of a slice.
    """

    source: Size
    columns: int
    rows: int
    slice: Size

    @property
    def crops(self) -> int:
        """The number of images that the encoder sees: the source and its slices."""
        return 1 + self.columns * self.rows


def _multiple(length: float, unit: int) -> int:
    return max(round(length / unit) * unit, unit)  # as officially, round() takes halves to the even number


def best_size(width: float, height: float, resolution: int, patch: int, upscale: bool) -> Size:
    """A size with this aspect ratio and about resolution**2 pixels, in whole patches.

    Without `upscale`, an image with fewer pixels keeps its size, rounded to whole patches.
    """
    if upscale or width * height > resolution**2:
        ratio = width / height
        height = int(resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _multiple(width, patch), _multiple(height, patch)


def layout(width: int, height: int, max_slices: int, resolution: int, patch: int) -> Layout:
    """Chooses the grid whose aspect ratio is nearest to the image's.

    Args:
      width, height: of the image.
      max_slices: the most slices; with 1, an image is never sliced.
      resolution: side in pixels of a square image that fills the encoder (448 for the released model).
      patch: side of a patch in pixels.
    """
    wanted = min(math.ceil(width * height / resolution**2), max_slices)
    if wanted <= 1:
        return Layout(best_size(width, height, resolution, patch, True), 0, 0, (0, 0))
    grids = [
        (columns, count // columns)
        for count in (wanted - 1, wanted, wanted + 1)
        if 1 < count <= max_slices
        for columns in range(1, count + 1)
        if count % columns == 0
    ]
    ratio = math.log(width / height)
    columns, rows = min(grids, key=lambda grid: abs(ratio - math.log(grid[0] / grid[1])))
    cell = _multiple(width, columns) / columns, _multiple(height, rows) / rows
    source = best_size(width, height, resolution, patch, False)
    return Layout(source, columns, rows, best_size(*cell, resolution, patch, True))


def to_patches(image: Image.Image | np.ndarray, patch: int) -> tuple[np.ndarray, Size]:
    """Splits an RGB image uint8[H, W, 3] into patches.

    Returns:
      uint8[h * w, 3 * patch**2], row-major patches of (channel, y, x); and (h, w).
    """
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    x = pixels.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
    return x.reshape(rows * columns, -1), (rows, columns)


def slice_image(
    image: Image.Image, max_slices: int, resolution: int, patch: int
) -> list[tuple[np.ndarray, Size]]:
    """Patches and (h, w) of the source, then of the slices row by row; see `layout` and `to_patches`."""
    chosen = layout(*image.size, max_slices, resolution, patch)
    images = [np.asarray(image.resize(chosen.source, Image.Resampling.BICUBIC))]
    if chosen.crops > 1:
        width, height = chosen.slice
        whole = image.resize((width * chosen.columns, height * chosen.rows), Image.Resampling.BICUBIC)
        cells = np.asarray(whole).reshape(chosen.rows, height, chosen.columns, width, 3).swapaxes(1, 2)
        images += list(cells.reshape(-1, height, width, 3))
    return [to_patches(one, patch) for one in images]


@functools.lru_cache(maxsize=256)
def position_ids(length: int, side: int) -> np.ndarray:
    """Rows of the position table for `length` patches in one line.

    Officially, the encoder is given every image as a grid of 1 x length patches, so patch i has row
    floor(side * i / length) up to rounding. About 14 neighbours share a row, and only the table's first
    `side` rows are used. Rounding matters for a fifth of all lengths: coordinates are those of
    `torch.arange(0, 1, step)` in the PyTorch version of the time, computed eight at a time from a float32
    base and a float32 step.

    Returns:
      int32[length], read-only.
    """
    index = np.arange(length)
    step = np.float64(np.float32(1 / max(length, 1)))
    base = (index // 8 * 8 * step).astype(np.float32)
    coordinate = (base.astype(np.float64) + index % 8 * step).astype(np.float32)
    boundaries = (1 / side + np.arange(side - 1) / side).astype(np.float32)
    ids = np.searchsorted(boundaries, coordinate, side="right").astype(np.int32)
    ids.setflags(write=False)
    return ids


def padded_length(longest: int, resolution: int, patch: int) -> int:
    """The number of patches that images are padded to, the same for all but very long images."""
    usual = 9 * (resolution // patch) ** 2 // 8  # images that are not square may have a few more patches
    return -(-max(longest, usual) // LENGTH) * LENGTH


@dataclasses.dataclass(frozen=True)
class Slicing:
    """Images to slices, see `structs.Processor.cut`.

    Attributes:
      max_slices, resolution, patch: see `layout`.
      side: rows of the encoder's grid of positions, see `position_ids`.
      corrected_mask: see `models.minicpmv25.MiniCPMV25Config`.
    """

    max_slices: int
    resolution: int
    patch: int
    side: int
    corrected_mask: bool

    def layout(self, size: Size) -> Layout:
        """How an image of this (width, height) is sliced."""
        return layout(*size, self.max_slices, self.resolution, self.patch)

    def __call__(self, images: Sequence[Image.Image]) -> Slices[np.ndarray]:
        """Each image and then its slices, padded to one length (see `padded_length`)."""
        return self.padded(
            [
                crop
                for image in images
                for crop in slice_image(image, self.max_slices, self.resolution, self.patch)
            ]
        )

    def padded(self, crops: Sequence[tuple[np.ndarray, Size]]) -> Slices[np.ndarray]:
        """Patches of images and their grids, from `slice_image`, as arrays of one length."""
        longest = max((len(patches) for patches, _ in crops), default=0)
        length = padded_length(longest, self.resolution, self.patch)
        out: Slices[np.ndarray] = Slices(
            np.zeros((len(crops), length, 3 * self.patch**2), np.uint8),
            np.zeros((len(crops), length), np.int32),
            np.zeros(len(crops), np.int32),
            np.array([grid for _, grid in crops], np.int32).reshape(-1, 2),
        )
        for i, (patches, _) in enumerate(crops):
            out.patches[i, : len(patches)] = patches
            out.attended[i] = len(patches) if self.corrected_mask else longest
            ids = position_ids(int(out.attended[i]), self.side)
            out.positions[i, : len(ids)] = ids
        return out
