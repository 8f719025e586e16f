"""The console: results on stdout, whose failures are errors; everything else on stderr.

A full disk or a closed pipe must never end results short in silence. Progress is a live bar in a
terminal, a line now and then elsewhere.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from microclip_deploy.errors import EnvironmentProblem, MicroclipError, printable

_QUIET_INTERVAL_S = 15.0
"""Seconds between two lines where there is no terminal."""


class _Notes(Console):
    """stderr. Where nobody reads it any more, a long run goes on in silence."""

    def on_broken_pipe(self) -> None:
        """Stop printing instead of ending the process, as the base class does."""
        self.quiet = True
        discard(sys.stderr)


notes = _Notes(stderr=True, highlight=False, soft_wrap=True)
"""Everything that is no result."""
out = Console(highlight=False)
"""Results."""


def print_json(value: Any) -> None:
    """Print one line of JSON; the last line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def tell_skipped(bad: Iterable[tuple[Path, str]], console: Console) -> None:
    """Name the files that could not be read, each with the reason."""
    for path, reason in bad:
        console.print(f"skipped: {printable(path)}: {reason}", style="yellow", markup=False)


def tell_warnings(warnings: Iterable[str], console: Console) -> None:
    """Show what a user must know."""
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def tell_left_out(summary: str, console: Console) -> None:
    """Say what a search of folders left out; nothing if it is ''."""
    if summary:
        console.print(f"left out: {summary}", style="yellow", markup=False)


@contextmanager
def counter(console: Console, title: str) -> Iterator[Callable[[int], None]]:
    """Show a growing number in a terminal while the block lasts; give what takes it."""
    if not console.is_terminal or console.quiet:
        yield lambda count: None
        return
    with console.status(title) as status:
        yield lambda count: status.update(f"{title}: {count:,}")


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


class ReaderGone(MicroclipError):
    """Whatever read stdout has ended, as `head` does; nothing to tell anybody."""

    exit_code = 141
    """128 + 13: what a shell reports of a program that SIGPIPE ends."""


class CheckedStdout:
    """Stands for sys.stdout; a failed write raises EnvironmentProblem or ReaderGone."""

    def __init__(self, stream: TextIO | None) -> None:
        """Take the stream; None where the process was started with stdout closed."""
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """Be the stream in everything else."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text.

        Raises:
            EnvironmentProblem: the disk is full, or stdout is closed.
            ReaderGone: the pipe is closed at its other end.
        """
        if text == "":  # how click learns what kind of stream this is; it hides any error
            return 0
        if self._stream is None:
            raise EnvironmentProblem("stdout could not be written: it is closed; open it")
        with _explained(self._stream):
            return self._stream.write(text)

    def flush(self) -> None:
        """Write what is buffered; raises as `write` does."""
        if self._stream is not None:
            with _explained(self._stream):
                self._stream.flush()


@contextmanager
def _explained(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        discard(stream)
        if isinstance(error, BrokenPipeError):
            raise ReaderGone("the reader of stdout is gone") from error
        raise EnvironmentProblem(
            f"stdout could not be written: {error.strerror or error}; free some space, or send it "
            "elsewhere"
        ) from error


def discard(stream: TextIO) -> None:
    """Let what is still buffered go nowhere: the interpreter tries again when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


@contextmanager
def checked_stdout() -> Iterator[None]:
    """Replace sys.stdout by a `CheckedStdout` and flush it at the end."""
    previous = sys.stdout
    checked = CheckedStdout(previous)
    sys.stdout = cast(TextIO, checked)
    try:
        yield
    except SystemExit:  # how a command ends, also after success
        checked.flush()
        raise
    except BaseException:
        with suppress(MicroclipError):  # the error on its way out matters more
            checked.flush()
        raise
    else:
        checked.flush()
    finally:
        sys.stdout = previous
