"""Photos in an Arrow table in, what the model says of them in an Arrow table out, row by row.

A photo that cannot be read is a row with its reason, never an exception: one bad file must not end
a job of millions.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from microclip_deploy.calibration import is_unknown
from microclip_deploy.data.decode import BadImage, decode_photo, read_photo, require_bytes
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import read_ahead
from microclip_deploy.errors import DataError, UsageError
from microclip_deploy.serving import Session
from microclip_deploy.serving.classification import guesses

Photo = Path | bytes | None
"""A file, the bytes of one, or nothing, which becomes an error of its row."""

PATH, IMAGE = "path", "image"
EXTRAS = ("embedding", "mask")
"""Columns that are only made when they are asked for."""


@dataclass(frozen=True)
class Wanted:
    """What is told of each photo."""

    top_k: int = 5
    """Classes a photo; all of them if there are fewer."""
    embedding: bool = False
    mask: bool = False

    def __post_init__(self) -> None:
        """Refuse less than one class."""
        if self.top_k < 1:
            raise UsageError(f"top_k: expected at least 1, found {self.top_k}; give another")

    def schema(self, width: int) -> pa.Schema:
        """Return the columns that are added to a table.

        Args:
            width: E of the model's embeddings.
        """
        fields = {
            "error": pa.string(),
            "classes": pa.list_(pa.string()),
            "probabilities": pa.list_(pa.float32()),
            "logits": pa.list_(pa.float32()),
            "unknown": pa.bool_(),
        }
        if self.embedding:
            fields["embedding"] = pa.list_(pa.float32(), width)
        if self.mask:
            fields["mask"] = pa.list_(pa.bool_())
        return pa.schema(list(fields.items()))


def classify_table(
    session: Session,
    table: pa.Table,
    *,
    top_k: int = 5,
    batch_size: int = 64,
    embedding: bool = False,
    mask: bool = False,
) -> pa.Table:
    """Classify the photos of a table; docs/bulk.md describes the columns.

    Args:
        session: an open model; stays open.
        table: with a column `path` (text: a file), `image` (binary: an encoded file) or both, of
            which `image` is taken where it is not null. Other columns are keys.
        top_k: how many classes a photo; all of them if there are fewer.
        batch_size: photos a batch of the model.
        embedding: add the column `embedding`.
        mask: add the column `mask`.

    Returns:
        The rows in their order: all columns but `image`, and those of `Wanted.schema`.

    Raises:
        DataError: no table, no column of photos, one of another type, or one with the name of a
            result.
        UsageError: `top_k` or `batch_size` below 1.
    """
    wanted = Wanted(top_k, embedding, mask)
    if not isinstance(table, pa.Table):
        raise DataError(
            f"table: expected a pyarrow.Table, found {type(table).__name__}; convert it, as with "
            "pyarrow.Table.from_pandas, from_batches or from_pylist"
        )
    keys = table.drop_columns([IMAGE]) if IMAGE in table.column_names else table
    taken = sorted(set(keys.column_names) & set(wanted.schema(1).names))
    if taken:
        raise DataError(
            f"table: expected no column with the name of a result, found {', '.join(taken)}; "
            "rename it"
        )
    return answered(session, keys, photos_of(table), wanted, batch_size)


def photos_of(table: pa.Table) -> Iterator[Photo]:
    """Return the photo of each row, checked at once and read as it is taken.

    Raises:
        DataError: no column of photos, or one of another type.
    """
    found = [name for name in (IMAGE, PATH) if table.column_names.count(name) == 1]
    if not found:
        raise DataError(
            f"table: expected one column '{PATH}' (text) or '{IMAGE}' (binary), found "
            f"{', '.join(table.column_names) or 'no columns'}; rename the one that holds photos"
        )
    for name in found:
        kind, right = table.schema.field(name).type, _TYPES[name]
        if not (kind == pa.null() or any(is_type(kind) for is_type in right)):
            told = "binary: encoded files" if name == IMAGE else "text: names of files"
            raise DataError(
                f"table: expected column '{name}' as {told}, found {kind}; cast it or rename it"
            )
    return _photos(table.select(found))


_TYPES: dict[str, tuple[Callable[[pa.DataType], bool], ...]] = {
    IMAGE: (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
    PATH: (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
}


def _photos(table: pa.Table) -> Iterator[Photo]:
    """Yield the first photo of each row that is there; only a few rows are copied at a time."""
    for batch in table.to_batches(max_chunksize=64):
        for values in zip(*batch.columns, strict=True):
            given = (value.as_py() for value in values)
            found = next((value for value in given if value is not None), None)
            yield Path(found) if isinstance(found, str) else found


def answered(
    session: Session,
    keys: pa.Table,
    photos: Iterable[Photo],
    wanted: Wanted,
    batch_size: int,
    tell: Callable[[str | None], None] = lambda _: None,
) -> pa.Table:
    """Return a table with the columns of `Wanted.schema`, what the model says, behind its own.

    Photos are decoded ahead in threads: a batch, or four for each thread if that is more, is in
    memory. All answers are.

    Args:
        session: an open model.
        keys: one row a photo.
        photos: what to classify, in the order of the rows.
        wanted: what to tell.
        batch_size: photos a batch.
        tell: called for each photo once it is read, with its error or None.

    Raises:
        UsageError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch size: expected at least 1, found {batch_size}; give another")
    width = session.classifier().shape[1]
    nothing = np.full(width, np.nan, np.float32)
    rows: list[dict[str, Any]] = []
    batch: list[tuple[dict[str, Any], NDArray[np.uint8]]] = []
    for view in read_ahead(partial(_view, session.preprocess), photos, None, batch_size):
        error = view if isinstance(view, str) else None
        rows.append({"error": error, "embedding": nothing})
        tell(error)
        if not isinstance(view, str):
            batch.append((rows[-1], view))
        if len(batch) == batch_size:
            _answer(session, batch, wanted)
            batch = []
    if batch:
        _answer(session, batch, wanted)
    answers = pa.Table.from_pylist(rows, schema=wanted.schema(width))
    for field in answers.schema:
        keys = keys.append_column(field, answers[field.name])
    return keys


def _view(preprocess: Preprocess, photo: Photo) -> NDArray[np.uint8] | str:
    """Return uint8 (S, S, 3) as the model sees a photo, or why it cannot."""
    if photo is None:
        return f"neither {PATH} nor {IMAGE}"
    try:
        if isinstance(photo, Path):
            found = read_photo(photo, preprocess.photos)
        else:
            name = Path(IMAGE)
            require_bytes(len(photo), name, preprocess.photos)
            found = decode_photo(io.BytesIO(photo), name, preprocess.photos)
    except BadImage as error:
        return error.reason
    return preprocess.test_view(found.image)


def _answer(
    session: Session, batch: list[tuple[dict[str, Any], NDArray[np.uint8]]], wanted: Wanted
) -> None:
    """Put into each row of a batch what the model says of its view."""
    found = session.predict(np.stack([view for _, view in batch]))
    ranked = guesses(session, found.logits, wanted.top_k)
    told = zip(batch, ranked, found.cls, found.mask, strict=True)
    for (row, _), top, embedding, mask in told:
        row["classes"] = [guess.name for guess in top]
        row["probabilities"] = [guess.probability for guess in top]
        row["logits"] = [guess.logit for guess in top]
        if session.calibration is not None:  # without one there is no rule, and so no answer
            row["unknown"] = bool(is_unknown(top[0].probability, session.calibration))
        if wanted.embedding:
            row["embedding"] = embedding
        if wanted.mask:
            row["mask"] = mask
