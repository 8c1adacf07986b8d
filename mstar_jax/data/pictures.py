"""What is known of image files: their sizes, digests, and whether they decode; found once, and then kept.

Everything here is found again when a file's size or its time of change is another one. What `table` returns
can be kept in a file between the starts of a run, one entry a path (`recall` refuses any other shape):

    {"/data/TabMWP/images/416.png": [10274, 1718000000000000000, 350, 220, "9f86d081884c7d65...", true]}
"""

import base64
import binascii
import concurrent.futures
import hashlib
import io
import itertools
import os
import tempfile
from collections.abc import Collection, Sequence
from typing import NamedTuple

from mstar_jax.data.images import MAX_PIXELS, ImageError, check_image, header_size, load_image, opened

THREADS = 8  # decoding, reading and digests leave Python alone; more than there are cores, for slow discs


class Picture(NamedTuple):
    """What is known of a file.

    Attributes:
      bytes, changed: its size, and when it was changed last, nanoseconds.
      width, height: pixels, as `load_image` returns them; 0 where they are not known yet.
      digest: of its bytes (SHA-256); empty where it is not known yet.
      whole: it was decoded without an error.
    """

    bytes: int
    changed: int
    width: int = 0
    height: int = 0
    digest: str = ""
    whole: bool = False


_known: dict[str, Picture] = {}


def _picture(path: str) -> Picture:
    """What is known of a file as it is now.

    Raises:
      OSError: it is not there.
    """
    there = os.stat(path)
    now = Picture(there.st_size, there.st_mtime_ns)
    found = _known.get(path, now)
    return found if found[:2] == now[:2] else now


def size(path: str) -> tuple[int, int]:
    """(width, height) of an image as it is decoded, from the headers in its file.

    Raises:
      ImageError: it is no image; the message names it.
      OSError: it is not there.
    """
    found = _picture(path)
    if not found.width:
        width, height = header_size(path)
        found = _known[path] = found._replace(width=width, height=height)
    return found.width, found.height


def content(path: str) -> str:
    """What tells one picture from another: the digest of the file's bytes; its path if it cannot be read.

    A picture that was scaled or encoded again is another one.
    """
    try:
        found = _picture(path)
        if not found.digest:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found = _known[path] = found._replace(digest=digest)
        return found.digest
    except (OSError, ValueError):
        return path


def contents(paths: Collection[str]) -> dict[str, str]:
    """The `content` of every file."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(lambda some: [content(path) for path in some], _parts(list(paths)))
        return dict(zip(paths, itertools.chain.from_iterable(parts), strict=True))


def _parts(paths: Sequence[str], size: int = 64) -> list[Sequence[str]]:
    """Work for threads: a call for each path would cost more than what is known already."""
    return [paths[at : at + size] for at in range(0, len(paths), size)]


def check(path: str, *, max_pixels: int = MAX_PIXELS) -> None:
    """Checks that an image can be decoded, unless that is known; its size and digest are known then too.

    Raises:
      ImageError: it cannot.
    """
    try:
        found = _picture(path)
        if found.whole and found.width * found.height <= max_pixels:
            return
        header_size(path, max_pixels=max_pixels)  # before all of it is read: it may be no image, or huge
        with open(path, "rb") as file:
            data = file.read()
    except ImageError:
        raise
    except (OSError, ValueError):  # ValueError: a name that no file can have
        load_image(path, max_pixels=max_pixels)  # says what is wrong
        return
    width, height = check_image(path, data, max_pixels=max_pixels)
    digest = hashlib.sha256(data).hexdigest()
    _known[path] = found._replace(width=width, height=height, digest=digest, whole=True)


def faults(paths: Sequence[str], *, max_pixels: int = MAX_PIXELS) -> dict[str, str]:
    """The cause (see `ImageError`) why an image cannot be used, of each that cannot."""

    def fault(path: str) -> str:
        try:
            check(path, max_pixels=max_pixels)
        except ImageError as error:
            return error.cause
        return ""

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(lambda some: [fault(path) for path in some], _parts(paths))
        causes = itertools.chain.from_iterable(parts)
        return {path: cause for path, cause in zip(paths, causes, strict=True) if cause}


# ---- images inside of other files ---------------------------------------------------------------------


def unpack(text: str) -> bytes:
    """The bytes of an image in base64, with or without a prefix `data:image/png;base64,`.

    Raises:
      ImageError: the text is not base64.
    """
    try:
        return base64.b64decode("".join(text.rpartition("base64,")[2].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("broken base64", f"an image is not valid base64 ({error})") from error


def write(data: bytes, folder: str, *, max_pixels: int = MAX_PIXELS) -> str:
    """Writes the bytes of an image file to a folder, once, and returns the absolute path.

    The file is named by the SHA-256 of the bytes, with the extension of the actual format. The size is
    checked before decoding, and the file gets its name only after decoding: every file there is an image.

    Raises:
      ImageError: the image is empty, too large or cannot be decoded.
    """
    digest = hashlib.sha256(data).hexdigest()
    name = f"image {digest[:8]} of {len(data)} bytes"
    with opened(name, io.BytesIO(data), max_pixels=max_pixels) as image:
        ending = str(image.format).lower()
    path = os.path.join(os.path.abspath(folder), f"{digest[:32]}.{ending}")
    if content(path) == digest:
        check(path, max_pixels=max_pixels)
        return path
    width, height = check_image(name, data, max_pixels=max_pixels)
    os.makedirs(folder, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=folder, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(scratch, 0o644)  # mkstemp's 0600 would hide a shared folder from others
        os.replace(scratch, path)
    finally:
        if os.path.exists(scratch):
            os.remove(scratch)
    found = os.stat(path)
    _known[path] = Picture(found.st_size, found.st_mtime_ns, width, height, digest, True)
    return path


# ---- kept between starts ------------------------------------------------------------------------------


def table() -> dict[str, Picture]:
    """What is known of all files that were looked at, by path."""
    return dict(_known)


def recall(entries: object) -> None:
    """Takes over what an earlier start has found out.

    Raises:
      ValueError: an entry is none of `table`; nothing is taken over.
    """
    if not isinstance(entries, dict):
        raise ValueError("it is no JSON object")
    found = {path: _read(path, entry) for path, entry in entries.items()}
    _known.update({path: picture for path, picture in found.items() if path not in _known})


def _read(path: str, entry: object) -> Picture:
    kinds = [int, int, int, int, str, bool]
    if not isinstance(entry, list) or [type(value) for value in entry] != kinds:
        wanted = "[bytes, time of change, width, height, digest, whole]"
        raise ValueError(f"what is known of {path!r}: {entry!r} is no {wanted}")
    return Picture(*entry)
