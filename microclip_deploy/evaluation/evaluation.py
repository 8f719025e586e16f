"""The outcome of an evaluation: as JSON, as tables for a terminal, and image by image as CSV."""

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from microclip_deploy.calibration import FOLDER
from microclip_deploy.data.sources import BadFile
from microclip_deploy.errors import printable
from microclip_deploy.evaluation.comparison import Comparison
from microclip_deploy.evaluation.masks import MaskFacts
from microclip_deploy.evaluation.records import cell, file_name
from microclip_deploy.evaluation.reliability import Reliability
from microclip_deploy.evaluation.scores import TOP, Scores

if TYPE_CHECKING:
    from rich.table import Table

EVALUATION = "evaluation.json"
"""File name of `Evaluation.to_json` beside a checkpoint; the report shows it when it is there."""

JOINT = "joint"
"""Token of the row where all images together say what each of them shows."""
JOINT_REMARK = (
    "joint: read from all images together; not comparable with accuracies of single photos"
)

_PAIRS = 10  # confused pairs that are shown


class Row(NamedTuple):
    """One line of the comparison."""

    model: str
    """"adapted" or "zero-shot"."""
    token: str
    """"fused", "cls", "fg", or "joint": `JOINT_REMARK`."""
    texts: str
    """"adapted", "names", "descriptions", "prior" or a control: the class matrix. Of a
    control that is drawn the mean over the draws."""
    scores: Scores


class Answer(NamedTuple):
    """What the adapted model's fused logits say about one labelled image."""

    path: Path
    label: int
    """Index of the right class."""
    predicted: int
    """Index of the best class."""
    probability: float
    """Of the best class, as the model is calibrated."""
    unknown: bool = False
    """It is below the model's threshold."""


class Confusion(NamedTuple):
    """Images of one class that are taken for another."""

    label: int
    predicted: int
    images: int


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `evaluate`."""

    classes: tuple[str, ...]
    images: int
    bad: tuple[BadFile, ...]
    rows: tuple[Row, ...]
    masks: MaskFacts
    answers: tuple[Answer, ...] = field(repr=False)
    """One an image that could be read."""
    data: str = ""
    """Absolute path of the labelled images."""
    warnings: tuple[str, ...] = field(default=())
    left_out: Mapping[str, Any] = field(default_factory=dict)
    """Files that were not taken for images, as `LeftOut.to_json`."""
    controls: tuple[Comparison, ...] = ()
    """The descriptions beside texts that say nothing, if that was asked for."""
    reliability: Reliability | None = None
    prior: str = FOLDER
    """The class frequencies that were expected, as for `Session.expect`."""

    def row(self, model: str, token: str, texts: str) -> Scores | None:
        """Return the scores of a row, or None if it was not measured."""
        wanted = (model, token, texts)
        return next((row.scores for row in self.rows if row[:3] == wanted), None)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Return what must be said of the rows."""
        return (JOINT_REMARK,) if any(row.token == JOINT for row in self.rows) else ()

    @cached_property
    def confusions(self) -> tuple[Confusion, ...]:
        """Return which classes were taken for which, the most images first."""
        pairs = Counter((a.label, a.predicted) for a in self.answers if a.label != a.predicted)
        order = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
        return tuple(Confusion(*pair, images) for pair, images in order)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; file names are made printable."""
        fused = self.row("adapted", "fused", "adapted")
        assert fused is not None, "the adapted model is always measured"
        before = self.row("zero-shot", "cls", "names")
        per_class = [
            {
                "class": name,
                "images": fused.class_images[i],
                "correct": fused.class_correct[i],
                "zero_shot_correct": before.class_correct[i] if before else None,
            }
            for i, name in enumerate(self.classes)
        ]
        confusions = [
            {"class": self.classes[c.label], "predicted": self.classes[c.predicted], "images": c[2]}
            for c in self.confusions
        ]
        return {
            "data": printable(self.data),
            "images": self.images,
            "bad": [{"path": printable(f.path), "reason": f.reason} for f in self.bad],
            "rows": [
                {"model": r.model, "token": r.token, "texts": r.texts, **r.scores.summary()}
                for r in self.rows
            ],
            "complete_graphs": self.masks.complete,
            "whole_image_masks": self.masks.whole,
            "mask_share": self.masks.share,
            "masks": self.masks.to_json(),
            "per_class": per_class,
            "confusions": confusions,
            "warnings": list(self.warnings),
            "remarks": list(self.remarks),
            "left_out": self.left_out,
            "controls": [comparison.to_json() for comparison in self.controls],
            "reliability": self.reliability.to_json() if self.reliability else None,
            "prior": self.prior,
        }

    def tables(self, *, per_class: bool = False) -> list["Table"]:
        """Return what a terminal shows.

        Args:
            per_class: also one line a class.

        Returns:
            The comparison, the most confused classes if any are, and the classes if asked for.
        """
        confused = [_confusion_table(self)] if self.confusions else []
        return [_comparison(self), *confused, *([_class_table(self)] if per_class else [])]


def write_answers(stream: IO[str], result: Evaluation) -> None:
    """Write one CSV row an image, under a header.

    Images that could not be read come last, with the reason as their error. Cells are as in
    `records.CsvWriter`.
    """
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(("path", "label", "prediction", "probability", "correct", "error", "unknown"))
    for image, label, predicted, probability, unknown in result.answers:
        names = [cell(result.classes[label]), cell(result.classes[predicted])]
        told = [f"{probability:.6f}", int(label == predicted), "", int(unknown)]
        rows.writerow([cell(file_name(image)), *names, *told])
    for image, reason in result.bad:
        rows.writerow([cell(file_name(image)), "", "", "", "", cell(reason), ""])


def _comparison(result: Evaluation) -> "Table":
    from rich.table import Table
    from rich.text import Text

    notes = [f"{result.images} images, {len(result.bad)} unreadable", *result.masks.lines()]
    notes += [f"prior: {printable(result.prior)}"] * (result.prior != FOLDER)
    notes += result.reliability.lines() if result.reliability else []
    notes += result.remarks
    notes += [control.sentence() for control in result.controls if control.beaten]
    notes += [f"warning: {warning}" for warning in result.warnings]
    table = Table(title="accuracy", caption=Text("\n".join(notes)), caption_justify="left")
    for heading in ("model", "token", "texts"):
        table.add_column(heading)
    for heading in ("top-1 %", f"top-{TOP} %", "mean per class %"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        values = [f"{100 * value:.2f}" for value in row.scores.summary().values()]
        table.add_row(row.model, row.token, row.texts, *values, style=_row_style(row))
    return table


def _row_style(row: Row) -> str:
    return (
        "bold"
        if row[:3] in (("adapted", "fused", "adapted"), ("zero-shot", "cls", "names"))
        else ""
    )


def _confusion_table(result: Evaluation) -> "Table":
    from rich.table import Table
    from rich.text import Text

    more = len(result.confusions) - _PAIRS
    caption = f"and {more} more pairs, in --json" if more > 0 else None
    table = Table(title="most confused classes", caption=caption, caption_justify="left")
    table.add_column("class", overflow="fold")
    table.add_column("taken for", overflow="fold")
    table.add_column("images", justify="right")
    of = Counter(answer.label for answer in result.answers)
    for label, predicted, images in result.confusions[:_PAIRS]:
        names = (Text(printable(result.classes[c])) for c in (label, predicted))
        table.add_row(*names, f"{images} of {of[label]}")
    return table


def _class_table(result: Evaluation) -> "Table":
    from rich.table import Table
    from rich.text import Text

    lines = result.to_json()["per_class"]
    absent = sum(line["images"] == 0 for line in lines)
    caption = f"and {absent} classes without images" if absent else None
    table = Table(title="top-1 by class, adapted fused", caption=caption, caption_justify="left")
    table.add_column("class", overflow="fold")
    for heading in ("images", "correct", "%", "zero-shot correct"):
        table.add_column(heading, justify="right")
    for line in lines:
        images, correct, before = line["images"], line["correct"], line["zero_shot_correct"]
        if images:
            share = f"{100 * correct / images:.1f}"
            counts = (str(images), str(correct), share, "-" if before is None else str(before))
            table.add_row(Text(printable(line["class"])), *counts)
    return table
