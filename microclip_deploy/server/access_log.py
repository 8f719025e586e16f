"""One JSON line a request, written by a thread, so that a slow or full disk delays nobody."""

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microclip_deploy.errors import EnvironmentProblem

_MOST_WAITING = 10_000
"""Lines; what comes on top is lost and counted."""

_CLOSE_S = 5.0
"""For the lines that wait at the end."""


class AccessLog:
    """A file, or stdout, that requests are logged to."""

    def __init__(self, path: Path | None, on_lost: Callable[[], None]) -> None:
        """Begin to write.

        Args:
            path: where lines are appended; None for stdout.
            on_lost: called for each line that could not be written.

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
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def write(self, entry: dict[str, Any]) -> None:
        """Log a request."""
        try:
            self._lines.put_nowait(entry)
        except queue.Full:
            self._on_lost()

    def close(self) -> None:
        """Write what waits, unless nobody takes it."""
        try:
            self._lines.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_S)

    def _write(self) -> None:
        while (entry := self._lines.get()) is not None:
            text = json.dumps(entry, separators=(",", ":")) + "\n"
            try:
                self._append(text.encode("ascii"))
            except OSError:  # a full disk, a reader of stdout that is gone
                self._on_lost()

    def _append(self, line: bytes) -> None:
        """Write a line at once; the file is opened anew, so that it may be moved away.

        Raises:
            OSError: it cannot be written, or not the whole of it.
        """
        if self._path is None:
            # Past Python's buffer: a thread that waits inside it cannot be left behind at the end.
            written = os.write(sys.__stdout__.fileno(), line) if sys.__stdout__ else 0
        else:
            with self._path.open("ab", buffering=0) as file:
                written = file.write(line)
        if written < len(line):
            raise OSError("not written as a whole")
