"""Files inside archives: a path may lead into a tar, a Parquet or an Arrow file.

    photos-000.tar/cat/17.jpg     a member of a tar, by the name it has there
    train-0001.parquet/00000017   a row of a table

Whoever reads photos asks `find` first and opens an ordinary file where it returns None, so lists,
labels, hashes and resumed runs know nothing of archives. Nothing is unpacked: an index tells where
bytes lie. That of a tar is kept beside it, or in the user's cache where that cannot be.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, NamedTuple

from microclip_deploy import artifact
from microclip_deploy.data import location, remote
from microclip_deploy.data.index import GUARD_BYTES, Entry, Index, checksum
from microclip_deploy.data.location import Status
from microclip_deploy.data.table import index_of_table, read_row
from microclip_deploy.data.tar import index_of_tar
from microclip_deploy.errors import DataError, EnvironmentProblem, printable

INDEX_ENDING = ".index.safetensors"
"""Of the file beside a tar."""

ARCHIVE_ENDINGS = (".tar", ".parquet", ".arrow")

_INTO = re.compile(
    rf"(?:{'|'.join(map(re.escape, ARCHIVE_ENDINGS))})(?={re.escape(os.sep)}|$)", re.IGNORECASE
)


class Member(NamedTuple):
    """A file inside an archive, or in an object store."""

    size: int
    """Bytes."""
    read: Callable[[], bytes]
    """Raises OSError where the archive is another one than its index says."""

    def open(self) -> IO[bytes]:
        """Return it as a stream."""
        return io.BytesIO(self.read())


class Within(NamedTuple):
    """Where a path leads."""

    archive: str
    name: str
    """'' for the archive itself."""


def within(path: Path | str) -> Within | None:
    """Return the archive that a path names or leads into; None for any other path."""
    text = os.fspath(path)
    for ending in _INTO.finditer(text):
        archive = text[: ending.end()]
        if location.status(archive) is not None:  # not of a folder of such a name
            return Within(archive, text[ending.end() + 1 :])
    return None


def find(path: Path | str) -> Member | None:
    """Return what a path into an archive or an object store leads to; None for any other path.

    Raises:
        FileNotFoundError: nothing of that name is there.
        OSError: it cannot be read.
        DataError: the archive is damaged.
        EnvironmentProblem: the store cannot be reached, or refuses.
    """
    place, text = within(path), os.fspath(path)
    if place is None or not place.name:
        if not remote.is_remote(text):
            return None
        content = remote.read(text)
        return Member(len(content), lambda: content)
    now = location.status(place.archive)
    entry = None if now is None else index_of(place.archive).find(place.name)
    if now is None or entry is None:
        raise FileNotFoundError(text)
    if place.archive.lower().endswith(".parquet"):
        content = read_row(place.archive, now, entry.offset)
        return Member(len(content), lambda: content)
    return Member(entry.size, partial(_read, place.archive, entry))


def exists(path: str) -> bool:
    """Say whether a file is there, in an archive or not; its bytes are not read."""
    place = within(path)
    if place is None or not place.name:
        return location.status(path) is not None
    return index_of(place.archive).find(place.name) is not None


def index_of(archive: str) -> Index:
    """Return the index of an archive; that of a tar is made once and kept.

    Raises:
        DataError: it is gone or damaged.
        EnvironmentProblem: the store cannot be reached, or refuses.
    """
    status = location.status(archive)
    if status is None:
        raise DataError(
            f"{printable(archive)}: expected an archive of photos, found none; put it back"
        )
    return _index(archive, status)


@cache
def _index(archive: str, status: Status) -> Index:
    if not archive.lower().endswith(".tar"):
        return index_of_table(archive, status.size)
    for place in _kept_at(archive, status):
        with suppress(OSError):
            kept = Index.from_bytes(location.read(place))
            if kept is not None and _fits(kept, archive, status):
                return kept
    with location.open_file(archive) as stream:
        made = index_of_tar(stream, archive, status.size)
    # The index of a pack's shard is its manifest's.
    packed = location.status(str(Path(archive).with_name(artifact.MANIFEST))) is not None
    for place in _kept_at(archive, status)[packed:]:
        if not remote.is_remote(place):
            with suppress(EnvironmentProblem, OSError):
                Path(place).parent.mkdir(parents=True, exist_ok=True)
                artifact.write_bytes(Path(place), made.to_bytes())
                break
    return made


def _kept_at(archive: str, status: Status) -> tuple[str, str]:
    """Return where the index of a tar may be kept, the best place first."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    key = hashlib.sha256(f"{location.absolute(archive)} {status}".encode("utf-8", "replace"))
    return f"{archive}{INDEX_ENDING}", f"{cache}/microclip-deploy/{key.hexdigest()}{INDEX_ENDING}"


def _fits(index: Index, archive: str, status: Status) -> bool:
    """Say whether an index is that of an archive, by its size, first and last file."""
    if index.archive_bytes != status.size:
        return False
    by_offset = index.entries[index.entries[:, 0].argsort()]
    try:
        for row in by_offset[[0, -1]] if len(by_offset) else ():
            _read(archive, Entry(row[0], 0, row[2]))
    except OSError:
        return False
    return True


def _read(archive: str, entry: Entry) -> bytes:
    """Return a file's bytes if what lies before them is what the index says.

    Raises:
        OSError: it is not.
    """
    begin = max(0, entry.offset - GUARD_BYTES)
    found = location.read_range(archive, begin, entry.offset + entry.size - begin)
    before, content = found[: entry.offset - begin], found[entry.offset - begin :]
    if len(content) != entry.size or entry.guard not in (-1, checksum(before)):
        raise OSError(0, f"the archive was changed since its index was made ({INDEX_ENDING})")
    return content
