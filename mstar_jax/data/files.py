"""Files of records, whatever their format: parquet, Arrow, JSON, JSON lines, TSV; one, or many shards.

What is asked for is a file, a folder or a pattern:

    train.parquet                    a file; `kind` says which format it has
    geometry3k/                      the shards in it, or in its `data/`; or what `Dataset.save_to_disk` wrote
    "geometry3k/data/train-*"        a pattern of names; give one where a folder holds several splits

All but a JSON list are read in parts, so that they may be larger than the memory: a parquet file page by
page, an Arrow file batch by batch. pyarrow needs about twice the largest page: with `datasets` these are 100
rows with images at most, with pyarrow itself up to 1,024 values. A record is a dict of its columns.
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

Record = dict[str, Any]  # by column; a JSON, TSV, parquet or Arrow value

LONGEST_LINE = 1 << 28  # bytes of a JSON line; a gzip file of a few MB can hold one of many GB
LONGEST_CELL = 1 << 28  # bytes of a TSV cell; Python's default of 128 KiB is too small for most images
TOGETHER = 16 << 20  # bytes of records that are in memory together, about
INFLATED = (1 << 30, 200)  # bytes, and times its size on the disk, that a part of a parquet file may have
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
_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.|(train|validation|valid|val|dev|test)\.")  # a split's name


class Broken(ValueError):
    """A record that cannot be read; the message is the cause that a report counts it under."""


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
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        with open(os.path.join(folder, "dataset_dict.json"), encoding="utf-8") as file:
            splits = json.load(file).get("splits", [])
        raise ValueError(f"{folder} holds the splits {', '.join(splits)}: name the folder of one of them")
    if os.path.exists(state := os.path.join(folder, "state.json")):  # of Dataset.save_to_disk
        with open(state, encoding="utf-8") as file:
            names = [each["filename"] for each in json.load(file).get("_data_files", [])]
        return [resolve(folder, name) for name in names]
    for place in (folder, os.path.join(folder, "data")):
        paths = sorted(glob.glob(os.path.join(glob.escape(place), "*")))
        paths = [each for each in paths if os.path.isfile(each) and os.path.basename(each) not in _ABOUT]
        if named := [(ending, each) for each in paths if (ending := _ending(each))]:
            kinds = {ENDINGS[ending] for ending, _ in named}
            splits = {m[1] or m[2] for _, each in named if (m := _SHARD.match(os.path.basename(each)))}
            if len(kinds) > 1 or len(splits) > 1:
                what = f"files of {', '.join(sorted(kinds if len(kinds) > 1 else splits))}"
                raise ValueError(f"{place} holds {what}: name some of them, as in '{place}/train*'")
            return [each for _, each in named]
    raise FileNotFoundError(f"{folder}: neither here nor in data/ is a file that ends in {_endings()}")


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
    """Yields (`row 7` or `line 7`, the record) for every record of a file; a `Broken` for one that cannot be
    read. A record of JSON may be anything that JSON can say.

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
    import pyarrow  # here: it takes longer to import than most files to read
    import pyarrow.parquet

    number = 0
    try:
        # the pages of a column are read as they are needed; pyarrow would read and keep whole row groups
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            _check_inflated(path, file.metadata)
            for at in range(file.num_row_groups):
                group = file.metadata.row_group(at)
                few = max(1, min(64, TOGETHER * group.num_rows // max(group.total_byte_size, 1)))
                for batch in file.iter_batches(batch_size=few, row_groups=[at]):
                    for record in _python(batch):
                        yield f"row {number}", record
                        number += 1
    except (pyarrow.ArrowException, OSError) as error:
        hint = "download the file again"
        raise ValueError(f"{path}, from row {number}: broken parquet, {hint} ({error})") from error


def _check_inflated(path: str, metadata: Any) -> None:
    """Refuses a file whose parts would need far more memory than they take on the disk."""
    for at in range(metadata.num_row_groups):
        group = metadata.row_group(at)
        for column in map(group.column, range(group.num_columns)):
            size = column.total_uncompressed_size
            if size > INFLATED[0] and size > INFLATED[1] * column.total_compressed_size:
                raise ValueError(
                    f"{path}: row group {at} of column {column.path_in_schema} has {size} bytes, compressed "
                    f"to {column.total_compressed_size}: more than {INFLATED[1]} times, so it is refused"
                )


def _arrow(path: str) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.ipc

    number = 0
    try:
        with pyarrow.OSFile(path) as source:  # not mapped: its pages would count as this process's memory
            for batch in _batches(source):
                _check_offsets(batch)
                few = max(1, min(512, TOGETHER * batch.num_rows // max(batch.nbytes, 1)))
                for at in range(0, batch.num_rows, few):
                    for record in _python(batch.slice(at, few)):
                        yield f"row {number}", record
                        number += 1
    except (pyarrow.ArrowException, OSError) as error:
        hint = "copy the folder again"
        raise ValueError(f"{path}, from row {number}: broken Arrow file, {hint} ({error})") from error


def _batches(source: Any) -> Iterator[Any]:
    import pyarrow.ipc

    if source.read(6) == b"ARROW1":
        file = pyarrow.ipc.open_file(source)
        yield from map(file.get_batch, range(file.num_record_batches))
    else:
        source.seek(0)
        yield from pyarrow.ipc.open_stream(source)


def _check_offsets(batch: Any) -> None:
    """Refuses values that lie outside of their batch: pyarrow would read there, and the process would end."""
    for column in batch.columns:
        try:
            column.validate(full=True)
        except ValueError as error:
            if "UTF8" not in str(error):  # such a row is counted, see `_python`
                raise


def _python(batch: Any) -> Iterator[object]:
    """The rows of a record batch; one that Python has no value for is `Broken`."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):  # neither format checks its strings and times
        for at in range(batch.num_rows):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield Broken("text is not UTF-8")
            except (ValueError, OverflowError):
                yield Broken("wrong types")


def _lines(path: str) -> Iterator[tuple[str, object]]:
    number = 0
    try:
        with _opened(path) as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                    yield f"line {number}", Broken("line too long")
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
        return Broken("bad JSON line")


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
                record = Broken("broken row")
            yield f"row {number}", record
            number += 1
