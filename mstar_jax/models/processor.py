"""What the families' processors share, and the shapes of what they return."""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from PIL import Image

from mstar_jax.crops.arrays import Crops
from mstar_jax.models.vlm import PolicyConfig
from mstar_jax.structs import Pixels, Prefix

Cut = TypeVar("Cut", bound=Callable[[Sequence[Image.Image]], Pixels])


class EncodedPrompt(NamedTuple):
    """One prompt as arrays, see `structs.Prefix`.

    Attributes:
      tokens, image_index, positions: the prefix's.
      pixels: a tuple of arrays with C crops in front, see `structs.Batch`.
    """

    tokens: np.ndarray
    image_index: np.ndarray
    pixels: Pixels
    positions: np.ndarray | None = None


class Processor(Generic[Cut]):
    """The common part of the families' processors, see `structs.Processor`."""

    cut: Cut

    def prefix(self, text: str, sizes: list[tuple[int, int]]) -> Prefix:
        """The prompt's tokens and where its features are; every family defines its own."""
        raise NotImplementedError

    def encode(self, text: str, images: Sequence[Image.Image]) -> EncodedPrompt:
        """The prompt and its pixels together."""
        found = self.prefix(text, [image.size for image in images])
        return EncodedPrompt(found.tokens, found.image_index, self.cut(images), found.positions)


def square(config: PolicyConfig, crops: int) -> Crops[jax.ShapeDtypeStruct]:
    """The pixels' shapes for a prompt with this many square crops, views of whole images included."""
    side = config.vision.image_size
    return Crops(
        jax.ShapeDtypeStruct((crops, side, side, 3), "uint8"), jax.ShapeDtypeStruct((crops, 4), "int32")
    )
