"""Files of records, whatever their format: parquet, Arrow, JSON, JSON lines, TSV; one, or many shards.

What is asked for is a file, a folder or a pattern:

    train.parquet                    a file; `kind` says which format it has
    geometry3k/                      the shards in it, or in its `data/`; or what `Dataset.save_to_disk` wrote
    "geometry3k/data/train-*"        a pattern of names; give one where a folder holds several splits

All but a JSON list are read in parts, so that they may be larger than the memory. A record is a dict of
its columns.
"""

import csv
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

from mstar_jax.data.images import resolve
from mstar_jax.data.turns import Unreadable

Record = dict[str, Any]  # by column; a JSON, TSV, parquet or Arrow value

LONGEST_LINE = 1 << 28  # bytes of a JSON line; a gzip file of a few MB can hold one of many GB
LONGEST_CELL = 1 << 28  # bytes of a TSV cell; Python's default of 128 KiB is too small for most images
ENDINGS = {  # of names, in the order in which they are looked for in a folder
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "lines",
    ".jsonl.gz": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".tsv": "tsv",
}
_ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")  # hold no records
_SAVE = "save the data set again, or name its .arrow files, as in 'folder/*.arrow'"
_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.")  # of a split, which it names
_SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|val|dev|test)(?![a-z])")  # in a name in lower case


# ---- 1. which files -----------------------------------------------------------------------------------


def shards(path: str) -> list[str]:
    """The files that a path, a folder or a pattern stands for, in the order of their names.

    Raises:
      OSError: there is none.
      ValueError: a folder holds files of several formats or splits.
    """
    if os.path.isdir(path):
        return _in_folder(path)
    if not os.path.exists(path) and glob.has_magic(path):
        if found := sorted(each for each in glob.glob(path, recursive=True) if os.path.isfile(each)):
            return found
        raise FileNotFoundError(f"{path}: no file has such a name")
    return [path]


def folder_of(path: str) -> str:
    """The folder that image paths are relative to where nothing else is said: that of a file or pattern."""
    if os.path.isdir(path):
        return path
    while glob.has_magic(path) and not os.path.exists(path):
        path = os.path.dirname(path)
        if not glob.has_magic(path):
            return path or "."
    return os.path.dirname(path) or "."


def _in_folder(folder: str) -> list[str]:
    if os.path.lexists(about := os.path.join(folder, "dataset_dict.json")):
        found = ", ".join(map(str, _said(about, "splits")))
        raise ValueError(f"{folder} holds the splits {found}: name the folder of one of them")
    if os.path.lexists(state := os.path.join(folder, "state.json")):  # of Dataset.save_to_disk
        paths = []
        for each in _said(state, "_data_files"):
            name = each.get("filename") if isinstance(each, dict) else None
            try:
                paths.append(resolve(folder, name if isinstance(name, str) else ""))
            except ValueError as error:
                what = "must be relative and stay in the folder"
                raise ValueError(f"{state}: the name {name!r} of a data file {what}; {_SAVE}") from error
            if not os.path.isfile(paths[-1]):
                raise ValueError(f"{state}: there is no file {name!r} beside it; {_SAVE}")
        return paths
    for place in (folder, os.path.join(folder, "data")):
        paths = sorted(glob.glob(os.path.join(glob.escape(place), "*")))
        paths = [each for each in paths if os.path.isfile(each) and os.path.basename(each) not in _ABOUT]
        if named := [(ending, each) for each in paths if (ending := _ending(each))]:
            kinds = {ENDINGS[ending] for ending, _ in named}
            splits = {split for _, each in named if (split := _split(os.path.basename(each)))}
            if len(kinds) > 1 or len(splits) > 1:
                what = f"files of {', '.join(sorted(kinds if len(kinds) > 1 else splits))}"
                raise ValueError(f"{place} holds {what}: name some of them, as in '{place}/train*'")
            return [each for _, each in named]
    raise FileNotFoundError(f"{folder}: neither here nor in data/ is a file that ends in {_endings()}")


def _split(name: str) -> str:
    """The split that a file's name tells, as in `test-00000-of-00002.parquet` or `geo_test.jsonl`; or ''."""
    if shard := _SHARD.match(name):
        return shard[1]
    found = _SPLIT.findall(name.lower())
    return found[-1] if found else ""


def _said(path: str, key: str) -> list[object]:
    """The list that a file of `datasets` holds under a key.

    Raises:
      ValueError: it holds none; the message names the file.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {_SAVE}") from error
    values = found.get(key) if isinstance(found, dict) else None
    if not isinstance(values, list) or not values:
        raise ValueError(f"{path}: expected an object with a list of {key!r}; {_SAVE}")
    return values


def _endings() -> str:
    return ", ".join(ENDINGS)


def _ending(path: str) -> str:
    return next((ending for ending in ENDINGS if path.lower().endswith(ending)), "")


def kind(path: str) -> str:
    """The format of a file, by its first bytes, or else by its name: parquet, arrow, lines, json or tsv.

    Raises:
      ValueError: it is none of these.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):  # a file; a stream, as `datasets` writes
        return "arrow"
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a pointer of Git LFS instead of the file: run git lfs pull there")
    if head.startswith(b"\x1f\x8b"):
        return "lines"
    if ending := _ending(path):
        return ENDINGS[ending]
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith((b"[", b"{")):
        return "json" if text.startswith(b"[") else "lines"
    raise ValueError(f"{path}: expected one of {_endings()}")


# ---- 2. their records ---------------------------------------------------------------------------------


def records(path: str) -> Iterator[tuple[str, object]]:
    """Yields (`row 7` or `line 7`, the record) for every record of a file; an `Unreadable` for one that
    cannot be read. A record of JSON may be anything that JSON can say.

    Raises:
      ValueError: the file as a whole, or from some record on, cannot be read; the message says where.
    """
    readers = {"parquet": _parquet, "arrow": _arrow, "lines": _lines, "json": _json, "tsv": _tsv}
    return readers[kind(path)](path)


def all_records(paths: Sequence[str]) -> Iterator[tuple[str, int, str, object]]:
    """(file, number in it, place, record) of every record; where there are several files, a place names its
    own."""
    for path in paths:
        for number, (place, record) in enumerate(records(path)):
            yield path, number, f"{os.path.basename(path)} {place}" if len(paths) > 1 else place, record


def _parquet(path: str) -> Iterator[tuple[str, object]]:
    from mstar_jax.data import arrow  # here: pyarrow takes longer to import than most files to read

    return arrow.parquet(path)


def _arrow(path: str) -> Iterator[tuple[str, object]]:
    from mstar_jax.data import arrow

    return arrow.arrow(path)


def _lines(path: str) -> Iterator[tuple[str, object]]:
    number = 0
    try:
        with _opened(path) as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                    yield f"line {number}", Unreadable("line too long")
                elif line.strip():
                    yield f"line {number}", _decode(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip data after line {number}: {error}") from error


def _opened(path: str) -> IO[bytes] | gzip.GzipFile:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped or path.endswith(".gz") else open(path, "rb")


def _decode(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return Unreadable("bad JSON line")


def _json(path: str) -> Iterator[tuple[str, object]]:
    """A list of records, or {id: record}; or JSON lines, which are often called .json."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and data[:1] == b"{":
            del data
            yield from _lines(path)
            return
        offset = error.start if isinstance(error, UnicodeDecodeError) else 0
        at = error.lineno if isinstance(error, json.JSONDecodeError) else data.count(b"\n", 0, offset) + 1
        raise ValueError(f"{path}, line {at}: not valid JSON: {error}") from error
    del data
    if isinstance(content, dict) and content and all(isinstance(each, dict) for each in content.values()):
        yield from ((f"row {key}", {"pid": key, **record}) for key, record in content.items())
    elif isinstance(content, list):
        yield from ((f"row {number}", record) for number, record in enumerate(content))
    else:
        found = type(content).__name__
        raise ValueError(f"{path}, line 1: expected a JSON list of rows, or {{id: row}}, found {found}")


def _tsv(path: str) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", restkey="")
        number = 0
        while True:
            record: object
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error:
                record = Unreadable("broken row")
            yield f"row {number}", record
            number += 1
