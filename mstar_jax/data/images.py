"""Image files: checked before decoding, decoded by content, always RGB on white.

Figures are often RGBA or palette PNGs with a transparent background; on black, their lines would disappear.
File extensions are unreliable (JPEG files named .png are common), so the content decides the format.
"""

import functools
import hashlib
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

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:  # a worker hands it to its parent
        return ImageError, (self.cause, str(self))


def resolve(root: str, relative: str) -> str:
    """The absolute path of `relative` inside `root`, with symbolic links resolved.

    A folder inside the root may be a link to anywhere, as image folders often are; a link in place of the
    file itself may not lead out of them.

    Raises:
      ValueError: `relative` is absolute, contains `..`, names no file, or is a link that leads out.
    """
    parts = relative.replace("\\", "/").split("/")
    if os.path.isabs(relative) or ".." in parts or "\0" in relative or not set(parts) - {"", "."}:
        raise ValueError(f"image path {relative!r} must be relative to the image root {root}, without '..'")
    folder = os.path.realpath(os.path.join(root, os.path.dirname(relative)))
    path = os.path.realpath(os.path.join(root, relative))
    if not any(path.startswith(os.path.join(base, "")) for base in (os.path.realpath(root), folder)):
        raise ValueError(f"image path {relative!r} leads to {path}, outside of the image root {root}")
    return path


@functools.lru_cache(maxsize=1 << 20)
def _digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content(path: str) -> str:
    """What tells one picture from another: the digest of the file's bytes; its path if it cannot be read.

    A picture that was scaled or encoded again is another one.
    """
    try:
        there = os.stat(path)
        return _digest(path, there.st_size, there.st_mtime_ns)
    except OSError:
        return path


def load_image(path: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file to RGB, with transparency on white; of an animation, the first frame.

    The EXIF orientation is applied, and 16-bit and floating-point grayscale is scaled to 8 bits.

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
    if image.mode == "F":  # floating-point gray: of 0..1, of 8 bits or of 16
        values = np.asarray(image)
        peak = float(values.max())
        scale = 255.0 if peak <= 1 else 1.0 if peak <= 255 else 1 / 257
        if not (np.isfinite(values).all() and values.min() >= 0 and peak <= 65535):
            raise ValueError(f"gray values of {values.min()} to {peak}, expected 0 to 1, 255 or 65535")
        return Image.fromarray((values * scale + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        clear = values == image.info.get("transparency", -1)  # the gray value that stands for it
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"gray values of {values.min()} to {values.max()}, expected 0 to 65535")
        if image.mode != "I" or values.max() > 255:  # mode "I" is used for 16-bit data too
            values = (values + 128) // 257
        values[clear] = 255
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
