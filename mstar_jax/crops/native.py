"""Images in native resolution, as Qwen2.5-VL and Qwen3-VL read them, in square crops.

Source: transformers' Qwen2VLImageProcessor. An image keeps its shape: its sides become multiples of a
feature's, and its pixels are between two limits. So that few programs are compiled, it is cut into square
crops, the last ones filled up with zeros, and a query's crops are padded to one of few numbers. Where each
crop lies in its image is data.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Generic, NamedTuple

import numpy as np
from PIL import Image

from mstar_jax.crops.arrays import Array, square

THINNEST = 200  # times as long as it is wide: officially, no image is longer
Size = tuple[int, int]  # (width, height)


class Crops(NamedTuple, Generic[Array]):
    """The images of a query in crops, row by row; in a `Batch`, with a leading B.

    Attributes:
      pixels: uint8[C, S, S, 3]; zeros beyond an image. The device normalises the image's own ones
        (`models.vision.normalised`).
      places: int32[C, 5]: the number of the image, from 1; row and column of the crop's first patch in it;
        rows and columns of the image's patches. 0 for a crop that only fills up.
    """

    pixels: Array
    places: Array


def rounded(count: int) -> int:
    """The number of crops that a query's are padded to: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ..."""
    power = 1 << max(count - 1, 0).bit_length()
    if count < 3:
        return count
    return power * 3 // 4 if count <= power * 3 // 4 else power


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an image is cut: resized to `size` (width, height); `rows` and `columns` count its features, `down`
    and `across` its crops."""

    size: Size
    rows: int
    columns: int
    down: int
    across: int

    @property
    def features(self) -> int:
        return self.rows * self.columns

    @property
    def crops(self) -> int:
        return self.down * self.across


@dataclasses.dataclass(frozen=True)
class Native:
    """Images to crops, see `structs.Processor.cut`.

    Attributes:
      patch, unit, side: pixels along the side of a patch, of a feature and of a crop.
      least, most: pixels of an image, once it is resized.
    """

    patch: int
    unit: int
    side: int
    least: int
    most: int

    def resized(self, size: Size) -> Size:
        """The size that an image of this (width, height) is resized to, as by transformers' `smart_resize`.

        Officially, an image that is more than 200 times as long as it is wide is refused; it is squeezed
        here.
        """
        unit, least, most = self.unit, self.least, self.most
        width, height = min(size[0], THINNEST * size[1]), min(size[1], THINNEST * size[0])
        found = round(width / unit) * unit, round(height / unit) * unit
        if math.prod(found) > most:
            by = math.sqrt(height * width / most)
            wide, high = math.floor(width / by / unit), math.floor(height / by / unit)
            found = max(wide, 1) * unit, max(high, 1) * unit
        elif math.prod(found) < least:
            by = math.sqrt(least / (height * width))
            found = math.ceil(width * by / unit) * unit, math.ceil(height * by / unit) * unit
        return found

    def layout(self, size: Size) -> Layout:
        """The layout of an image of this (width, height)."""
        width, height = found = self.resized(size)
        down, across = math.ceil(height / self.side), math.ceil(width / self.side)
        return Layout(found, height // self.unit, width // self.unit, down, across)

    def __call__(self, images: Sequence[Image.Image]) -> Crops[np.ndarray]:
        """The crops of a query's images, in order, and those that fill up (see `rounded`)."""
        parts = [self.crop(image, number + 1) for number, image in enumerate(images)]
        count = rounded(sum(len(part.places) for part in parts))
        out: Crops[np.ndarray] = Crops(
            np.zeros((count, self.side, self.side, 3), np.uint8), np.zeros((count, 5), np.int32)
        )
        first = 0
        for part in parts:
            end = first + len(part.places)
            out.pixels[first:end], out.places[first:end] = part
            first = end
        return out

    def crop(self, image: Image.Image, number: int) -> Crops[np.ndarray]:
        """The crops of an RGB image, which is the query's image of this number."""
        cut, side = self.layout(image.size), self.side
        whole = np.zeros((cut.down * side, cut.across * side, 3), np.uint8)
        whole[: cut.size[1], : cut.size[0]] = np.asarray(image.resize(cut.size, Image.Resampling.BICUBIC))
        places = np.empty((cut.crops, 5), np.int32)
        places[:, 0] = number
        places[:, 1:3] = np.indices((cut.down, cut.across)).reshape(2, -1).T * (side // self.patch)
        places[:, 3:] = cut.size[1] // self.patch, cut.size[0] // self.patch
        return Crops(square(whole, side), places)
