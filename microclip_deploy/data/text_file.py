"""Text files as editors and spreadsheets save them, on every system."""

import codecs
import hashlib
from pathlib import Path
from typing import NamedTuple

from microclip_deploy.errors import DataError, printable

# A cell that starts like this is a formula to spreadsheet programs, also behind blanks.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


class TextFile(NamedTuple):
    """The text of a file and the sha256 of the bytes it was decoded from."""

    text: str
    sha256: str


def read_text(path: Path, wanted: str) -> TextFile:
    """Read a file in UTF-8, or in UTF-16 with a byte order mark, as Excel's "Unicode text" has one.

    Args:
        path: the file.
        wanted: what it should hold, for the message.

    Raises:
        DataError: it cannot be read or is no text.
    """
    place = printable(path)
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except IsADirectoryError as error:
        raise DataError(f"{place}: expected {wanted}, found a folder; give a file") from error
    except OSError as error:
        found = (error.strerror or "an error").lower()
        raise DataError(f"{place}: expected {wanted}, found: {found}; check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: expected {wanted}, found a byte at {error.start} that is no UTF-8; "
            "give a text file saved as UTF-8"
        ) from error
    if "\0" in text:
        raise DataError(
            f"{place}: expected {wanted}, found zero bytes; give a text file saved as UTF-8"
        )
    return TextFile(text, hashlib.sha256(content).hexdigest())


def cell(text: str) -> str:
    """Return the text, defused if a spreadsheet program would take it for a formula."""
    starts = text.lstrip(" \u00a0").startswith(_FORMULA_STARTS)
    return f"'{text}" if starts else text
