"""MiniCPM-V's image slices: their sizes, their pixels as patches, their position ids in the encoder.

Source: openbmb/MiniCPM-Llama3-V-2_5. An image is seen whole (the source) and, where it has more pixels
than the encoder's resolution squared, once more in a grid of slices; aspect ratios are kept, so every
image has a grid of patches of its own. Sizes are (width, height) in pixels as in PIL.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

Size = tuple[int, int]


class Layout(NamedTuple):
    """How an image is cut.

    Attributes:
      source: size that the whole image is resized to.
      columns, rows: grid of slices; both 0 where there are none.
      slice: size of a slice.
    """

    source: Size
    columns: int
    rows: int
    slice: Size

    @property
    def crops(self) -> int:
        """Images that the encoder sees: the source and its slices."""
        return 1 + self.columns * self.rows


def _multiple(length: float, unit: int) -> int:
    return max(round(length / unit) * unit, unit)  # Python's round: halves go to the even neighbour


def best_size(width: float, height: float, resolution: int, patch: int, upscale: bool) -> Size:
    """The size, in whole patches, of about resolution**2 pixels and this aspect ratio.

    An image with fewer pixels keeps its size, up to whole patches, unless `upscale`.
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
      max_slices: most slices; with 1 an image is never sliced.
      resolution: side of a square image that fills the encoder (448 for the released model).
      patch: side of a patch.
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
    """uint8 RGB [H, W, 3] -> float32[h * w, 3 * patch**2] in [-1, 1], patches row-major, each (c, py, px),
    and (h, w)."""
    pixels = (np.asarray(image, np.float32) / 255.0 - 0.5) / 0.5
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    x = pixels.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
    return x.reshape(rows * columns, -1), (rows, columns)


def slice_image(
    image: Image.Image, max_slices: int, resolution: int, patch: int
) -> list[tuple[np.ndarray, Size]]:
    """Patches and (h, w) of the source, then of the slices row by row; see `layout` and `to_patches`."""
    cut = layout(*image.size, max_slices, resolution, patch)
    images = [np.asarray(image.resize(cut.source, Image.Resampling.BICUBIC))]
    if cut.crops > 1:
        width, height = cut.slice
        whole = image.resize((width * cut.columns, height * cut.rows), Image.Resampling.BICUBIC)
        cells = np.asarray(whole).reshape(cut.rows, height, cut.columns, width, 3).swapaxes(1, 2)
        images += list(cells.reshape(-1, height, width, 3))
    return [to_patches(one, patch) for one in images]


@functools.lru_cache(maxsize=256)
def position_ids(length: int, side: int) -> np.ndarray:
    """Rows of the position table for `length` patches in one line.

    Officially the encoder gets every image as a grid of 1 x length patches, so patch i has row
    floor(side * i / length) up to rounding: some 14 neighbours share a row, and the table's first `side`
    rows are all that is used. Rounding matters for a fifth of all lengths: a coordinate is what
    `torch.arange(0, 1, step)` of that time held, computed eight at a time from a float32 base and a
    float32 step.

    Returns:
      int32[length], read-only.
    """
    index, step = np.arange(length), np.float64(np.float32(1 / max(length, 1)))
    base = (index // 8 * 8 * step).astype(np.float32)
    coordinate = (base.astype(np.float64) + index % 8 * step).astype(np.float32)
    boundaries = (1 / side + np.arange(side - 1) / side).astype(np.float32)
    ids = np.searchsorted(boundaries, coordinate, side="right").astype(np.int32)
    ids.setflags(write=False)
    return ids
