"""One JSON line a request, written by a thread, so that a slow or full disk delays nobody."""

import json
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MOST_WAITING = 10_000
"""Lines; what comes on top is lost and counted."""


class AccessLog:
    """A file, or stdout, that requests are logged to."""

    def __init__(self, path: Path | None, on_lost: Callable[[], None]) -> None:
        """Begin to write.

        Args:
            path: where lines are appended; None for stdout.
            on_lost: called for each line that could not be written.
        """
        self._path, self._on_lost = path, on_lost
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
        """Write what waits."""
        self._lines.put(None)
        self._thread.join(5)

    def _write(self) -> None:
        while (entry := self._lines.get()) is not None:
            text = json.dumps(entry, separators=(",", ":"))
            try:
                if self._path is None:
                    print(text, file=sys.stdout, flush=True)
                else:
                    with self._path.open("a", encoding="ascii") as file:
                        file.write(text + "\n")
            except (OSError, ValueError):  # a full disk, a reader of stdout that is gone
                self._on_lost()
