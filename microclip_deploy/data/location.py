"""Bytes of files by their paths, on disk or in an object store."""

import os
import stat
from pathlib import Path
from typing import IO, NamedTuple

from microclip_deploy.data import remote


class Status(NamedTuple):
    """What is another one when a file is."""

    size: int
    """Bytes."""
    changed: int
    """Nanoseconds, or a checksum of what a store says."""


def status(path: str) -> Status | None:
    """Return the status of a regular file; None if there is none.

    Raises:
        EnvironmentProblem: the store cannot be reached, or refuses.
    """
    try:
        if remote.is_remote(path):
            return Status(*remote.status(path))
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return Status(found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def open_file(path: str) -> IO[bytes]:
    """Return a file as a seekable stream."""
    return remote.open_file(path) if remote.is_remote(path) else open(path, "rb")


def read(path: str) -> bytes:
    """Return a file's bytes."""
    if remote.is_remote(path):
        return remote.read(path)
    with open(path, "rb") as file:
        return file.read()


def read_range(path: str, offset: int, size: int) -> bytes:
    """Return bytes of a file; fewer where it ends before."""
    if remote.is_remote(path):
        return remote.read_range(path, offset, size)
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def absolute(path: Path | str) -> str:
    """Return a path that means the same in every working directory."""
    return str(path) if remote.is_remote(path) else str(Path(path).absolute())
