"""Photos in the rows of Parquet and Arrow files, such as data sets of Hugging Face on disk.

The photos are the one column of bytes, or of {bytes, path}; of several the one named as below. A
column `label` of texts, or of numbers whose names the file tells, labels them. Arrow files that
are not compressed are read by offsets, like tars; of Parquet a row group is read at a time.
"""

import json
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from microclip_deploy.data.index import Entry, Index
from microclip_deploy.data.location import Status, open_file
from microclip_deploy.errors import DataError, printable, require

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content")
LABEL_COLUMNS = ("label", "labels", "class")

MOST_GROUP_BYTES = 2**30
"""Largest row group of photos that is read: two of them are in memory."""

_GROUP_BITS = 32  # an offset in a Parquet file is a row group and a row in it

_ONE_READING = threading.Lock()
"""Threads want the rows of one group at the same time."""


def index_of_table(archive: str, size: int) -> Index:
    """Return where the photos of a Parquet or Arrow file lie, named by their rows.

    Raises:
        DataError: no such file, damaged, compressed Arrow, or without a column of photos.
        EnvironmentProblem: pyarrow is not installed.
    """
    pyarrow = require("pyarrow", "parquet")
    indexed = _of_parquet if archive.lower().endswith(".parquet") else _of_arrow
    try:
        places, labels = indexed(archive)
    except (pyarrow.ArrowException, OSError) as error:
        told = printable(str(error).split("\n")[0])[:200]
        raise DataError(
            f"{printable(archive)}: expected a whole Parquet or Arrow file, found: {told}; fetch "
            "or write it again"
        ) from error
    entries = {f"{row:08d}": entry for row, entry in enumerate(places)}
    return Index.of(entries, archive_bytes=size, is_table=True, labels=labels)


def read_row(archive: str, status: Status, offset: int) -> bytes:
    """Return a photo of a Parquet file.

    Args:
        archive: the file.
        status: of it; what was read of an earlier one is not used.
        offset: as in its index.

    Raises:
        OSError: the row holds no bytes, or the file cannot be read.
    """
    pyarrow = require("pyarrow", "parquet")
    group, row = divmod(offset, 2**_GROUP_BITS)
    try:
        with _ONE_READING:
            value = _row_group(archive, status, group)[row].as_py()
    except pyarrow.ArrowException as error:
        raise OSError(0, printable(str(error).split("\n")[0])[:160]) from error
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None:
        raise OSError(0, "the row holds no image bytes")
    return bytes(value)


@lru_cache(maxsize=2)
def _row_group(archive: str, _status: Status, group: int) -> "pa.ChunkedArray":
    import pyarrow.parquet as pq

    with open_file(archive) as stream, pq.ParquetFile(stream) as file:
        column = _image_column(archive, file.schema_arrow)
        return file.read_row_group(group, columns=[column]).column(0)


def _of_parquet(archive: str) -> tuple[list[Entry], tuple[str | None, ...] | None]:
    import pyarrow.parquet as pq

    with open_file(archive) as stream, pq.ParquetFile(stream) as file:
        image, label = _image_column(archive, file.schema_arrow), _label_column(file.schema_arrow)
        leaves = [
            leaf
            for leaf in range(len(file.schema))
            if file.schema.column(leaf).path.split(".")[0] == image
        ]
        places = list[Entry]()
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            size = sum(group.column(leaf).total_uncompressed_size for leaf in leaves)
            if size > MOST_GROUP_BYTES:
                raise DataError(
                    f"{printable(archive)}: expected row groups of photos of up to 1 GiB, found "
                    f"{size / 2**30:.1f} GiB; write it again with row_group_size=100, or pack "
                    "its photos"
                )
            first = number << _GROUP_BITS
            places += [Entry(first + row, 0, -1) for row in range(group.num_rows)]
        labels = file.read(columns=[label]).column(0) if label else None
        return places, _labels(labels, label, file.schema_arrow)


def _of_arrow(archive: str) -> tuple[list[Entry], tuple[str | None, ...] | None]:
    import pyarrow as pa

    with open_file(archive) as stream:
        whole = pa.py_buffer(stream.read()) if not hasattr(stream, "fileno") else None
    whole = pa.memory_map(archive).read_buffer() if whole is None else whole
    table = _arrow_table(whole)
    image, label = _image_column(archive, table.schema), _label_column(table.schema)
    places = list[Entry]()
    for chunk in table.column(image).chunks:
        places += _places(archive, chunk, whole)
    labels = table.column(label) if label else None
    return places, _labels(labels, label, table.schema)


def _arrow_table(whole: Any) -> "pa.Table":
    """Read either of Arrow's formats; data sets are saved in that for streams."""
    import pyarrow as pa

    kind = pa.ipc.open_file if whole[:6].to_pybytes() == b"ARROW1" else pa.ipc.open_stream
    with kind(pa.BufferReader(whole)) as reader:
        return reader.read_all()


def _places(archive: str, chunk: Any, whole: Any) -> Iterator[Entry]:
    """Yield where the values of a column lie in the file; of a row without bytes, nothing."""
    import pyarrow as pa

    values = chunk.field("bytes") if pa.types.is_struct(chunk.type) else chunk
    width = "<i8" if pa.types.is_large_binary(values.type) else "<i4"
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, width)[values.offset : values.offset + len(values) + 1]
    begin = (data.address if data is not None else whole.address) - whole.address
    if not 0 <= begin <= whole.size:
        raise DataError(
            f"{printable(archive)}: expected an Arrow file without compression, found a compressed "
            "one; write it again without, or as Parquet"
        )
    for row in range(len(values)):
        yield Entry(begin + int(ends[row]), int(ends[row + 1] - ends[row]), -1)


def _image_column(archive: str, schema: "pa.Schema") -> str:
    """Return the name of the column that holds the photos.

    Raises:
        DataError: there is none, or several.
    """
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in found]
    if len(found) != 1 and not named:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)[:300]
        raise DataError(
            f"{printable(archive)}: expected a column of image bytes, such as `image`, found "
            f"{len(found) or 'none'} among {printable(columns)}; rename the right one to image"
        )
    return str(named[0] if named else found[0])


def _label_column(schema: "pa.Schema") -> str | None:
    return next((name for name in LABEL_COLUMNS if name in schema.names), None)


def _labels(column: Any, name: str | None, schema: "pa.Schema") -> tuple[str | None, ...] | None:
    """Return the label of each row; numbers by the names that Hugging Face's metadata gives."""
    if column is None:
        return None
    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = told.get("info", {}).get("features", {}).get(name, {}).get("names")
    values = column.to_pylist()
    if names:
        return tuple(
            names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in values
        )
    return tuple(None if v is None else str(v) for v in values)
