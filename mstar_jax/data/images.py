"""Image files: decoded by content, checked before decoding, always RGB on white.

Figures are often RGBA or palette PNGs whose background is transparent: composited on black, their lines
disappear, hence white. File names lie (JPEG bytes named .png are common), hence decoding by content.
"""

import os
import re

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
MAX_PIXELS = 50_000_000


class ImageError(ValueError):
    """An image that cannot be used; `cause` says why in the words that `mathv360k.Report` counts by."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


def resolve(root: str, relative: str) -> str:
    """Absolute path of `relative` inside `root`, symbolic links followed.

    Raises:
      ValueError: `relative` is absolute, contains `..`, or leads out of `root` through a link.
    """
    parts = relative.replace("\\", "/").split("/")
    if os.path.isabs(relative) or ".." in parts or "\0" in relative:
        raise ValueError(f"image path {relative!r} must be relative to the image root, without '..'")
    base = os.path.realpath(root)
    path = os.path.realpath(os.path.join(base, relative))
    if not path.startswith(os.path.join(base, "")):
        raise ValueError(f"image path {relative!r} leads to {path}, outside of the image root {base}")
    return path


def load_image(path: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file, the first frame of an animation, to RGB with transparency on white.

    EXIF rotation is applied; 16-bit gray is scaled to 8 bit.

    Args:
      path: a PNG, JPEG, GIF, BMP, WebP or TIFF file; the content counts, not the name.
      max_pixels: largest width x height; read from the header, before anything is decoded.

    Raises:
      ImageError: a ValueError that names the file, where it is missing, empty, too large, truncated or
        otherwise not decodable.
    """
    try:
        if os.path.getsize(path) == 0:
            raise ImageError("empty image", f"{path}: the image file is empty (0 bytes)")
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                message = f"{path}: {width} x {height} = {width * height} pixels, at most {max_pixels}"
                raise ImageError("image too large", message)
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ImageError("missing image", f"{path}: no such image file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+", str(error))  # PIL's own, higher limit: it refuses to give the size
        message = f"{path}: {pixels[0] if pixels else 'too many'} pixels, at most {max_pixels}"
        raise ImageError("image too large", message) from error
    except Exception as error:  # a decoder fed with broken bytes raises nearly anything
        message = f"{path}: the image cannot be decoded ({type(error).__name__}: {error})"
        raise ImageError("undecodable image", message) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if image.mode != "I" or values.max() > 255:  # mode I also holds 16-bit data
            values = (values.clip(0, 65535) + 128) // 257
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
