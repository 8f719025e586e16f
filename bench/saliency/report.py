"""What `bench saliency` measured, as tables, a chart and one JSON document."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel

from microclip_deploy.artifact import write_bytes
from microclip_deploy.bench import document
from microclip_deploy.bench.saliency.overlap import SIZES, Mean
from microclip_deploy.bench.saliency.rules import METHOD, OBJECT
from microclip_deploy.bench.table_text import digits, percent
from microclip_deploy.evaluation.chart import bar_chart

SHOWN = (METHOD, "otsu, border", "otsu, cls", OBJECT)
"""Rules whose masks are told of images without a true mask."""

MEANING = {
    "rule": "ncut.threshold, ncut.side; the method's own first. otsu, better side: whichever side "
    "overlaps more with the true mask, the most that a rule for the side can reach. every token: "
    "the mask where the vector is undefined",
    "overlap": "intersection over union of the mask with the tokens that the object covers by more "
    "than half; mean over composites. ± is half of the 95 % interval, by resampling cut-outs, "
    "whose composites are alike; both ends are in the JSON",
    "gain": "the overlap less that of the method's rule with the same affinity, image by image",
    "found": "share of composites with an overlap over one half",
    "undefined": "share of images whose vector the rule cannot use, such as complete graphs: the "
    "mask is every token, and ncut.fallback decides what [FG] is",
    "tokens": "SOAP's effective number of tokens, exp of its attention's entropy, with its maps as "
    "they are before training",
    "fallback": 'cosine of [FG] and [CLS], with the method\'s masks. ncut.fallback = "all" fuses '
    'both also where the vector is undefined, and "cls" makes it 1 there',
}


class Row(BaseModel):
    """One affinity and rule on all composites."""

    affinity: str
    rule: str
    overlap: dict[str, Mean]
    """Size of the object -> intersection over union."""
    found: Mean
    gain: dict[str, Mean]
    """Size of the object -> what it has over the method's rule."""


class Facts(BaseModel):
    """What the cuts of some images are like."""

    of: str
    """"composites" or "photos"."""
    pixels: int
    affinity: str
    images: int
    tokens: int
    complete: float
    undefined: dict[str, float]
    """Rule -> share of images."""
    mask_share: dict[str, float]
    effective: dict[str, float]
    likeness: float | None
    likeness_undefined: float | None


class Report(BaseModel):
    """Everything one run measured."""

    benchmark: Literal["saliency"] = "saliency"
    encoder: str
    encoder_sha256: str
    date: str
    cutouts: int
    backgrounds: int
    composites: int
    seconds: float = 0.0
    environment: dict[str, Any] = {}
    meaning: dict[str, str] = MEANING
    rows: list[Row] = []
    facts: list[Facts] = []

    def row(self, affinity: str, rule: str) -> Row:
        """Return one row."""
        return next(row for row in self.rows if (row.affinity, row.rule) == (affinity, rule))


def plain(report: Report) -> str:
    """Return the tables for the terminal."""
    return document.plain(_tables(report), {})


def markdown(report: Report) -> str:
    """Return the tables, what they mean, and the machine."""
    pasted = f"{report.cutouts} cut-outs on {report.backgrounds} photos"
    what = f"{report.composites} composites of {pasted}"
    remarks = {
        "what is measured": [what, *(f"{name}: {text}" for name, text in report.meaning.items())]
    }
    title = f"Saliency on true masks, {report.encoder}, {report.date}"
    machine = {"encoder sha256": report.encoder_sha256, **report.environment}
    return document.markdown(title, _tables(report), remarks, machine)


def chart(report: Report) -> str:
    """Draw the overlap by size of the object, the method's as a mark on each bar; SVG."""
    bars = {}
    for affinity in dict.fromkeys(fact.affinity for fact in report.facts):
        method, found = (report.row(affinity, rule).overlap for rule in (METHOD, OBJECT))
        for size, mean in found.items():
            told = f"{mean.mean:.2f} (mark: the method, {method[size].mean:.2f})"
            bars[f"{affinity}, {size}"] = (mean.mean, method[size].mean, told)
    return bar_chart(bars)


def write_report(report: Report, pictures: Mapping[str, Image.Image], directory: Path) -> Path:
    """Write DATE-cpu-saliency.json, .md and .svg, and a .jpg a picture; return the JSON's path.

    The pictures show the user's photos, which may not be everybody's to pass on.
    """
    name = f"{report.date}-cpu-saliency"
    texts = {".md": markdown(report), ".svg": chart(report)}
    path = document.write_files(directory, name, report.model_dump(), texts)
    for of, picture in pictures.items():
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=80)
        write_bytes(directory / f"{name}-{of}.jpg", encoded.getvalue())
    return path


def _tables(report: Report) -> dict[str, list[list[str]]]:
    return {
        "overlap with the true mask, by the object's share of the frame": _overlap_rows(report),
        f"gain of {OBJECT} over the method": _gain_rows(report),
        "mask share and effective tokens": _fact_rows(report.facts),
        "the fallback: cosine of [FG] and [CLS]": _fallback_rows(report.facts),
    }


def _overlap_rows(report: Report) -> list[list[str]]:
    rows = [["affinity", "rule", *SIZES, "found"]]
    for row in report.rows:
        means = [row.overlap.get(size) for size in SIZES]
        rows.append([row.affinity, row.rule, *map(_mean, means), percent(row.found.mean)])
    images = report.rows[0].overlap
    counts = [str(images[size].images) if size in images else "0" for size in SIZES]
    return [*rows, ["", "composites", *counts, ""]]


def _gain_rows(report: Report) -> list[list[str]]:
    rows = [["affinity", *SIZES]]
    for row in report.rows:
        if row.rule == OBJECT:
            rows.append([row.affinity, *(_gain(row.gain.get(size)) for size in SIZES)])
    return rows


def _fact_rows(facts: Sequence[Facts]) -> list[list[str]]:
    shares, tokens = ([f"{what}: {rule}" for rule in SHOWN] for what in ("share", "tokens"))
    rows = [["images", "px", "affinity", "complete", "undefined", *shares, *tokens]]
    for fact in facts:
        cells = [f"{fact.images} {fact.of}", str(fact.pixels), fact.affinity]
        cells += [percent(fact.complete), percent(fact.undefined[OBJECT])]
        cells += [percent(fact.mask_share[rule]) for rule in SHOWN]
        rows.append([*cells, *(digits(fact.effective[rule]) for rule in SHOWN)])
    return rows


def _fallback_rows(facts: Sequence[Facts]) -> list[list[str]]:
    rows = [["images", "px", "affinity", "undefined", "cosine there", "cosine elsewhere"]]
    for fact in facts:
        likeness = (fact.likeness_undefined, fact.likeness)
        cells = ["–" if cosine is None else f"{cosine:.3f}" for cosine in likeness]
        undefined = percent(fact.undefined[METHOD])
        rows.append(
            [f"{fact.images} {fact.of}", str(fact.pixels), fact.affinity, undefined, *cells]
        )
    return rows


def _mean(mean: Mean | None) -> str:
    return "–" if mean is None else f"{mean.mean:.3f} ± {(mean.high - mean.low) / 2:.3f}"


def _gain(mean: Mean | None) -> str:
    return "–" if mean is None else f"{mean.mean:+.3f} ({mean.low:+.3f} to {mean.high:+.3f})"
