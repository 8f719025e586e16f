"""metrics.jsonl, history.jsonl and TensorBoard of a training run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from microclip_deploy import artifact


class TrainingLog:
    """Append-only logs that a resumed run continues where its state stands."""

    def __init__(self, directory: Path, iteration: int, epoch: int) -> None:
        """Open the logs and drop lines written after the state that is being resumed.

        Args:
            directory: the run directory.
            iteration: iterations done in all; later metrics are dropped.
            epoch: epochs finished; later history is dropped.
        """
        self._metrics = directory / "metrics.jsonl"
        self._history = directory / "history.jsonl"
        _keep(self._metrics, lambda line: line["iteration"] <= iteration)
        _keep(self._history, lambda line: line["epoch"] <= epoch)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=iteration + 1)

    def metrics(self, line: Mapping[str, float]) -> None:
        """Log one iteration; `line` holds "iteration" and numbers."""
        _append(self._metrics, line)
        for name, value in line.items():
            if name != "iteration":
                self._board.add_scalar(f"train/{name}", value, int(line["iteration"]))

    def epoch(self, line: Mapping[str, Any]) -> None:
        """Log one finished epoch; `line` holds "epoch", "iteration" and what was measured."""
        _append(self._history, line)
        numbers = {**line, **(line.get("validation") or {})}
        for name, value in numbers.items():
            if isinstance(value, int | float) and name not in ("epoch", "iteration"):
                self._board.add_scalar(f"epoch/{name}", value, int(line["iteration"]))

    def history(self) -> list[dict[str, Any]]:
        """Return the finished epochs, oldest first."""
        return _lines(self._history)

    def close(self) -> None:
        """Flush everything to disk."""
        self._board.close()


def _append(path: Path, line: Mapping[str, Any]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
    except OSError as error:
        raise artifact.write_problem(path, error) from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read complete lines; a kill may have cut the last one short."""
    if not path.is_file():
        return []
    text = path.read_text("utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _keep(path: Path, wanted: Any) -> None:
    if path.is_file():
        kept = [line for line in _lines(path) if wanted(line)]
        artifact.write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
