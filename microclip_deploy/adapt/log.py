"""metrics.jsonl, history.jsonl and TensorBoard events of a training run."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from microclip_deploy import artifact
from microclip_deploy.errors import CheckpointError

METRICS = "metrics.jsonl"
HISTORY = "history.jsonl"
BOARD = "tensorboard"


class TrainingLog:
    """Append-only logs that a resumed run continues where its state stands."""

    def __init__(self, directory: Path, iteration: int, epoch: int) -> None:
        """Open the logs and drop lines written after the state that is being resumed.

        Args:
            directory: the run directory.
            iteration: iterations done in all; later metrics are dropped.
            epoch: epochs finished; later history is dropped.

        Raises:
            CheckpointError: the history of the finished epochs is damaged or incomplete.
            EnvironmentProblem: the logs cannot be written.
        """
        self._metrics = directory / METRICS
        self._history = directory / HISTORY
        _keep(self._metrics, lambda line: line["iteration"] <= iteration)
        _keep(self._history, lambda line: line["epoch"] <= epoch)
        found = len(self.history())
        if found != epoch:
            raise CheckpointError(
                f"{self._history}: expected {epoch} finished epochs, found {found}; restore the "
                "file or start again with --overwrite"
            )
        self._board = _Board(directory / BOARD, iteration)

    def metrics(self, line: Mapping[str, float]) -> None:
        """Log one iteration; `line` holds "iteration" and numbers."""
        _append(self._metrics, line)
        for name, value in line.items():
            if name != "iteration":
                self._board.scalar(f"train/{name}", value, int(line["iteration"]))

    def epoch(self, line: Mapping[str, Any]) -> None:
        """Log one finished epoch; `line` holds "epoch", "iteration" and what was measured."""
        _append(self._history, line)
        numbers = {**line, **(line.get("validation") or {})}
        for name, value in numbers.items():
            if isinstance(value, int | float) and name not in ("epoch", "iteration"):
                self._board.scalar(f"epoch/{name}", value, int(line["iteration"]))

    def history(self) -> list[dict[str, Any]]:
        """Return the finished epochs, oldest first."""
        return read_history(self._history)

    def close(self) -> None:
        """Close the event file; everything was written when it was logged."""
        self._board.close()


class _Board:
    """A TensorBoard event file written at once, without the library's background thread.

    That thread meets a full disk on its own and answers with a traceback.
    """

    def __init__(self, directory: Path, iteration: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # One file a session; the number keeps them in TensorBoard's reading order.
        self._path = directory / f"events.out.tfevents.{int(time.time()):010d}.{iteration:09d}"
        try:
            directory.mkdir(exist_ok=True)
            self._file = open(self._path, "ab")  # noqa: SIM115 - open for the whole run
        except OSError as error:
            raise artifact.write_problem(directory, error) from error
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        started = SessionLog(status=SessionLog.START)  # hides what came after the resumed state
        self._write(Event(wall_time=time.time(), step=iteration + 1, session_log=started))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Write one number."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        try:
            self._records.write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            raise artifact.write_problem(self._path, error) from error


def _append(path: Path, line: Mapping[str, Any]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise artifact.write_problem(path, error) from error


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    if path.is_file():
        kept = [line for line in read_history(path) if wanted(line)]
        artifact.write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, oldest first; none where there is no file.

    A last line without its line break was cut short by a kill while it was written, and is left
    out.

    Raises:
        CheckpointError: the file cannot be read, or a line is no JSON object; names the line.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: expected one JSON object a line in UTF-8, found: {error}; restore the file"
        ) from error
    complete = text.split("\n")[:-1]
    return [
        _object(path, number, line) for number, line in enumerate(complete, start=1) if line.strip()
    ]


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise _damaged(path, number, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, number, type(value).__name__)
    return value


def _damaged(path: Path, number: int, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}, line {number}: expected a JSON object, found: {found}; repair the line, or "
        "restore the file"
    )
