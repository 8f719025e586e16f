"""How predictions are written: CSV, JSON, JSON Lines, or a table for a terminal.

All but the table are UTF-8 whatever the locale says.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Literal, Self

from microclip_deploy.data.text_file import cell as cell
from microclip_deploy.errors import DataError, as_url, printable
from microclip_deploy.evaluation.predict import FailedImage, Result
from microclip_deploy.serving.classification import Guess

if TYPE_CHECKING:
    from rich.table import Table

_DAGGER = "†"


class CsvWriter:
    """One row an image: path, error, the top classes, both tokens' classes, and the mask share.

    `unknown` is 1 where the best class is less probable than the model's threshold.
    The column `unadapted` names those of the top classes that were added after the adaptation,
    most probable first, joined by "; ". It is empty where all are adapted. With overlays a
    column tells the file of each. Of a joint reading a last column, `joint_alone_class`, holds the
    best class of the photo alone.

    Safe for spreadsheet programs: a text that would be a formula gets a leading apostrophe.
    Commas, quotes and line breaks are quoted; bytes of a name that are no UTF-8 become escapes.
    """

    def __init__(
        self, stream: IO[str], top_k: int, *, overlays: bool = False, joint: bool = False
    ) -> None:
        """Write the header; open files with newline="" and encoding="utf-8"."""
        self._rows = csv.writer(stream, lineterminator="\n")
        self._top_k = top_k
        guesses = [f"{part}_{i + 1}" for i in range(top_k) for part in ("class", "probability")]
        others = ["cls_class", "fg_class", "mask_share", "complete_graph", "unknown"]
        others += ["unadapted"]
        self._overlays, self._joint = overlays, joint
        others += ["overlay"] * overlays + ["joint_alone_class"] * joint
        self._width = len(guesses) + len(others)
        self._rows.writerow(["path", "error", *guesses, *others])

    def write(self, result: Result) -> None:
        """Write one row."""
        name = cell(file_name(result.path))
        if isinstance(result, FailedImage):
            self._rows.writerow([name, cell(result.reason), *[""] * self._width])
            return
        guesses = [x for g in result.top for x in (cell(g.name), f"{g.probability:.6f}")]
        padding = [""] * (2 * self._top_k - len(guesses))
        share = f"{result.mask.mean():.4f}"
        tokens = (cell(result.cls_top1), cell(result.fg_top1), share, int(result.complete))
        unknown = int(result.unknown)
        unadapted = cell("; ".join(g.name for g in result.top if not g.adapted))
        drawn = [cell(file_name(result.overlay)) if result.overlay else ""] * self._overlays
        alone = [cell(result.alone or "")] * self._joint
        last = (unknown, unadapted, *drawn, *alone)
        self._rows.writerow([name, "", *guesses, *padding, *tokens, *last])


class JsonLinesWriter:
    """One JSON object a line; undecodable bytes of a name stay as JSON's own escapes."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, result: Result) -> None:
        """Write one line."""
        self._stream.write(_json_text(result) + "\n")


class JsonWriter:
    """One JSON array, an object an image, written as the results come; close it to complete it.

    As a context manager it is closed at the end, also where the end is that no image could be read.
    After any other error the array stays open, and so cannot be taken for all results.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._before = "[\n"

    def write(self, result: Result) -> None:
        """Write one element."""
        self._stream.write(self._before + _json_text(result))
        self._before = ",\n"

    def close(self) -> None:
        """End the array."""
        self._stream.write("[]\n" if self._before == "[\n" else "\n]\n")

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the array if all results were told."""
        if kind is None or issubclass(kind, DataError):
            self.close()


@contextmanager
def open_writer(
    output_format: Literal["csv", "json", "jsonl"],
    stream: IO[str],
    top_k: int,
    *,
    overlays: bool = False,
    joint: bool = False,
) -> Iterator[CsvWriter | JsonLinesWriter | JsonWriter]:
    """Give the writer of a format; what it writes is complete when the context ends."""
    if output_format == "csv":
        yield CsvWriter(stream, top_k, overlays=overlays, joint=joint)
    elif output_format == "jsonl":
        yield JsonLinesWriter(stream)
    else:
        with JsonWriter(stream) as writer:
            yield writer


def to_json(result: Result) -> dict[str, object]:
    """Return plain values: what JSON holds of a result."""
    path = file_name(result.path, "surrogateescape")
    if isinstance(result, FailedImage):
        return {"path": path, "error": result.reason}
    drawn = {"overlay": file_name(result.overlay, "surrogateescape")} if result.overlay else {}
    return {
        "path": path,
        "error": None,
        "top": [
            {
                "class": g.name,
                "probability": round(g.probability, 6),
                "logit": round(g.logit, 4),
                "adapted": g.adapted,
            }
            for g in result.top
        ],
        "cls_class": result.cls_top1,
        "fg_class": result.fg_top1,
        "mask_share": round(float(result.mask.mean()), 4),
        "complete_graph": result.complete,
        "unknown": result.unknown,
        **drawn,
        **({} if result.alone is None else {"joint": {"alone_class": result.alone}}),
    }


def _json_text(result: Result) -> str:
    text = json.dumps(to_json(result), ensure_ascii=False, allow_nan=False)
    # A lone surrogate has no UTF-8 form; its backslash escape is valid JSON.
    return text.encode("utf-8", "backslashreplace").decode()


def table(results: Iterable[Result]) -> "Table":
    """Return a terminal table of what `predict` returns; keep the number of results small."""
    from rich.table import Table
    from rich.text import Text

    caption = "* [CLS] and [FG] disagree"
    joint = "\njoint: read from all photos together, not from each alone"
    unadapted = f"\n{_DAGGER} added after the adaptation: its accuracy is zero-shot"
    found = Table(caption=caption)
    found.add_column("image", overflow="fold")
    found.add_column("class", overflow="fold")
    found.add_column("probability", justify="right")
    found.add_column("runners-up", overflow="fold")
    for result in results:
        name = Text(printable(result.path))
        if isinstance(result, FailedImage):
            found.add_row(name, Text(f"skipped: {result.reason}", style="yellow"))
            continue
        first, *others = result.top
        mark = " *" if result.cls_top1 != result.fg_top1 else ""
        rest = ", ".join(f"{_marked(g)} {g.probability:.2f}" for g in others)
        guess = _marked(first) + mark
        best = Text(f"unknown (best guess {guess})" if result.unknown else guess, style="bold")
        found.add_row(name, best, f"{first.probability:.3f}", Text(rest))
        if result.alone is not None and not caption.endswith(joint):
            found.caption = caption = caption + joint
        if not all(guess.adapted for guess in result.top):
            found.caption = caption + unadapted
    return found


def _marked(guess: Guess) -> str:
    return printable(guess.name) + ("" if guess.adapted else _DAGGER)


def file_name(
    path: Path, undecodable: Literal["backslashreplace", "surrogateescape"] = "backslashreplace"
) -> str:
    r"""Return the name a file has on disk, taken for UTF-8 whatever the locale says.

    Args:
        path: any path.
        undecodable: what stands for bytes that are no UTF-8: \xff, or a lone surrogate, whose
            JSON escape reads back as the same name.
    """
    return as_url(os.fsencode(path).decode("utf-8", undecodable))
