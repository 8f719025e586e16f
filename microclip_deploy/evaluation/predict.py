"""Images in, named predictions out: as objects, a table, CSV, JSON, JSON Lines or overlays.

`serving.classification` says what the probabilities are.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray

from microclip_deploy import artifact
from microclip_deploy.data.decode import BadImage
from microclip_deploy.data.photo import Remarks
from microclip_deploy.data.sources import ImageBatch, ImageSet, list_sources, read_batches
from microclip_deploy.errors import DataError, UsageError, printable
from microclip_deploy.serving import Prediction, Session
from microclip_deploy.serving.classification import Guess, guesses
from microclip_deploy.serving.overlay import overlay

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 5  # bad files the error message lists

_DAGGER = "†"

# A cell that starts like this is a formula to spreadsheet programs, also behind blanks.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


@dataclass(frozen=True, eq=False)
class ImagePrediction:
    """What the model says about one image."""

    index: int
    """Position among all files given."""
    path: Path
    top: tuple[Guess, ...]
    """Most probable first."""
    cls_top1: str
    """The best class by [CLS] alone."""
    fg_top1: str
    """The best class by [FG] alone; where it differs from `cls_top1` the two tokens disagree."""
    mask: NDArray[np.bool_]
    """(N,), row-major token grid."""
    attention: NDArray[np.float32]
    """(N+1,); the last entry is the zero token's."""
    complete: bool
    """The saliency graph joins every pair of tokens: the mask says nothing."""
    view: NDArray[np.uint8]
    """(S, S, 3): the pixels the model saw, before normalisation."""


@dataclass(frozen=True)
class FailedImage:
    """A file that could not be read as an image."""

    index: int
    path: Path
    reason: str


Result = ImagePrediction | FailedImage


def predict(
    session: Session,
    sources: Sequence[Path] | ImageSet,
    top_k: int = 5,
    *,
    batch_size: int = 64,
    remarks: Remarks | None = None,
) -> Iterator[Result]:
    """Classify images one batch at a time, in the order of the sources.

    Args:
        session: an open model; stays open.
        sources: images, folders or lists, as for `sources.list_sources`, or what it returned.
        top_k: how many classes an image; all of them if there are fewer.
        batch_size: images a batch.
        remarks: gets what reading the images tells.

    Returns:
        One result a file; unreadable files are results too.

    Raises:
        DataError: a source holds nothing (at once), or no file at all could be read (at the end).
        UsageError: `top_k` or `batch_size` below 1.
    """
    if top_k < 1 or batch_size < 1:
        raise UsageError(
            f"--top-k and --batch-size: expected at least 1, found {top_k} and {batch_size}; "
            "give others"
        )
    listed = sources if isinstance(sources, ImageSet) else list_sources(sources)
    if not listed.paths:
        raise UsageError("predict: expected images, folders or lists, found none; name some")
    return _results(session, listed.paths, top_k, batch_size, remarks)


def _results(
    session: Session,
    paths: Sequence[Path],
    top_k: int,
    batch_size: int,
    remarks: Remarks | None,
) -> Iterator[Result]:
    """Yield results in order; bad images are told between the good ones they lie between."""
    bad: list[FailedImage] = []
    told = 0

    def failed(index: int, error: BadImage) -> None:
        bad.append(FailedImage(index, error.path, error.reason))

    batches = read_batches(paths, session.preprocess, batch_size, on_bad=failed, remarks=remarks)
    for batch in batches:
        for result in _predictions(session, paths, batch, top_k):
            while told < len(bad) and bad[told].index < result.index:
                yield bad[told]
                told += 1
            yield result
    yield from bad[told:]
    if len(bad) == len(paths):
        shown = "; ".join(f"{printable(file.path)} ({file.reason})" for file in bad[:_SHOWN])
        raise DataError(
            f"predict: expected readable images, found none in {len(paths)} files: {shown}; "
            "repair them or name others"
        )


def _predictions(
    session: Session, paths: Sequence[Path], batch: ImageBatch, top_k: int
) -> Iterator[ImagePrediction]:
    found = session.predict(batch.images)
    ranked = guesses(session, found.logits, top_k)
    cls_best, fg_best = _best_of_tokens(session, found)
    names = session.classes
    for row, (index, top) in enumerate(zip(batch.indices.tolist(), ranked, strict=True)):
        yield ImagePrediction(
            index=index,
            path=paths[index],
            top=top,
            cls_top1=names[cls_best[row]],
            fg_top1=names[fg_best[row]],
            mask=found.mask[row],
            attention=found.attention[row],
            complete=bool(found.complete[row]),
            view=batch.images[row],
        )


def _best_of_tokens(
    session: Session, found: Prediction
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    classifier = session.classifier()
    return (found.cls @ classifier.T).argmax(axis=1), (found.fg @ classifier.T).argmax(axis=1)


class CsvWriter:
    """One row an image: path, error, the top classes, both tokens' classes, and the mask share.

    The last column, `unadapted`, names those of the top classes that were added after the
    adaptation, most probable first, joined by "; ". It is empty where all are adapted.

    Safe for spreadsheet programs: a text that would be a formula gets a leading apostrophe.
    Commas, quotes and line breaks are quoted; bytes of a name that are no UTF-8 become escapes.
    """

    def __init__(self, stream: IO[str], top_k: int) -> None:
        """Write the header; open files with newline="" and encoding="utf-8"."""
        self._rows = csv.writer(stream, lineterminator="\n")
        self._top_k = top_k
        guesses = [f"{part}_{i + 1}" for i in range(top_k) for part in ("class", "probability")]
        others = ("cls_class", "fg_class", "mask_share", "complete_graph", "unadapted")
        self._rows.writerow(["path", "error", *guesses, *others])

    def write(self, result: Result) -> None:
        """Write one row."""
        name = _cell(os.fsencode(result.path).decode("utf-8", "backslashreplace"))
        if isinstance(result, FailedImage):
            self._rows.writerow([name, _cell(result.reason), *[""] * (2 * self._top_k + 5)])
            return
        guesses = [x for g in result.top for x in (_cell(g.name), f"{g.probability:.6f}")]
        padding = [""] * (2 * self._top_k - len(guesses))
        share = f"{result.mask.mean():.4f}"
        tokens = (_cell(result.cls_top1), _cell(result.fg_top1), share, int(result.complete))
        unadapted = _cell("; ".join(g.name for g in result.top if not g.adapted))
        self._rows.writerow([name, "", *guesses, *padding, *tokens, unadapted])


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
    output_format: Literal["csv", "json", "jsonl"], stream: IO[str], top_k: int
) -> Iterator[CsvWriter | JsonLinesWriter | JsonWriter]:
    """Give the writer of a format; what it writes is complete when the context ends."""
    if output_format == "csv":
        yield CsvWriter(stream, top_k)
    elif output_format == "jsonl":
        yield JsonLinesWriter(stream)
    else:
        with JsonWriter(stream) as writer:
            yield writer


class OverlayWriter:
    """One PNG an image: the mask and the attention drawn on what the model saw."""

    def __init__(self, directory: Path, scale: int = 2) -> None:
        """Make the folder.

        Raises:
            EnvironmentProblem: it cannot be made.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise artifact.write_problem(directory, error) from error
        self._directory = directory
        self._scale = scale

    def write(self, result: Result) -> None:
        """Write INDEX-NAME.png; nothing for a failed image.

        Raises:
            EnvironmentProblem: the disk is full or the folder cannot be written.
        """
        if isinstance(result, FailedImage):
            return
        buffer = io.BytesIO()
        picture = overlay(result.view, result.mask, result.attention, self._scale)
        picture.save(buffer, "PNG")
        artifact.write_bytes(self._directory / overlay_name(result), buffer.getvalue())


def overlay_name(result: Result) -> str:
    """Return a file name that is unique in its run and plain on every system."""
    kept = "".join(c if c.isalnum() and c.isascii() else "-" for c in result.path.stem)
    return f"{result.index:06d}-{kept[:60].strip('-') or 'image'}.png"


def to_json(result: Result) -> dict[str, object]:
    """Return plain values: what JSON holds of a result."""
    if isinstance(result, FailedImage):
        return {"path": str(result.path), "error": result.reason}
    return {
        "path": str(result.path),
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
    }


def _json_text(result: Result) -> str:
    text = json.dumps(to_json(result), ensure_ascii=False, allow_nan=False)
    # A lone surrogate has no UTF-8 form; its backslash escape is valid JSON.
    return text.encode("utf-8", "backslashreplace").decode()


def table(results: Iterable[Result], on_result: Callable[[Result], None] | None = None) -> "Table":
    """Return a terminal table of the results; keep their number small.

    Args:
        results: what `predict` returns.
        on_result: told about each result as it comes, such as `OverlayWriter.write`.
    """
    from rich.table import Table
    from rich.text import Text

    caption = "probabilities are not calibrated; * [CLS] and [FG] disagree"
    unadapted = f"\n{_DAGGER} added after the adaptation: its accuracy is zero-shot"
    found = Table(caption=caption)
    found.add_column("image", overflow="fold")
    found.add_column("class")
    found.add_column("probability", justify="right")
    found.add_column("runners-up", overflow="fold")
    for result in results:
        if on_result is not None:
            on_result(result)
        name = Text(printable(result.path))
        if isinstance(result, FailedImage):
            found.add_row(name, Text(f"skipped: {result.reason}", style="yellow"))
            continue
        first, *others = result.top
        mark = " *" if result.cls_top1 != result.fg_top1 else ""
        rest = ", ".join(f"{_marked(g)} {g.probability:.2f}" for g in others)
        best = Text(_marked(first) + mark, style="bold")
        found.add_row(name, best, f"{first.probability:.3f}", Text(rest))
        if not all(guess.adapted for guess in result.top):
            found.caption = caption + unadapted
    return found


def _marked(guess: Guess) -> str:
    return printable(guess.name) + ("" if guess.adapted else _DAGGER)


def _cell(text: str) -> str:
    """Return the text, defused if a spreadsheet program would take it for a formula."""
    starts = text.lstrip(" \u00a0").startswith(_FORMULA_STARTS)
    return f"'{text}" if starts else text
