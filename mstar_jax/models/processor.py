"""What the families' processors share, and the shapes of what they return."""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from PIL import Image

from mstar_jax import structs
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


class Opened:
    """A processor whose prompts end with their text, so that what follows continues the user's turn."""

    def __init__(self, closed: structs.Processor):
        """What follows the text of a prompt is what the prompts of two texts have in common at their ends."""
        self.closed, self.cut, self.vocab_size = closed, closed.cut, closed.vocab_size
        self.stop_ids, self.forbidden_ids = closed.stop_ids, closed.forbidden_ids
        self.encode_response, self.decode = closed.encode_response, closed.decode
        self.length_limit = closed.length_limit
        one, other = (closed.prefix(text, []).tokens[::-1].tolist() for text in ("?", "2"))
        self.tail = next(at for at, (a, b) in enumerate(zip(one, other)) if a != b)

    def prefix_shapes(
        self, texts: Sequence[str], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[int, int]]:
        """(prompt tokens, crops) of each prompt, see `structs.Processor`."""
        return [(tokens - self.tail, crops) for tokens, crops in self.closed.prefix_shapes(texts, sizes)]

    def prefix(self, text: str, sizes: list[tuple[int, int]]) -> Prefix:
        """A prompt without what closes the user's turn."""
        tokens, index, positions = self.closed.prefix(text, sizes)
        end = len(tokens) - self.tail
        return Prefix(tokens[:end], index[:end], None if positions is None else positions[:, :end])


def square(config: PolicyConfig, crops: int) -> Crops[jax.ShapeDtypeStruct]:
    """The pixels' shapes for a prompt with this many square crops, views of whole images included."""
    side = config.vision.image_size
    return Crops(
        jax.ShapeDtypeStruct((crops, side, side, 3), "uint8"), jax.ShapeDtypeStruct((crops, 4), "int32")
    )
