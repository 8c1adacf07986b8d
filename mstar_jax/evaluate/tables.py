"""The file formats of benchmarks: parquet, TSV with images in base64, JSON.

Whatever the format, a record is a dict of its columns. `cell` and `texts` read a column in any of the ways
that the formats write text, numbers, lists and missing values; `parse_options` finds options inside a
question. Images inside a file are written once to a cache folder, named by their content, after a decoding
test: every file in the cache is a valid image.
"""

import ast
import base64
import binascii
import csv
import glob
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import PIL.Image

from mstar_jax.data.images import FORMATS, ImageError, load_image, resolve

LONGEST_CELL = 1 << 28  # bytes of a TSV cell; Python's default of 128 KiB is too small for most images
LONGEST_LIST = 1 << 14  # characters of a list that is written as text
REFERENCE = 64  # characters; an image cell of a TSV up to this length is the index of the row with the image
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of options
IMAGES = ("decoded_image", "image", "image_path")  # columns; the first one that is not empty counts

Record = dict[str, Any]  # by column; a JSON, TSV or parquet value


# ---- 1. files and records -----------------------------------------------------------------------------


def find(folder: str | os.PathLike, patterns: Sequence[str]) -> list[str]:
    """The files of the first pattern that matches in `folder` or its `data`; `folder` itself if it is a file.

    Raises:
      FileNotFoundError: no pattern matches.
    """
    folder = os.fspath(folder)
    if os.path.isfile(folder):
        return [folder]
    for pattern in patterns:
        for place in (folder, os.path.join(folder, "data")):
            if found := sorted(glob.glob(os.path.join(glob.escape(place), pattern))):
                return found
    raise FileNotFoundError(f"{folder}: no benchmark file here or in data/; looked for {', '.join(patterns)}")


def records(path: str) -> Iterator[tuple[str, Record | Exception]]:
    """Yields (`row 7` or `line 7`, the record or the error in it) for every record of a file.

    Raises:
      ValueError: the file as a whole cannot be read.
      ImportError: the file is parquet, and pyarrow is not installed.
    """
    kinds = {".parquet": _parquet, ".tsv": _tsv, ".json": _json, ".jsonl": _jsonl}
    kind = kinds.get(os.path.splitext(path)[1].lower())
    if kind is None:
        raise ValueError(f"{path}: expected one of {', '.join(kinds)}")
    for place, found in kind(path):
        yield place, found if isinstance(found, dict | Exception) else ValueError("not a record of columns")


def _parquet(path: str) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path}: parquet needs pyarrow: pip install 'mstar_jax[benchmarks]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=32):
                for at in range(batch.num_rows):
                    row: object
                    try:
                        row = batch.slice(at, 1).to_pylist()[0]
                    except UnicodeDecodeError as error:  # parquet does not validate its strings
                        row = error
                    yield f"row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        hint = "download the file again"
        raise ValueError(f"{path}, from row {number}: broken parquet, {hint} ({error})") from error


def _tsv(path: str) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        number = 0
        while True:
            row: object
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row = error
            yield f"row {number}", row
            number += 1


def _json(path: str) -> Iterator[tuple[str, object]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if isinstance(content, dict):  # {id: record}
        for key, row in content.items():
            yield f"row {key}", {"pid": key, **row} if isinstance(row, dict) else row
    elif isinstance(content, list):
        yield from ((f"row {number}", row) for number, row in enumerate(content))
    else:
        raise ValueError(f"{path}: expected a JSON list or {{id: record}}, found {type(content).__name__}")


def _jsonl(path: str) -> Iterator[tuple[str, object]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row: object
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    row = error
                yield f"line {number}", row


# ---- 2. cells -----------------------------------------------------------------------------------------


def cell(record: Record, *names: str) -> str:
    """The text of the first of these columns that is not empty; '' if all are.

    None, blanks and pandas' spellings of NaN count as empty. A whole float is written without `.0`, because
    pandas turns a column of integers with gaps into floats.
    """
    for name in names:
        value = record.get(name)
        if isinstance(value, float):
            value = "" if value != value else str(int(value)) if value.is_integer() else str(value)
        text = "" if value is None else str(value)
        if text.strip() and text.strip() not in ("nan", "NaN"):
            return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    return ""


def texts(value: object) -> list[str]:
    """A list of texts, from a list or from a Python literal of one (`"['yes', 'no']"`); else empty."""
    if isinstance(value, str) and value.strip().startswith("[") and len(value) <= LONGEST_LIST:
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return []
    if not isinstance(value, list | tuple):
        return []
    return ["" if each is None else str(each) for each in value]


# ---- 3. images ----------------------------------------------------------------------------------------


_OPTIONS = re.compile(r"(?:Options|Choices)\s*[:：]\s*(?=\(?A\s?[:：.)])", re.IGNORECASE)
_FIRST = re.compile(r"(\(?)A\s?([:：.)])")


def parse_options(text: str) -> tuple[str, list[str]]:
    """(question, options) of MMStar's `...?\\nOptions: A: yes, B: no`; the list is empty without options.

    The next option begins where its letter, in the style of the first one, follows a comma, a semicolon or a
    line break.
    """
    starts = list(_OPTIONS.finditer(text))
    if not starts:
        return text, []
    rest = text[starts[-1].end() :]
    options = list[str]()
    first = _FIRST.match(rest)
    assert first is not None  # _OPTIONS looks ahead for it
    rest = rest[first.end() :]
    for letter in LETTERS[1:]:
        label = rf"{re.escape(first[1])}{letter}\s?{re.escape(first[2])}"
        m = re.search(rf"(?:[,;\n]\s*){label}", rest) or re.search(rf"\s{label}", rest)
        if not m:
            break
        options.append(rest[: m.start()].strip(" \n,;"))
        rest = rest[m.end() :]
    return text[: starts[-1].start()].rstrip(), [*options, rest.strip()]


def unpack(text: str) -> bytes:
    """The bytes of an image in base64, with or without a prefix `data:image/png;base64,`.

    Raises:
      ImageError: the text is not base64.
    """
    try:
        return base64.b64decode("".join(text.rpartition("base64,")[2].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("broken base64", f"an image is not valid base64 ({error})") from error


def write_image(data: bytes, cache: str) -> str:
    """Writes the bytes of an image file to the cache folder, once, and returns the absolute path.

    The file is named by the SHA-256 of the bytes, with the extension of the actual format. The size is
    checked before decoding, and the file gets its name only after decoding.

    Raises:
      ImageError: the image is empty, too large or cannot be decoded.
    """
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            ending = str(image.format).lower()
    except Exception as error:
        cause = "undecodable image" if data else "empty image"
        cause = "image too large" if isinstance(error, PIL.Image.DecompressionBombError) else cause
        raise ImageError(cause, f"{len(data)} bytes are not an image ({type(error).__name__})") from error
    path = os.path.join(os.path.abspath(cache), f"{hashlib.sha256(data).hexdigest()[:32]}.{ending}")
    if os.path.exists(path) and os.path.getsize(path) == len(data):
        return path
    os.makedirs(cache, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=cache, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        load_image(scratch)
        os.chmod(scratch, 0o644)  # mkstemp's 0600 would hide a shared cache from others
        os.replace(scratch, path)
    finally:
        if os.path.exists(scratch):
            os.remove(scratch)
    return path


def locate(relative: str, roots: Sequence[str]) -> str:
    """The absolute path of an image file of the data set, in the first of the roots that has it.

    Raises:
      ImageError: the path leaves the roots, is in none of them, or the image cannot be decoded.
    """
    try:
        paths = [resolve(root, relative) for root in roots]
    except ValueError as error:
        raise ImageError("image path leaves the root", str(error)) from error
    path = next(filter(os.path.exists, paths), paths[0])
    load_image(path)
    return path


def load(paths: Sequence[str], cache: str) -> Iterator[tuple[str, Record | Exception, str | ImageError]]:
    """The records of a data set's files, each with its image.

    An image is given as bytes, alone or as `{"bytes": ..., "path": ...}`; in a TSV as base64 or the index of
    the row that has it; or as a path relative to the folder of the file or the folder above.

    Yields:
      The place in the files, the record without its images or the error in it, and the absolute path of the
      image or the error in that.
    """
    found: list[tuple[str, Record | Exception, str | ImageError]] = []
    pictures: dict[str, str | ImageError] = {}  # by index
    for path in paths:
        folder = os.path.dirname(os.path.abspath(path))
        for place, row in records(path):
            place = f"{os.path.basename(path)} {place}" if len(paths) > 1 else place
            picture: str | ImageError = ""
            if isinstance(row, dict):
                try:
                    picture = _picture(row, path.lower().endswith(".tsv"), folder, cache)
                except ImageError as error:
                    picture = error
                if not isinstance(picture, _Index):
                    pictures.setdefault(cell(row, "index").strip(), picture)
                row = {k: v for k, v in row.items() if isinstance(k, str) and k not in IMAGES}
            found.append((place, row, picture))
    for place, row, picture in found:
        if isinstance(picture, _Index):  # the row with the image may come later
            none = ImageError("no such row's image", f"{place}: no row {picture!r} has an image")
            picture = pictures.get(picture, none)
        yield place, row, picture


class _Index(str):
    """Not a path, but the index of the row that has the image."""


def _picture(row: Record, encoded: bool, folder: str, cache: str) -> str:
    value = next((row[name] for name in IMAGES if row.get(name)), None)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return write_image(value, cache)
    if not isinstance(value, str) or not value.strip():
        raise ImageError("no image", "the row has no image")
    if not encoded:
        return locate(value, [folder, os.path.dirname(folder)])
    return _Index(value.strip()) if len(value) <= REFERENCE else write_image(unpack(value), cache)
