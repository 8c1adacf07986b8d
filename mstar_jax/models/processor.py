"""What the families' processors share, and the shapes of what they return."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import jax
import numpy as np
from PIL import Image

from mstar_jax.crops.arrays import Crops
from mstar_jax.models.vlm import PolicyConfig
from mstar_jax.structs import EncodedPrompt, Pixels

Cut = TypeVar("Cut", bound=Callable[[Sequence[Image.Image]], Pixels])


class Processor(Generic[Cut]):
    """The common part of the families' processors, see `structs.Processor`."""

    cut: Cut

    def prefix(self, text: str, sizes: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """The prompt's tokens and where its features are; every family defines its own."""
        raise NotImplementedError

    def encode(self, text: str, images: Sequence[Image.Image]) -> EncodedPrompt:
        """The prompt and its pixels together."""
        return EncodedPrompt(*self.prefix(text, [image.size for image in images]), self.cut(images))


def square(config: PolicyConfig, crops: int) -> Crops[jax.ShapeDtypeStruct]:
    """The pixels' shapes for a prompt with this many square crops, views of whole images included."""
    side = config.vision.image_size
    return Crops(
        jax.ShapeDtypeStruct((crops, side, side, 3), "uint8"), jax.ShapeDtypeStruct((crops, 4), "int32")
    )
