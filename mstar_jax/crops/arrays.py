"""What images become: square crops of one size, with their places; zeros are padding."""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

Array = TypeVar("Array")  # numpy's on the host, jax's on a device, a ShapeDtypeStruct in `plan`


class Crops(NamedTuple, Generic[Array]):
    """The crops of a query's images; in a `Batch`, with a leading B.

    Attributes:
      pixels: uint8[C, S, S, 3]; they are normalised on the device (`models.vision.normalised`).
      places: int32[C, 4]; rows and columns of the image's grid, and the crop's row and column in it, which
        are -1 for a view of the whole image. All 0 where there is no crop.
    """

    pixels: Array
    places: Array


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Cuts [rows * size, columns * size, 3] into [rows * columns, size, size, 3], row by row."""
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    return pixels.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)


def placed(rows: int, columns: int) -> list[tuple[int, int, int, int]]:
    """The places of the crops of a grid, row by row."""
    return [(rows, columns, row, column) for row in range(rows) for column in range(columns)]


def gathered(
    parts: Sequence[np.ndarray], places: Sequence[tuple[int, int, int, int]], size: int
) -> Crops[np.ndarray]:
    """Crops of one size, in order, and their places; none at all are arrays too."""
    pixels = np.concatenate(parts) if parts else np.zeros((0, size, size, 3), np.uint8)
    return Crops(pixels, np.array(places, np.int32).reshape(-1, 4))
