"""Numbers, tables and file names of reports as text."""

import math
import re
from collections.abc import Mapping, Sequence

from microclip_deploy.errors import printable

_LONGEST_SLUG = 45
"""Letters; five parts stay below the 255 bytes of a file's name."""


def digits(value: float) -> str:
    """Return three significant digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def in_ms(seconds: float) -> str:
    """Return milliseconds, three significant digits."""
    return digits(1000 * seconds)


def percent(share: float) -> str:
    """Return a share in whole percent, and in tenths below ten."""
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"


def percentile_name(q: float) -> str:
    """Return p50, p99.9."""
    return f"p{q:g}"


def flat(value: object, name: str = "") -> dict[str, str]:
    """Return dotted name -> text of nested plain values."""
    if isinstance(value, Mapping):
        dot = f"{name}." if name else ""
        parts = [flat(item, f"{dot}{key}") for key, item in value.items()]
        return {key: text for part in parts for key, text in part.items()}
    if value is None:
        return {name: "–"} if name else {}
    return {name: ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)}


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines: columns of numbers to the right, words to the left."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    signs = [">" if numeric else "<" for numeric in number_columns(rows)]
    return [
        "  ".join(
            f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True)
        ).rstrip()
        for row in shown
    ]


def number_columns(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Say of each column whether all cells below its head begin with a digit or are empty."""
    return [
        all(cell in ("", "–") or cell[0].isdigit() for cell in column)
        for column in zip(*rows[1:], strict=True)
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of Markdown, headers first."""
    lines = [f"| {' | '.join(map(inline, row))} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def inline(text: str) -> str:
    """Return a text that is neither markup nor the end of a table's cell."""
    return printable(text).replace("<", "&lt;").replace("|", "\\|")


def slug(text: str) -> str:
    """Return a part of a file's name: small letters, digits and hyphens."""
    hyphened = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return hyphened[:_LONGEST_SLUG].rstrip("-") or "unnamed"
