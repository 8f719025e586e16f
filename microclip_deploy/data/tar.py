"""The index of a tar file, of any maker.

Nothing is unpacked, so names are only names; those that would lead out of a folder are left out all
the same, as other tools read the list of photos. So are links, devices and sparse files. Of files
of one name the last counts, as for `tar -x`.
"""

import tarfile
from collections import Counter
from typing import IO

from microclip_deploy.data.index import GUARD_BYTES, Entry, Index, checksum
from microclip_deploy.errors import DataError, printable

_BLOCK = 512


def index_of_tar(stream: IO[bytes], archive: str, archive_bytes: int) -> Index:
    """Return where the files of a tar lie; all headers are read, no contents.

    Args:
        stream: the tar, seekable.
        archive: named in errors.
        archive_bytes: its size.

    Raises:
        DataError: no tar, or one that is cut or damaged.
    """
    entries, left_out = dict[str, Entry](), Counter[str]()

    def read(offset: int, size: int) -> bytes:
        stream.seek(offset)
        return stream.read(size)

    try:
        with tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # all headers would stay in memory
                name, kind = _name(member.name), _kind(member)
                if kind or not name:
                    left_out[kind or "unsafe names"] += kind != "folders"
                    continue
                left_out["files of a name that comes again"] += name in entries
                begin = member.offset_data
                guard = checksum(read(begin - GUARD_BYTES, GUARD_BYTES))
                entries[name] = Entry(begin, member.size, guard)
            end = read(tar.offset, _BLOCK)
    except tarfile.TarError as error:
        raise _damaged(archive, str(error), len(entries)) from error
    if end != bytes(_BLOCK):
        found = f"no end of it at byte {tar.offset} of {archive_bytes}"
        raise _damaged(archive, found, len(entries))
    return Index.of(entries, archive_bytes=archive_bytes, left_out=+left_out)


def _name(name: str) -> str:
    """Return a name without empty and "." parts; '' if it would lead out of a folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "" if name.startswith("/") or ".." in parts or "\0" in name else "/".join(parts)


def _kind(member: tarfile.TarInfo) -> str:
    """Say what a member is that is no file of plain bytes; '' for a file."""
    if member.isdir():
        return "folders"
    if member.issym() or member.islnk():
        return "links"
    return "" if member.isreg() and not member.issparse() else "special files"


def _damaged(archive: str, found: str, before: int) -> DataError:
    return DataError(
        f"{printable(archive)}: expected a whole tar file, found: {found}, after {before} files; "
        "fetch or write it again"
    )
