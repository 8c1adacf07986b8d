"""Image files: checked before decoding, decoded by content, always RGB on white.

Figures are often RGBA or palette PNGs with a transparent background; on black, their lines would disappear.
File extensions are unreliable (JPEG files named .png are common), so the content decides the format.
"""

import os
import re

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
MAX_PIXELS = 50_000_000


class ImageError(ValueError):
    """An image that cannot be used; `cause` is the category that `mathv360k.Report` counts it under."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


def resolve(root: str, relative: str) -> str:
    """The absolute path of `relative` inside `root`, with symbolic links resolved.

    Raises:
      ValueError: `relative` is absolute, contains `..`, or leads out of `root` through a link.
    """
    parts = relative.replace("\\", "/").split("/")
    if os.path.isabs(relative) or ".." in parts or "\0" in relative:
        raise ValueError(f"image path {relative!r} must be relative to the image root {root}, without '..'")
    base = os.path.realpath(root)
    path = os.path.realpath(os.path.join(base, relative))
    if not path.startswith(os.path.join(base, "")):
        raise ValueError(f"image path {relative!r} leads to {path}, outside of the image root {base}")
    return path


def load_image(path: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file to RGB, with transparency on white; of an animation, the first frame.

    The EXIF orientation is applied, and 16-bit grayscale is scaled to 8 bits.

    Args:
      path: a PNG, JPEG, GIF, BMP, WebP or TIFF file, whatever its extension.
      max_pixels: the largest width x height; checked in the header, before decoding.

    Raises:
      ImageError: the file is missing, empty, too large, truncated or otherwise not decodable; the message
        names it.
    """
    try:
        if os.path.getsize(path) == 0:
            raise ImageError("empty image", f"{path}: the image file is empty (0 bytes)")
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                message = (
                    f"{path}: {width} x {height} = {width * height} pixels, at most {max_pixels} are "
                    "allowed; scale it down"
                )
                raise ImageError("image too large", message)
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ImageError("missing image", f"{path}: no such image file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+", str(error))  # above PIL's own limit, the size is only in its message
        message = (
            f"{path}: {pixels[0] if pixels else 'too many'} pixels, at most {max_pixels} are allowed; "
            "scale it down"
        )
        raise ImageError("image too large", message) from error
    except Exception as error:  # given damaged bytes, decoders raise almost any exception
        message = f"{path}: the image cannot be decoded ({type(error).__name__}: {error})"
        raise ImageError("undecodable image", message) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if image.mode != "I" or values.max() > 255:  # mode "I" is used for 16-bit data too
            values = (values.clip(0, 65535) + 128) // 257
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
