"""Image files: checked before decoding, decoded by content, always RGB on white.

Figures are often RGBA or palette PNGs with a transparent background; on black, their lines would disappear.
File extensions are unreliable (JPEG files named .png are common), so the content decides the format.
"""

import contextlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
MAX_PIXELS = 50_000_000


class ImageError(ValueError):
    """An image that cannot be used; `cause` is the category that `mathv360k.Report` counts it under."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:  # a worker hands it to its parent
        return ImageError, (self.cause, str(self))


def resolve(root: str, relative: str, real: Callable[[str], str] = os.path.realpath) -> str:
    """The absolute path of `relative` inside `root`, with symbolic links resolved.

    A folder inside the root may be a link to anywhere, as image folders often are; a link in place of the
    file itself may not lead out of them.

    Args:
      root: the folder.
      relative: what a data set calls the file.
      real: resolves the links of folders; one with a cache spares a reader of many files much time.

    Raises:
      ValueError: `relative` is absolute, contains `..`, names no file, or is a link that leads out.
    """
    parts = relative.replace("\\", "/").split("/")
    if os.path.isabs(relative) or ".." in parts or "\0" in relative or not set(parts) - {"", "."}:
        raise ValueError(f"image path {relative!r} must be relative to the image root {root}, without '..'")
    inside, name = os.path.split(os.path.normpath(relative))
    folder = real(os.path.join(root, inside))
    path = os.path.join(folder, name)
    if os.path.islink(path):
        path = os.path.realpath(path)
    if not any(path.startswith(os.path.join(base, "")) for base in (real(root), folder)):
        raise ValueError(f"image path {relative!r} leads to {path}, outside of the image root {root}")
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
    with opened(path, path, max_pixels=max_pixels) as image:
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


def check_image(path: str, data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Finds out whether `load_image` could decode a file, at less cost.

    All of the data is decoded, for only that shows damage; but a JPEG's pixels are made at an eighth of its
    size, and those of 8 bits are not converted.

    Args:
      path: its name, for the error.
      data: all its bytes.
      max_pixels: the largest width x height.

    Returns:
      (width, height), as `load_image` returns them.

    Raises:
      ImageError: as `load_image`.
    """
    with opened(path, io.BytesIO(data), max_pixels=max_pixels) as image:
        size = image.size
        image.draft(None, (1, 1))
        image.load()
        swapped = turned(image) and image.format != "TIFF"
        if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
            image = image.crop((0, 0, 1, 1))
        _rgb(ImageOps.exif_transpose(image))
    return (size[1], size[0]) if swapped else size


def header_size(path: str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of what `load_image` returns, from the headers in a file; no pixel is decoded.

    Raises:
      ImageError: as `load_image`, as far as the headers tell.
    """
    with opened(path, path, max_pixels=max_pixels) as image:
        size = image.size
        if image.format == "TIFF":  # Pillow's size of it is the turned one
            return size
        late = _late_exif(path) if image.format == "PNG" else None
        if late is None:
            swapped = turned(image)
        else:
            image.info |= {"exif": b"Exif\0\0" + late} if late else {}
            swapped = _swaps(Image.Image.getexif(image))  # a PNG's own decodes, to look behind the pixels
    return (size[1], size[0]) if swapped else size


def turned(image: Image.Image) -> bool:
    """Whether its EXIF orientation swaps width and height."""
    return _swaps(image.getexif())


def _swaps(exif: Image.Exif) -> bool:
    return exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)


def _late_exif(path: str) -> bytes | None:
    """The EXIF data behind the pixels of a PNG file, found by the headers of its chunks; empty where there is
    none, None where a text there may hold it in another form."""
    behind = False
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            behind |= kind == b"IDAT"
            if behind and kind in (b"IEND", b"fcTL"):  # the end, or a further frame of an animation
                break
            if behind and kind == b"eXIf":
                return file.read(length)
            if behind and kind in (b"tEXt", b"zTXt", b"iTXt"):
                start = file.read(min(length, len(_IN_TEXT[0])))
                if start.startswith(_IN_TEXT):
                    return None
                length -= len(start)
            file.seek(length + 4, os.SEEK_CUR)  # and its checksum
    return b""


_IN_TEXT = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # keywords; the longer one first


@contextlib.contextmanager
def opened(path: str, source: str | BinaryIO, *, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header was read; what goes wrong in the block is an ImageError that names `path`."""
    try:
        if not (os.path.getsize(source) if isinstance(source, str) else source.seek(0, os.SEEK_END)):
            raise ImageError("empty image", f"{path}: the image file is empty (0 bytes)")
        if not isinstance(source, str):
            source.seek(0)
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                message = (
                    f"{path}: {width} x {height} = {width * height} pixels, at most {max_pixels} are "
                    "allowed; scale it down"
                )
                raise ImageError("image too large", message)
            yield image
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
        if _is_svg(source):
            raise ImageError("SVG image", f"{path}: SVG is not read; convert the image to PNG") from error
        message = f"{path}: the image cannot be decoded ({type(error).__name__}: {error})"
        raise ImageError("undecodable image", message) from error


def _is_svg(source: str | BinaryIO) -> bool:
    head = b""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a name that no file can have
        if isinstance(source, str):
            with open(source, "rb") as file:
                head = file.read(1024)
        else:
            source.seek(0)
            head = source.read(1024)
    return b"<svg" in head.lower()


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
