"""Progress on stderr: a live bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_QUIET_INTERVAL_S = 15.0
"""Seconds between two lines where there is no terminal."""


class Bar:
    """One task with a known number of steps."""

    def __init__(self, console: Console, title: str, live: Progress | None) -> None:
        self._console = console
        self._title = title
        self._live = live
        self._task = live.add_task(title, total=None, note="") if live else None
        self._next_line = time.monotonic() + _QUIET_INTERVAL_S

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` steps are behind us."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, total=total, note=note)
        elif time.monotonic() >= self._next_line or done == total:
            self._next_line = time.monotonic() + _QUIET_INTERVAL_S
            self._console.print(f"{self._title}: {done}/{total} {note}".rstrip(), highlight=False)


@contextmanager
def bar(console: Console, title: str) -> Iterator[Bar]:
    """Open a progress bar on `console`."""
    if not console.is_terminal or console.quiet:
        yield Bar(console, title, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as live:
        yield Bar(console, title, live)
