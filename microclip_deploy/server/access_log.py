"""One JSON line a request, written by a thread, so that a slow or full disk delays nobody."""

import json
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microclip_deploy.errors import EnvironmentProblem

_MOST_WAITING = 10_000
"""Lines; what comes on top is lost and counted."""

_GATHER_S = 0.1

_CLOSE_S = 5.0
"""For the lines that wait at the end."""


class AccessLog:
    """A file, or stdout, that requests are logged to."""

    def __init__(self, path: Path | None, on_lost: Callable[[int], None]) -> None:
        """Begin to write.

        Args:
            path: where lines are appended; None for stdout.
            on_lost: called with the number of lines that could not be written.

        Raises:
            EnvironmentProblem: the file cannot be opened.
        """
        self._path, self._on_lost = path, on_lost
        try:
            if path is not None:
                path.open("ab").close()
        except OSError as error:
            raise EnvironmentProblem(
                f"--access-log: expected a file that can be written, found: {error}; give another"
            ) from error
        self._lines: deque[dict[str, Any]] = deque()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def write(self, entry: dict[str, Any]) -> None:
        """Log a request."""
        if len(self._lines) < _MOST_WAITING:
            self._lines.append(entry)
        else:
            self._on_lost(1)

    def close(self) -> None:
        """Write what waits, unless nobody takes it."""
        self._ends.set()
        self._thread.join(_CLOSE_S)

    def _write(self) -> None:
        """Write what has gathered: a thread that wakes for every line would cost more than it."""
        goes_on = True
        while goes_on:
            goes_on = not self._ends.wait(_GATHER_S)
            entries = [self._lines.popleft() for _ in range(len(self._lines))]
            lines = (json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
            if not entries:
                continue
            try:
                self._append("".join(lines).encode("ascii"))
            except OSError:  # a full disk, a reader of stdout that is gone
                self._on_lost(len(entries))

    def _append(self, lines: bytes) -> None:
        """Write lines at once; the file is opened anew, so that it may be moved away.

        Raises:
            OSError: it cannot be written, or not the whole of it.
        """
        if self._path is None:
            # Past Python's buffer: a thread that waits inside it cannot be left behind at the end.
            written = os.write(sys.__stdout__.fileno(), lines) if sys.__stdout__ else 0
        else:
            with self._path.open("ab", buffering=0) as file:
                written = file.write(lines)
        if written < len(lines):
            raise OSError("not written as a whole")
