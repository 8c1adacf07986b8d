"""InternVL2's tiles.

Source: OpenGVLab/InternVL2-2B. An image is stretched to the grid of tiles whose aspect ratio is nearest to
its own; with several tiles, the whole image follows as one more, its thumbnail.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mstar_jax.crops.arrays import Crops, gathered, placed, square


@functools.lru_cache(maxsize=64)
def _grids(least: int, most: int) -> np.ndarray:
    """int64[N, 2]: every (columns, rows) with `least` to `most` tiles, the fewest tiles first."""
    pairs = itertools.product(range(1, most + 1), repeat=2)
    return np.array(sorted((c * r, c, r) for c, r in pairs if least <= c * r <= most))[:, 1:]


def tile_grid(width: int, height: int, least: int, most: int, size: int) -> tuple[int, int]:
    """(rows, columns) of tiles for an image.

    This is the grid whose aspect ratio is nearest to the image's. Among equally near ones (1x1, 2x2, ...) it
    is the largest that the image fills by more than half of its area, or the smallest if it fills none.

    Args:
      width, height: of the image, in pixels.
      least, most: bounds for the number of tiles.
      size: side of a tile, in pixels.
    """
    grids = _grids(min(least, most), most)
    distance = np.abs(width / height - grids[:, 0] / grids[:, 1])
    near = grids[distance == distance.min()]
    filled = near[width * height > 0.5 * size * size * near.prod(axis=1)]
    columns, rows = (filled[-1] if len(filled) else near[0]).tolist()
    return rows, columns


def tile_count(rows: int, columns: int, thumbnail: bool) -> int:
    """The number of tiles for this grid, including the thumbnail, which a single tile does not have."""
    return rows * columns + (thumbnail and rows * columns > 1)


def split_tiles(image: Image.Image, rows: int, columns: int, size: int, thumbnail: bool) -> np.ndarray:
    """Resizes an image to its grid and splits it into tiles.

    Args:
      image: RGB.
      rows, columns: from `tile_grid`.
      size: side of a tile in pixels (448 for the released model).
      thumbnail: whether a thumbnail follows if there are several tiles.

    Returns:
      uint8[T, size, size, 3]: tiles row by row, then the thumbnail.
    """
    tiles = np.empty((tile_count(rows, columns, thumbnail), size, size, 3), np.uint8)
    whole = image.resize((size * columns, size * rows), Image.Resampling.BICUBIC)
    tiles[: rows * columns] = square(np.asarray(whole), size)
    if len(tiles) > rows * columns:
        tiles[-1] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return tiles


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Images to tiles, see `structs.Processor.cut`.

    Attributes:
      least, most: see `tile_grid`.
      size, thumbnail: see `split_tiles`.
    """

    least: int
    most: int
    size: int
    thumbnail: bool

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of tiles for an image of this size."""
        return tile_grid(width, height, self.least, self.most, self.size)

    def __call__(self, images: Sequence[Image.Image]) -> Crops[np.ndarray]:
        """Each image's tiles and then its thumbnail."""
        parts, places = [], []
        for image in images:
            grid = self.grid(*image.size)
            parts.append(split_tiles(image, *grid, self.size, self.thumbnail))
            places += [*placed(*grid), (*grid, -1, -1)][: len(parts[-1])]
        return gathered(parts, places, self.size)
