"""What files hold, as hashes: a file that was changed is noticed, one that was moved is found."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from microclip_deploy.data.archive import find
from microclip_deploy.processors import usable_cpus

_MAX_THREADS = 8

# Files handed to the threads at once: a million waiting calls take memory.
_CHUNK = 256


def contents(
    paths: Sequence[Path], on_progress: Callable[[int, int], None] | None = None
) -> list[str | None]:
    """Return the sha256 (hex) of every file's bytes; None of one that cannot be read.

    Every byte is read: a time and a size are kept by many a tool that changes a photo.

    Args:
        paths: files.
        on_progress: called with (done, total) as it goes on, in this thread.
    """
    hashes: list[str | None] = []
    with ThreadPoolExecutor(min(_MAX_THREADS, usable_cpus())) as pool:
        for start in range(0, len(paths), _CHUNK):
            for found in pool.map(_content, paths[start : start + _CHUNK]):
                hashes.append(found)
                if on_progress is not None:
                    on_progress(len(hashes), len(paths))
    return hashes


def copies(paths: Iterable[Path], hashes: Iterable[str]) -> list[Path]:
    """Return the files whose hash is that of a file before them, in the order given."""
    seen, found = set[str](), list[Path]()
    for path, held in zip(paths, hashes, strict=False):
        if held in seen:
            found.append(path)
        seen.add(held)
    return found


def _content(path: Path) -> str | None:
    try:
        member = find(path)
        with path.open("rb") if member is None else member.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError:
        return None
