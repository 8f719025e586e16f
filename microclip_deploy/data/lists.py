"""Lists of images: .csv and .tsv tables, and .txt files of one path a line."""

import csv
import io
from pathlib import Path

from microclip_deploy.data.formats import image_endings
from microclip_deploy.errors import DataError, printable

LIST_ENDINGS = (".csv", ".tsv", ".txt")

_PATH_COLUMNS = ("path", "image", "file", "filename")
_LABEL_COLUMN = "label"


def read_list(source: Path) -> list[tuple[str, str | None]]:
    """Return (path, label) of each row as it is written; label None where there is none.

    A .csv or .tsv file has a header naming a column `path` (or `image`, `file`, `filename`;
    otherwise the first column is taken) and optionally a column `label`. The header may be missing
    if the first cell ends like an image file. Semicolons and tabs may stand for commas. A .txt file
    holds one path per line.

    Raises:
        DataError: it cannot be read, or holds no path.
    """
    if source.suffix.lower() == ".txt":
        lines = (line.strip() for line in _text(source).split("\n"))
        rows: list[tuple[str, str | None]] = [(line, None) for line in lines if line]
    else:
        rows = _table_rows(source, "\t" if source.suffix.lower() == ".tsv" else ",")
    if not rows:
        raise DataError(
            f"{printable(source)}: expected at least one image path, found none; add paths"
        )
    return rows


def _text(source: Path) -> str:
    """Return the text of a list file."""
    if not source.is_file():  # a pipe would block
        raise DataError(
            f"{printable(source)}: expected a list, found no regular file; save it as one"
        )
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{printable(source)}: expected a list in UTF-8, found: {error}; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise DataError(
            f"{printable(source)}: expected a list in UTF-8, found zero bytes; save it as UTF-8"
        )
    return text


def _table_rows(source: Path, delimiter: str) -> list[tuple[str, str | None]]:
    """Return (path, label) per row of a .csv or .tsv file."""
    try:
        text = _text(source)
        separator = _separator(text, usual=delimiter)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(
            f"{printable(source)}: expected a table, found: {error}; save it again as text"
        ) from error
    if not rows:
        return []
    header = [cell.strip().casefold() for cell in rows[0][1]]
    column = next((header.index(name) for name in _PATH_COLUMNS if name in header), 0)
    label_column = header.index(_LABEL_COLUMN) if _LABEL_COLUMN in header else None
    named = label_column is not None or header[column] in _PATH_COLUMNS
    if named or Path(header[column]).suffix not in image_endings():
        rows = rows[1:]
    result: list[tuple[str, str | None]] = []
    for line, row in rows:
        path = row[column].strip() if column < len(row) else ""
        if not path:
            raise DataError(
                f"{printable(source)}, line {line}: expected a path in column {column + 1}, "
                f"found none; fill it in or remove the line"
            )
        label = None if label_column is None else "".join(row[label_column : label_column + 1])
        result.append((path, label))
    return result


def _separator(text: str, *, usual: str) -> str:
    """Return what separates a table's cells, as spreadsheets write .csv in several ways."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    for separator in (usual, ";", "\t", ","):
        cells = [cell.strip().casefold() for cell in next(csv.reader([first], delimiter=separator))]
        named = not {*_PATH_COLUMNS, _LABEL_COLUMN}.isdisjoint(cells)
        if len(cells) > 1 and (named or Path(cells[0]).suffix in image_endings()):
            return separator
    return usual
