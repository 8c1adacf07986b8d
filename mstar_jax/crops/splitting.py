"""SmolVLM's and Idefics3's image splitting.

Source: transformers' SmolVLMImageProcessorPil. An image is resized to a longest edge, stretched to whole
tiles, and cut; the whole image follows as one tile.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mstar_jax.crops.arrays import Crops, gathered, placed, square

Size = tuple[int, int]  # (width, height)


def resized(size: Size, longest: int) -> Size:
    """The size with this longer side, in pixels; the shorter one is rounded down, then up to be even."""
    aspect = size[0] / size[1]
    short = int(longest / aspect) if aspect >= 1 else int(longest * aspect)
    short = max(short + short % 2, 1)
    return (longest, short) if aspect >= 1 else (short, longest)


def tile_grid(size: Size, side: int) -> tuple[int, int]:
    """(rows, columns) of tiles that an image is stretched to: the longer side to the next multiple of a
    tile's `side`, the shorter one in proportion and then to its next multiple."""
    aspect = size[0] / size[1]
    long = math.ceil(max(size) / side)
    short = math.ceil(int(long * side / aspect if aspect >= 1 else long * side * aspect) / side)
    return (short, long) if aspect >= 1 else (long, short)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an image is cut: resized to `size` (width, height) and cut into a grid of tiles, which is 0 x 0
    where the whole image is all there is."""

    size: Size
    rows: int = 0
    columns: int = 0

    @property
    def crops(self) -> int:
        """Tiles, and the whole image."""
        return self.rows * self.columns + 1


def crop_image(image: Image.Image, cut: Layout, side: int) -> np.ndarray:
    """uint8[C, side, side, 3] of an RGB image: the tiles row by row, then the whole image."""
    lanczos = Image.Resampling.LANCZOS
    crops = np.empty((cut.crops, side, side, 3), np.uint8)
    image = image.resize(cut.size, lanczos)
    if cut.crops > 1:
        image = image.resize((side * cut.columns, side * cut.rows), lanczos)
        crops[:-1] = square(np.asarray(image), side)
    crops[-1] = np.asarray(image.resize((side, side), lanczos))
    return crops


@dataclasses.dataclass(frozen=True)
class Splitting:
    """Images to tiles, see `structs.Processor.cut`.

    Attributes:
      num_crops: the most tiles of an image.
      side: of a tile, in pixels.
      longest_edge, split: see `models.smolvlm.SmolVLMConfig`.
    """

    num_crops: int
    side: int
    longest_edge: int
    split: bool

    def layout(self, size: Size) -> Layout:
        """The layout of an image of this (width, height).

        If the official one has more than `num_crops` tiles, the image is resized to the most tiles along its
        longer side that are allowed.
        """
        if not self.split:
            return Layout(resized(size, self.longest_edge))
        shorter = range(math.ceil(self.longest_edge / self.side) - 1, 0, -1)
        for longest in (self.longest_edge, *(self.side * tiles for tiles in shorter)):
            first = resized(size, longest)
            rows, columns = tile_grid(first, self.side)
            if rows * columns <= max(self.num_crops, 1):
                break
        return Layout(first, rows, columns) if rows * columns > 1 else Layout(first)

    def __call__(self, images: Sequence[Image.Image]) -> Crops[np.ndarray]:
        """Each image's tiles and then the whole of it."""
        cuts = [self.layout(image.size) for image in images]
        parts = [crop_image(image, cut, self.side) for image, cut in zip(images, cuts, strict=True)]
        places = [
            place
            for cut in cuts
            for place in [*placed(cut.rows, cut.columns), (max(cut.rows, 1), max(cut.columns, 1), -1, -1)]
        ]
        return gathered(parts, places, self.side)
