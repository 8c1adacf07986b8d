"""Phi-3.5-vision's HD transform.

Source: microsoft/Phi-3.5-vision-instruct. An image is resized and padded with white to a grid of crops. The
model also sees a view of the whole grid, which is scaled down by whole numbers, bicubically, after the
normalisation. Along an odd number of crops that takes every n-th pixel; along an even one it weighs four
pixels, and the result is none of 8 bits. Such a view is left to the device, which has all of the grid
(`models.phi35.with_views`).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mstar_jax.crops.arrays import Crops, gathered, placed, square

WHITE = (255, 255, 255)


def hd_size(width: int, height: int, num_crops: int, size: int) -> tuple[int, int, int]:
    """(width, height, padded height) of a landscape image after the HD transform, in pixels."""
    ratio = width / height
    scale = 1  # crops along the long side
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    new_height = max(1, int(size * scale / ratio))
    return size * scale, new_height, math.ceil(new_height / size) * size


def hd_grid(width: int, height: int, num_crops: int, size: int) -> tuple[int, int]:
    """(rows, columns) of high-resolution crops for an image of this size; a portrait is transposed."""
    long, _, short = hd_size(max(width, height), min(width, height), num_crops, size)
    return (long // size, short // size) if width < height else (short // size, long // size)


def hd_transform(image: Image.Image, num_crops: int, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The official HD transform, without the normalisation.

    Args:
      image: RGB.
      num_crops: the most crops.
      size: side of a crop in pixels (336 for the released model).

    Returns:
      uint8[1 + rows * columns, size, size, 3], the global view (zeros where it is left to the device) and
      then the crops row by row; and (rows, columns).
    """
    portrait = image.width < image.height
    if portrait:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    width, height, target = hd_size(image.width, image.height, num_crops, size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if height != target:
        canvas = Image.new("RGB", (width, target), WHITE)
        canvas.paste(image, (0, (target - height) // 2))
        image = canvas
    if portrait:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    crops = np.empty((1 + rows * columns, size, size, 3), np.uint8)
    crops[0] = pixels[rows // 2 :: rows, columns // 2 :: columns] if rows % 2 and columns % 2 else 0
    crops[1:] = square(pixels, size)
    return crops, (rows, columns)


@dataclasses.dataclass(frozen=True)
class HD:
    """Images to crops, see `structs.Processor.cut`.

    Attributes:
      num_crops, size: see `hd_transform`.
    """

    num_crops: int
    size: int

    def __call__(self, images: Sequence[Image.Image]) -> Crops[np.ndarray]:
        """Each image's view and then its crops."""
        parts = [hd_transform(image, self.num_crops, self.size) for image in images]
        places = [place for _, grid in parts for place in [(*grid, -1, -1), *placed(*grid)]]
        return gathered([crops for crops, _ in parts], places, self.size)
