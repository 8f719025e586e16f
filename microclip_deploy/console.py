"""The console: results on stdout, whose failures are errors; everything else on stderr.

A full disk or a closed pipe must never end results short in silence. What programs read is always
UTF-8; people see escapes in place of what their terminal cannot show. Progress is a live bar in a
terminal, a line now and then elsewhere.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.spinner import Spinner
from rich.text import Text

from microclip_deploy.errors import EnvironmentProblem, MicroclipError, printable

_QUIET_INTERVAL_S = 15.0
"""Seconds between two lines where there is no terminal."""

_SHOWN = 5  # skipped files that are named

notes = Console(stderr=True, highlight=False, soft_wrap=True)
"""Everything that is no result."""
out = Console(highlight=False)
"""Results."""


def machine_stdout() -> TextIO:
    """Return stdout for what programs read: UTF-8, whatever the terminal or the locale says."""
    _encode(sys.stdout, encoding="utf-8")
    return sys.stdout


def print_json(value: Any) -> None:
    """Print one line of JSON; the last line of stdout."""
    stream = machine_stdout()
    stream.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()


def _encode(stream: TextIO, **changed: str) -> None:
    """Let a stream escape what its encoding lacks; streams that only tests have stay as they are.

    A lone surrogate, which stands for a byte of a file name, has no UTF-8 form either.
    """
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace", **changed)


def tell_skipped(
    bad: Sequence[tuple[Path, str]], console: Console, listed: Path | None = None
) -> None:
    """Name the first files that could not be read, each with the reason, and count all.

    Args:
        bad: files and reasons.
        console: where to.
        listed: a file that names all of them.
    """
    for path, reason in bad[:_SHOWN]:
        console.print(f"skipped: {printable(path)}: {reason}", style="yellow", markup=False)
    if bad and (listed or len(bad) > _SHOWN):
        where = f", listed in {printable(listed)}" if listed else ""
        files = "1 file" if len(bad) == 1 else f"{len(bad)} files in all"
        console.print(f"skipped: {files}{where}", style="yellow", markup=False)


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

    def __init__(self, console: Console, title: str, unit: str, live: Progress | None) -> None:
        self._console = console
        self._title = title
        self._unit = unit
        self._live = live
        self._task = live.add_task(title, total=None, note="") if live else None
        # A resumed adaptation, which tells its own rate, does not begin at 0.
        self._begin = (time.monotonic(), 0) if unit else None
        self._next_line = time.monotonic() + _QUIET_INTERVAL_S

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` steps are behind us."""
        now = time.monotonic()
        since, first = self._begin = self._begin or (now, done)
        rate = (done - first) / (now - since) if done > first and now > since else None
        if self._unit and rate:
            note = f"{rate:.{0 if rate >= 10 else 1}f} {self._unit}/s  {note}".rstrip()
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, total=total, note=note)
        elif now >= self._next_line or done == total:
            self._next_line = now + _QUIET_INTERVAL_S
            left = f"  {_clock((total - done) / rate)} left" if rate and done < total else ""
            line = f"{self._title}: {done}/{total}{left}  {note}".rstrip()
            self._console.print(line, highlight=False, markup=False)


def _clock(seconds: float) -> str:
    """Return 1:05 or 2:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _TimeLeft(TimeRemainingColumn):
    """1:05 left; in the end the time it took, and nothing before the first step."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text()
        return super().render(task) + ("" if task.finished else " left")


class _Count(MofNCompleteColumn):
    """3/20, and nothing before the first step."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


@contextmanager
def bar(console: Console, title: str, unit: str = "") -> Iterator[Bar]:
    """Open a progress bar on `console`.

    Args:
        console: `notes`; stdout stays free for results.
        title: what is done.
        unit: what the steps are, such as "images", to tell how many a second; '' tells no rate.
    """
    if not _is_live(console):
        yield Bar(console, title, unit, None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        _Count(),
        _TimeLeft(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, redirect_stdout=False) as live:
        try:
            yield Bar(console, title, unit, live)
        finally:
            for task in live.tasks:  # what ended before its first step leaves no empty bar
                task.visible = task.total is not None


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Show in a terminal, while the block lasts, what is waited for."""
    if not _is_live(console):
        yield
        return
    with Live(Spinner("line", Text(what)), console=console, transient=True, redirect_stdout=False):
        yield


def _is_live(console: Console) -> bool:
    """Say whether lines can be drawn again: not in a file, and not in a terminal like Emacs's."""
    return console.is_terminal and not console.is_dumb_terminal and not console.quiet


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

    def reconfigure(self, **changed: str) -> None:
        """Change how text is encoded, after writing what is buffered; raises as `write` does."""
        stream = self._stream
        if stream is not None and hasattr(stream, "reconfigure"):
            with _explained(stream):
                stream.reconfigure(**changed)


class TolerantStderr:
    """Stands for sys.stderr; where it cannot be written any more, a long run goes on in silence."""

    def __init__(self, stream: TextIO) -> None:
        """Take the stream."""
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """Be the stream in everything else."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        try:
            return self._stream.write(text)
        except OSError:
            discard(self._stream)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        try:
            self._stream.flush()
        except OSError:
            discard(self._stream)


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
    _encode(sys.stdout)
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


@contextmanager
def tolerant_stderr() -> Iterator[None]:
    """Replace sys.stderr by a `TolerantStderr`, unless it is closed: that all others cope with."""
    previous = sys.stderr
    if previous is not None:
        sys.stderr = cast(TextIO, TolerantStderr(previous))
    try:
        yield
    finally:
        sys.stderr = previous
