"""stdout whose failures are errors of ours, so that results never end short in silence."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from microclip_deploy.errors import EnvironmentProblem, MicroclipError


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
