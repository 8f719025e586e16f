"""Where the files lie inside an archive: names in order, and the bytes of each.

Names lie behind one another in UTF-8, so that a million of them take 30 to 100 MB in each process
that reads photos; one is found by halving.
"""

import hashlib
import json
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

GUARD_BYTES = 512
"""Before each file's bytes, its header in a tar: their checksum tells an index of other bytes."""

_FORMAT = "microclip.index/1"


class Entry(NamedTuple):
    """The place of one file."""

    offset: int
    size: int
    """Bytes."""
    guard: int
    """crc32 of the GUARD_BYTES before; -1 where nothing needs to be compared."""


@dataclass(frozen=True)
class Index:
    """The files of an archive, by the parts of their names."""

    names: bytes
    ends: NDArray[np.int64]
    """(n,) where each name ends in `names`."""
    entries: NDArray[np.int64]
    """(n, 3), as in `Entry`."""
    archive_bytes: int = 0
    """Size of the archive it was made of."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """What is not in it, by kind."""
    made_of: str = ""
    """In a pack: sha256 of what its shard was made of."""
    sha256: str = ""
    """In a pack: of the shard."""
    bad: tuple[tuple[str, str], ...] = ()
    """In a pack: path and reason of the photos that could not be read."""
    is_table: bool = False
    """Files are the rows of one; never stored."""
    labels: tuple[str | None, ...] | None = None
    """Of the rows of a table, in their order; never stored."""

    @property
    def holds_photos(self) -> bool:
        """Say whether every file was taken for a photo, whatever its name."""
        return bool(self.made_of) or self.is_table

    @classmethod
    def of(cls, entries: Mapping[str, Entry], **more: object) -> Self:
        """Return the index of files by their names."""
        ordered = sorted((_key(name), name) for name in entries)
        encoded = [key.replace(b"\0", b"/") for key, _ in ordered]
        places = [entries[name] for _, name in ordered]
        return cls(
            b"".join(encoded),
            np.cumsum([len(name) for name in encoded], dtype=np.int64),
            np.array(places, np.int64).reshape(-1, 3),
            **more,  # type: ignore[arg-type]  # fields, checked by every caller
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        for row in range(len(self)):
            yield self._name(row).decode("utf-8", "surrogateescape")

    def find(self, name: str) -> Entry | None:
        """Return where a file lies; None if there is none of that name."""
        wanted = _key(name)
        row = bisect_left(range(len(self)), wanted, key=lambda i: _parted(self._name(i)))
        if row == len(self) or _parted(self._name(row)) != wanted:
            return None
        return Entry(*self.entries[row].tolist())

    def to_bytes(self) -> bytes:
        """Return it as a safetensors file; the same bytes for the same index."""
        about = {
            "format": _FORMAT,
            "archive_bytes": self.archive_bytes,
            "left_out": dict(sorted(self.left_out.items())),
            "made_of": self.made_of,
            "sha256": self.sha256,
            "bad": self.bad,
        }
        text = json.dumps(about).encode()
        return save(
            {
                "names": np.frombuffer(self.names, np.uint8),
                "ends": self.ends,
                "entries": self.entries,
                "about": np.frombuffer(text, np.uint8),
                "sha256": np.frombuffer(self._sha256(text), np.uint8),
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Self | None:
        """Return what `to_bytes` made a file of; None for any other file."""
        try:
            stored = load(content)
            text = stored["about"].tobytes()
            about = json.loads(text)
            if about.pop("format") != _FORMAT:
                return None
            about["bad"] = tuple((path, reason) for path, reason in about["bad"])
            found = cls(stored["names"].tobytes(), stored["ends"], stored["entries"], **about)
            return found if found._sha256(text) == stored["sha256"].tobytes() else None
        except (SafetensorError, ValueError, KeyError, TypeError):
            return None

    def _sha256(self, about: bytes) -> bytes:
        digest = hashlib.sha256(about)
        for part in (self.names, self.ends.tobytes(), self.entries.tobytes()):
            digest.update(part)
        return digest.digest()

    def _name(self, row: int) -> bytes:
        return self.names[self.ends[row - 1] if row else 0 : self.ends[row]]


def checksum(before: bytes) -> int:
    """Return the guard of a file, of the GUARD_BYTES before it."""
    return zlib.crc32(before)


def _key(name: str) -> bytes:
    return _parted(name.encode("utf-8", "surrogateescape"))


def _parted(name: bytes) -> bytes:
    """Return what sorts as the parts of a name do: a folder's files before longer folder names."""
    return name.replace(b"/", b"\0")
