"""Images that are there more than once, byte for byte."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class Copy(NamedTuple):
    """A file with the same bytes as one before it."""

    path: Path
    of: Path


def find_copies(paths: Sequence[Path]) -> list[Copy]:
    """Return the later ones of files with the same bytes, in the order given.

    Only files of equal size are read. What is gone or cannot be read meanwhile is no copy.
    """
    by_size: dict[int, list[Path]] = {}
    for path in paths:
        try:
            by_size.setdefault(path.stat().st_size, []).append(path)
        except OSError:
            continue
    found: dict[Path, Path] = {}
    for same_size in by_size.values():
        if len(same_size) > 1:
            found |= _same_content(same_size)
    return [Copy(path, found[path]) for path in paths if path in found]


def _same_content(paths: Iterable[Path]) -> dict[Path, Path]:
    """Return the first file of the same content for each that has one before it."""
    first: dict[bytes, Path] = {}
    copies: dict[Path, Path] = {}
    for path in paths:
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").digest()
        except OSError:
            continue
        if digest in first:
            copies[path] = first[digest]
        first.setdefault(digest, path)
    return copies
