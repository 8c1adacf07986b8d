"""Records of parquet and Arrow files, in parts: a parquet file page by page, an Arrow file batch by batch.

pyarrow needs about twice the largest page: with `datasets` these are 100 rows with images at most, with
pyarrow itself up to 1,024 values; four times where rows have several images each.

Both formats can say in a few KB what takes many GB: compressed, by a dictionary, by lists of nothing. What
would need too much memory is refused, a file by its metadata and a row by what it would take in Python.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from mstar_jax.data.turns import Unreadable

TOGETHER = 16 << 20  # bytes of records that are in memory together, about
LARGEST_ROW = 1 << 28  # bytes of a row of parquet or Arrow, and of the rows that are decoded together
MOST_VALUES = 1 << 25  # in the lists of a row group, for they could all be one row's
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}  # bytes of parquet's
_EARLY = b"ARROW:experimental_compression"  # in a batch's metadata, as of 0.17
INFLATED = (1 << 30, 200)  # bytes, and times its size on the disk, that a part of a parquet file may have


def parquet(path: str) -> Iterator[tuple[str, object]]:
    """As `files.records`, of a parquet file."""
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_inflated(path, file.metadata)
            _check_types(path, file.schema_arrow)
            plan = [_together(path, file, at) for at in range(file.num_row_groups)]
        shared = sorted({name for _, names in plan for name in names})
        # the pages of a column are read as they are needed; pyarrow would read and keep whole row groups
        with pyarrow.parquet.ParquetFile(
            path, buffer_size=1 << 20, pre_buffer=False, read_dictionary=shared
        ) as file:
            for at, (few, _) in enumerate(plan):
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


def _together(path: str, file: Any, at: int) -> tuple[int, list[str]]:
    """(rows of a row group to decode together, columns whose values are to be shared), by its metadata.

    A dictionary's value, or what DELTA_BYTE_ARRAY prepends, is stored once and may be every value of a
    column, so that a page of a few KB can be decoded into many GB. A dictionary is no larger than the column
    less its data pages, whose compressed size is known; and a row's list has at most the values that are
    left when every other row has one. Lists that could be too much even so are decoded as indices into their
    dictionary, which takes more time and memory.

    Raises:
      ValueError: a column could be too much, and cannot be decoded so.
    """
    group, few, shared = file.metadata.row_group(at), 1 << 12, list[str]()
    few = min(few, TOGETHER * group.num_rows // max(group.total_byte_size, 1))
    for number, column in enumerate(map(group.column, range(group.num_columns))):
        known, delta = file.schema.column(number), "DELTA_BYTE_ARRAY" in column.encodings
        listed = known.max_repetition_level > 0
        largest, values = 0, 1
        if delta or any(encoding.endswith("DICTIONARY") for encoding in column.encodings):
            largest = column.total_uncompressed_size
            if column.has_dictionary_page and not delta:
                pages = column.data_page_offset - column.dictionary_page_offset
                largest -= column.total_compressed_size - pages
        if column.physical_type != "BYTE_ARRAY":  # each value takes as much, also what is absent
            largest = WIDTHS.get(column.physical_type, known.length)
        if listed:
            values = column.num_values - group.num_rows + 1
        rows = LARGEST_ROW // max(largest * values, 1)
        strings = column.physical_type == "BYTE_ARRAY" and not delta
        if listed and (column.num_values > MOST_VALUES or rows < 1 and not strings):
            raise ValueError(
                f"{path}: row group {at} of column {column.path_in_schema} may hold {values} values of up to "
                f"{largest} bytes in one row, so it is refused: write the file again with smaller row groups "
                "and pyarrow's default encodings"
            )
        if values > 1 and rows < 8 and strings:
            shared.append(column.path_in_schema)
        else:
            few = min(few, rows)
    return max(1, few if shared else min(few, 64)), shared


def arrow(path: str) -> Iterator[tuple[str, object]]:
    """As `files.records`, of an Arrow file or stream."""
    number = 0
    try:
        _check_bodies(path)
        with pyarrow.OSFile(path) as source:  # not mapped: its pages would count as this process's memory
            for batch in _batches(source):
                _check_types(path, batch.schema)
                _check_offsets(batch)
                few = max(1, min(512, TOGETHER * batch.num_rows // max(batch.nbytes, 1)))
                for at in range(0, batch.num_rows, few):
                    for record in _python(batch.slice(at, few)):
                        yield f"row {number}", record
                        number += 1
    except (pyarrow.ArrowException, OSError, struct.error) as error:
        hint = "copy the folder again"
        raise ValueError(f"{path}, from row {number}: broken Arrow file, {hint} ({error})") from error


def _check_bodies(path: str) -> None:
    """As `_check_inflated`, of an Arrow file's batches, which pyarrow inflates before it tells their sizes.

    Reads the header of each message, a flatbuffer of Arrow's Message.fbs, and of a compressed batch the first
    eight bytes of each buffer, which say what it inflates to.

    Raises:
      ValueError: a batch would need far more memory than it takes on the disk.
      struct.error: a header is damaged.
    """
    with open(path, "rb") as file:
        at = 8 if file.read(6) == b"ARROW1" else 0
        while True:
            file.seek(at)
            prefix = file.read(8)
            if prefix[:4] != b"\xff" * 4:  # as before 0.15
                prefix = prefix[:4]
                file.seek(at + 4)
            if len(prefix) < 4 or prefix[-4:] == bytes(4):
                return
            many = struct.unpack("<I", prefix[-4:])[0]
            header = file.read(min(many, LARGEST_ROW))
            message = struct.unpack_from("<I", header)[0]
            body, length = file.tell(), _number(header, "<q", _field(header, message, 3))
            if not 0 <= length < 1 << 62:
                raise struct.error(f"a message of {length} bytes")
            kind, batch = _number(header, "<B", _field(header, message, 1)), _inner(header, message, 2)
            if kind == 2:  # of a dictionary
                batch = _inner(header, batch, 1)
            if kind in (2, 3) and (_field(header, batch, 3) or _EARLY in header):  # compressed
                buffers, size = _inner(header, batch, 2), 0
                for each in range(_number(header, "<I", buffers)):
                    start, count = struct.unpack_from("<qq", header, buffers + 4 + 16 * each)
                    if count >= 8 and 0 <= start < length:
                        file.seek(body + start)
                        size += max(0, struct.unpack("<q", file.read(8))[0])
                if size > INFLATED[0] and size > INFLATED[1] * length:
                    raise ValueError(
                        f"{path}: the batch at byte {at} has {size} bytes, compressed to {length}: more than "
                        f"{INFLATED[1]} times, so it is refused"
                    )
            at = body + length


def _field(buffer: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table is; 0 if it is absent."""
    known = table - struct.unpack_from("<i", buffer, table)[0]
    there = 4 + 2 * number < struct.unpack_from("<H", buffer, known)[0]
    offset = struct.unpack_from("<H", buffer, known + 4 + 2 * number)[0] if there else 0
    return table + offset if offset else 0


def _inner(buffer: bytes, table: int, number: int) -> int:
    """Where the table or vector is that a field refers to; 0 if it is absent."""
    at = _field(buffer, table, number)
    return at + struct.unpack_from("<I", buffer, at)[0] if at else 0


def _number(buffer: bytes, kind: str, at: int) -> int:
    """A number of a flatbuffer; 0, its default, if it is absent."""
    found: int = struct.unpack_from(kind, buffer, at)[0] if at else 0
    return found


def _batches(source: Any) -> Iterator[Any]:
    """Those that `_check_bodies` saw; an Arrow file is a stream, and a footer that may say something else."""
    named = source.read(6) == b"ARROW1"
    count = pyarrow.ipc.open_file(source).num_record_batches if named else 0
    source.seek(8 if named else 0)
    for batch in pyarrow.ipc.open_stream(source):
        count -= 1
        yield batch
    if named and count:
        raise pyarrow.ArrowInvalid(f"the footer names {abs(count)} batches {'more' if count > 0 else 'less'}")


def _check_offsets(batch: Any) -> None:
    """Refuses values that lie outside of their batch: pyarrow would read there, and the process would end."""
    for column in batch.columns:
        nested = not pyarrow.types.is_primitive(column.type)  # a time of day that is none refuses no file
        column.view(_unread(column.type)).validate(full=nested)


def _unread(kind: Any) -> Any:
    """A type with bytes in place of strings: a row that is not UTF-8 is counted, see `_python`."""
    types = pyarrow.types
    if hasattr(kind, "storage_type"):
        return _unread(kind.storage_type)
    if types.is_dictionary(kind):
        return pyarrow.dictionary(kind.index_type, _unread(kind.value_type), kind.ordered)
    if types.is_map(kind):
        return pyarrow.map_(_unread(kind.key_type), _unread(kind.item_type))
    fields = [field.with_type(_unread(field.type)) for field in map(kind.field, range(kind.num_fields))]
    if types.is_struct(kind):
        return pyarrow.struct(fields)
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(fields[0], kind.list_size)
    if fields:
        return (pyarrow.large_list if types.is_large_list(kind) else pyarrow.list_)(fields[0])
    plain = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    return pyarrow.binary_view() if types.is_string_view(kind) else plain.get(kind, kind)


def _python(batch: Any) -> Iterator[object]:
    """The rows of a record batch; one that is too large, or that Python has no value for, is `Unreadable`."""
    if sum(map(_weight, batch.columns)) > LARGEST_ROW:
        if batch.num_rows > 1:
            yield from (record for at in range(batch.num_rows) for record in _python(batch.slice(at, 1)))
        else:
            yield Unreadable("row too large")
        return
    for at in range(0, batch.num_rows, 64):
        some = batch.slice(at, 64)
        try:
            found = some.to_pylist()
        except (ValueError, OverflowError):  # neither format checks its strings and times
            found = [_row(some.slice(each, 1)) for each in range(some.num_rows)]
        yield from found


def _row(batch: Any) -> object:
    found = dict[str, object]()
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            found[name] = column[0].as_py()
        except UnicodeDecodeError:
            return Unreadable("text is not UTF-8")
        except (ValueError, OverflowError):
            # a time of nanoseconds, as pandas writes: the row is lost only where this column is read
            found[name] = Unreadable("wrong types")
    return found


def _check_types(path: str, fields: Iterable[Any]) -> None:
    """Refuses types whose lists or runs may share memory; `_weight` counts what others share."""
    types = pyarrow.types
    for field in fields:
        kind = field.type.storage_type if hasattr(field.type, "storage_type") else field.type
        lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        if not (lists or types.is_struct(kind) or types.is_map(kind) or not kind.num_fields):
            plain = "a list, a string or binary"
            raise ValueError(f"{path}: {field.name} is {kind}, which is not read: cast it to {plain}")
        _check_types(path, map(kind.field, range(kind.num_fields)))
        if types.is_dictionary(kind):
            _check_types(path, [pyarrow.field(field.name, kind.value_type)])


def _weight(array: Any) -> int:
    """Bytes of an array's values in Python, about; what shares its memory with others counts all the same."""
    kind, types, own = array.type, pyarrow.types, 64 * len(array)
    if isinstance(array, pyarrow.ExtensionArray):
        return _weight(array.storage)
    if types.is_dictionary(kind):
        if types.is_primitive(kind.value_type):
            return own
        if (sizes := _sizes(array.dictionary)) is None:
            return own + len(array) * _weight(array.dictionary)
        return own + (pyarrow.compute.sum(sizes.take(array.indices)).as_py() or 0)
    if (sizes := _sizes(array)) is not None:
        return own + (pyarrow.compute.sum(sizes).as_py() or 0)
    if types.is_struct(kind):
        return 4 * own + sum(map(_weight, array.flatten()))
    if types.is_map(kind):
        start, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return own + sum(_weight(part.slice(start, end - start)) for part in (array.keys, array.items))
    if kind.num_fields:  # a list of some kind, see `_check_types`
        return own + _weight(array.flatten())
    return own + array.nbytes


def _sizes(array: Any) -> Any:
    """Bytes of each string or binary value, as an array; None for an array of other values."""
    kind, types = array.type, pyarrow.types
    if types.is_string_view(kind) or types.is_binary_view(kind):  # 16 bytes each, of which 4 are the size
        views = np.frombuffer(array.buffers()[1] or b"", np.int32)[4 * array.offset :: 4][: len(array)]
        return pyarrow.array(views, pyarrow.int64(), mask=array.is_null().to_numpy(zero_copy_only=False))
    kinds = (types.is_string, types.is_binary, types.is_large_string, types.is_large_binary)
    return pyarrow.compute.binary_length(array) if any(each(kind) for each in kinds) else None
