"""The records of benchmarks' files: their cells, options and images.

Whatever the format (data/files.py), a record is a dict of its columns. `cell` and `texts` read a column in
any of the ways that the formats write text, numbers, lists and missing values; `parse_options` finds options
inside a question. Images inside a file, in a TSV in base64, are written to a cache folder (`pictures.write`).
"""

import ast
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence

from mstar_jax.data import files, pictures
from mstar_jax.data.files import Record
from mstar_jax.data.images import ImageError, load_image, resolve

LONGEST_LIST = 1 << 14  # characters of a list that is written as text
REFERENCE = 64  # characters; an image cell of a TSV up to this length is the index of the row with the image
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of options
NUMBERED = tuple(f"image_{number}" for number in range(1, 8))  # columns of MMMU, an image each
IMAGES = ("decoded_image", "image", "images", "image_path")  # columns; the first one that is not empty counts


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
    """
    found = _single(path) if os.path.basename(path) == "data.json" else files.records(path)
    for place, record in found:  # of Geometry3K every question is a folder, with its image
        yield place, record if isinstance(record, dict | Exception) else ValueError("not a record of columns")


def _single(path: str) -> Iterator[tuple[str, object]]:
    folder = os.path.basename(os.path.dirname(path))
    found: object
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = json.load(file)
    except (ValueError, RecursionError) as error:
        found = error
    yield folder, {"image": "img_diagram.png", **found} if isinstance(found, dict) else found


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
            return encodable(text)
    return ""


def encodable(text: str) -> str:
    """The text with U+FFFD for unpaired surrogates, which JSON can say and UTF-8 cannot."""
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)


def texts(value: object) -> list[str]:
    """A list of texts, from a list or from a Python literal of one (`"['yes', 'no']"`); else empty."""
    if isinstance(value, str) and value.strip().startswith("[") and len(value) <= LONGEST_LIST:
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return []
    if not isinstance(value, list | tuple):
        return []
    return ["" if each is None else encodable(str(each)) for each in value]


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


Shown = tuple[str, ...]  # absolute paths of a record's images


def load(paths: Sequence[str], cache: str) -> Iterator[tuple[str, Record | Exception, Shown | ImageError]]:
    """The records of a data set's files, each with its images, several in a list or in numbered columns.

    An image is given as bytes, alone or as `{"bytes": ..., "path": ...}`; in a TSV as base64 or the index of
    the row that has it; or as a path relative to the folder of the file, to `images` in it, or to the folder
    above.

    Yields:
      The place in the files, the record without its images or the error in it, and the absolute paths of the
      images or the error in one of them.
    """
    found: list[tuple[str, Record | Exception, Shown | _Index | ImageError]] = []
    by_index: dict[str, Shown | ImageError] = {}
    for path in paths:
        folder = os.path.dirname(os.path.abspath(path))
        for place, row in records(path):
            place = f"{os.path.basename(path)} {place}" if len(paths) > 1 else place
            picture: Shown | _Index | ImageError = ()
            if isinstance(row, dict):
                try:
                    picture = _picture(row, path.lower().endswith(".tsv"), folder, cache)
                except ImageError as error:
                    picture = error
                if not isinstance(picture, _Index):
                    by_index.setdefault(cell(row, "index").strip(), picture)
                row = {k: v for k, v in row.items() if isinstance(k, str) and k not in (*IMAGES, *NUMBERED)}
            found.append((place, row, picture))
    for place, row, picture in found:
        if isinstance(picture, _Index):  # the row with the image may come later
            none = ImageError("no such row's image", f"{place}: no row {picture!r} has an image")
            picture = by_index.get(picture, none)
        yield place, row, picture


class _Index(str):
    """Not a path, but the index of the row that has the image."""


def _picture(row: Record, encoded: bool, folder: str, cache: str) -> Shown | _Index:
    found = next((row[name] for name in IMAGES if row.get(name)), None)
    found = found or [row[name] for name in NUMBERED if row.get(name)]
    if encoded and isinstance(found, str) and 0 < len(found.strip()) <= REFERENCE:
        return _Index(found.strip())
    shown = found if isinstance(found, list) else [found]
    if not shown:
        raise ImageError("no image", "the row has no image")
    return tuple(_path(each, encoded, folder, cache) for each in shown)


def _path(value: object, encoded: bool, folder: str, cache: str) -> str:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return pictures.write(value, cache)
    if not isinstance(value, str) or not value.strip():
        raise ImageError("no image", "the row has no image")
    if not encoded:
        return locate(value, [folder, os.path.join(folder, "images"), os.path.dirname(folder)])
    return pictures.write(pictures.unpack(value), cache)
