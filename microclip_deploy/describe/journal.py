"""What was asked and answered: one line a finished call, appended and never changed.

    {"key", "begun": {"in", "out"}}       a request is about to be sent; its worst case
    {"key", "class", "sentences", ...}    the call is finished; "usage" is of all its requests
    {"key", "failed", "usage"}            it gave nothing that could be used, and is made again

A kill leaves at most a torn last line, which is cut off, and requests that were begun: nobody knows
what they cost, so their worst case counts. Sentences stay on disk; in memory are only the places of
the lines.
"""

import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from microclip_deploy.artifact import exclusive, write_problem
from microclip_deploy.describe.budget import Usage
from microclip_deploy.errors import DataError, printable

Record = Mapping[str, Any]
"""A finished call."""


def journal_path(descriptions: Path) -> Path:
    """Return the journal beside a file of descriptions."""
    return descriptions.with_name(f"{descriptions.name.removesuffix('.jsonl')}.cache.jsonl")


class Journal:
    """A journal that is read, and written to if it was opened for it."""

    def __init__(self, path: Path, reader: IO[bytes], writer: int | None = None) -> None:
        """Read what there is; `read_journal` and `open_journal` make these.

        Args:
            path: what errors name.
            reader: at its begin.
            writer: descriptor that appends; None for a journal that is only read.

        Raises:
            DataError: a line that is none of ours; not the last, which a kill may have torn.
        """
        self._path, self._reader, self._writer = path, reader, writer
        self._places: dict[str, int] = {}
        self._begun: dict[str, Usage] = {}
        self.spent = Usage()
        """By all requests in it; those whose end is unknown with their worst case."""
        self._end = self._scan()
        if writer is not None:
            os.ftruncate(writer, self._end)

    def __contains__(self, key: object) -> bool:
        """Say whether a call is finished."""
        return key in self._places

    def __getitem__(self, key: str) -> Record:
        """Return a finished call."""
        self._reader.seek(self._places[key])
        record: Record = json.loads(self._reader.readline())
        return record

    def begin(self, key: str, worst: Usage) -> None:
        """Note that a request is about to be sent."""
        self._append({"key": key, "begun": worst.to_json()}, durable=False)

    def finish(self, record: Record) -> None:
        """Note a finished call; it is on the disk when this returns.

        Raises:
            EnvironmentProblem: it could not be written.
        """
        self._places[record["key"]] = self._append(record)

    def fail(self, key: str, reason: str, used: Usage) -> None:
        """Note that a call gave nothing that could be used."""
        self._append({"key": key, "failed": reason, "usage": used.to_json()})

    def close_begun(self) -> None:
        """Note for requests of a process that was killed that nobody knows their end."""
        for key, worst in self._begun.items():
            self.fail(key, "interrupted", worst)
        self._begun.clear()

    def _append(self, record: Record, *, durable: bool = True) -> int:
        """Write a line, wholly or not at all; return its place."""
        assert self._writer is not None, "opened to be read"
        place = self._end
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            while self._end < place + len(line):
                self._end += os.write(self._writer, line[self._end - place :])
            if durable:
                os.fsync(self._writer)
        except OSError as error:
            self._end = place
            with suppress(OSError):
                os.ftruncate(self._writer, place)
            raise write_problem(self._path, error) from error
        return place

    def _scan(self) -> int:
        """Learn where calls are and what was spent; return the end of the last whole line."""
        end = 0
        for number, line in enumerate(self._reader, start=1):
            try:
                if not line.endswith(b"\n"):
                    break
                self._learn(json.loads(line), end)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if not self._reader.read(1):
                    break
                raise DataError(
                    f"{printable(self._path)}, line {number}: expected an answer that `describe` "
                    f"noted, found something else ({type(error).__name__}); remove the line"
                ) from error
            end += len(line)
        for worst in self._begun.values():
            self.spent = self.spent.plus(worst)
        return end

    def _learn(self, record: Record, place: int) -> None:
        key = record["key"]
        if "begun" in record:
            self._begun[key] = self._begun.get(key, Usage()).plus(_usage(record["begun"]))
            return
        self._begun.pop(key, None)
        self.spent = self.spent.plus(_usage(record["usage"]))
        if "failed" not in record:
            self._places[key] = place


def _usage(counted: Mapping[str, int]) -> Usage:
    return Usage(int(counted["in"]), int(counted["out"]))


@contextmanager
def read_journal(path: Path) -> Iterator[Journal]:
    """Read a journal, if there is one, without keeping anybody from writing to it.

    Raises:
        DataError: it is damaged or cannot be read.
    """
    try:
        reader: IO[bytes] = path.open("rb") if path.exists() else io.BytesIO()
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    with reader:
        yield Journal(path, reader)


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Open a journal to continue it, or begin one; one process at a time.

    Raises:
        UsageError: another process writes to it.
        DataError: it is damaged.
        EnvironmentProblem: it cannot be written.
    """
    busy = f"expected one run at a time for {printable(path.name)}, found another; wait for it"
    with exclusive(path.parent, busy, f".{path.name}.lock"), ExitStack() as stack:
        try:
            writer = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            stack.callback(os.close, writer)
            reader = stack.enter_context(path.open("rb"))
        except OSError as error:
            raise write_problem(path, error) from error
        journal = Journal(path, reader, writer)
        journal.close_begun()
        yield journal
