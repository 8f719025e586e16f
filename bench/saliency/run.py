"""`microclip-deploy bench saliency`: every rule of the cut against true masks.

Composites whose object is known are encoded once; all thresholds, sides and affinities then see the
same tokens. Ordinary photos, which have no true mask, tell at several sizes how often the cut is
undefined, how much the masks cover, and how many tokens SOAP looks at.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from microclip_deploy.bench.card import environment
from microclip_deploy.bench.saliency.composites import Composites, compose, read_cutouts
from microclip_deploy.bench.saliency.overlap import FOUND, Sizes
from microclip_deploy.bench.saliency.report import Facts, Report, Row
from microclip_deploy.bench.saliency.rules import (
    AFFINITIES,
    METHOD,
    RULES,
    Cuts,
    at_size,
    cut_all,
)
from microclip_deploy.bench.saliency.sheet import sheet
from microclip_deploy.console import bar, tell_skipped
from microclip_deploy.data.decode import BadImage, read_image
from microclip_deploy.data.sources import list_images, read_batches
from microclip_deploy.errors import DataError, printable
from microclip_deploy.evaluation.masks import overlap
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.clip import BackboneSpec, Clip, load_clip

BATCH = 16
EVERYTHING = "every token"
BETTER_SIDE = "otsu, better side"
"""Whichever side overlaps more with the true mask: no rule for the side can beat it."""

INSTALL = (
    "Debian and Ubuntu have such: sudo apt install tuxpaint-stamps-default mate-backgrounds "
    "(GPL-2); docs/benchmarks.md says which of their pictures to take"
)


class Measured(NamedTuple):
    """A report, and pictures to look at."""

    report: Report
    pictures: dict[str, Image.Image]


def run_saliency_bench(
    spec: BackboneSpec,
    notes: Console,
    *,
    cutouts: Path | None,
    backgrounds: Path | None,
    photos: Path | None,
    sizes: Sequence[int],
) -> Measured:
    """Measure every rule.

    Args:
        spec: the encoder.
        notes: gets progress.
        cutouts: folder or list of pictures with transparency.
        backgrounds: folder or list of photos that they are pasted on.
        photos: folder or list of ordinary photos; None leaves them out.
        sizes: of those photos, pixels.

    Raises:
        DataError: no cut-outs, backgrounds or photos that can be used.
        CheckpointError: the encoder cannot be used.
        UsageError: a size that the encoder cannot have.
    """
    start = time.monotonic()
    cut_out = read_cutouts(_given("--cutouts", "photos with transparency", cutouts))
    behind = _backgrounds(_given("--backgrounds", "photos to paste them on", backgrounds))
    clip = load_clip(spec)
    towers = {side: at_size(clip.vision, side) for side in sizes} if photos else {}
    side, grid = clip.preprocess.size, clip.vision.grid
    made = compose(cut_out, behind, side, grid)
    notes.print(f"{len(made.pixels)} composites of {len(cut_out)} cut-outs")
    report = Report(
        encoder=f"{clip.vision.width} wide, {side} px, {grid * grid} tokens",
        encoder_sha256=clip.sha256,
        date=time.strftime("%Y-%m-%d"),
        cutouts=len(cut_out),
        backgrounds=len(behind),
        composites=len(made.pixels),
    )
    seen = cut_all(clip.vision, clip.preprocess, _counted(made.pixels, notes))
    report.rows = _rows(made, seen)
    report.facts = _facts("composites", side, seen)
    pictures = {"composites": sheet(made.pixels, seen)}
    for size, tower in towers.items():
        assert photos is not None
        views, seen = _see_photos(clip, tower, size, photos, notes)
        report.facts += _facts("photos", size, seen)
        if size == max(sizes):
            pictures["photos"] = sheet(views, seen)
    report.seconds = round(time.monotonic() - start, 1)
    report.environment = environment()
    return Measured(report, pictures)


def _given(option: str, what: str, source: Path | None) -> Path:
    if source is None or not source.exists():
        found = "none" if source is None else f"nothing at {printable(source)}"
        raise DataError(f"{option}: expected a folder or list of {what}, found {found}. {INSTALL}")
    return source


def _backgrounds(source: Path) -> list[Image.Image]:
    found = []
    for path in list_images(source).paths:
        try:
            found.append(read_image(path))
        except BadImage as error:
            raise DataError(f"--backgrounds: expected photos, found {error}; remove it") from error
    return found


def _counted(pixels: NDArray[np.uint8], notes: Console) -> Iterator[NDArray[np.uint8]]:
    """Yield batches, and show how far they are."""
    with bar(notes, "composites") as progress:
        for start in range(0, len(pixels), BATCH):
            yield pixels[start : start + BATCH]
            progress.update(min(start + BATCH, len(pixels)), len(pixels))


def _see_photos(
    clip: Clip, tower: VisionBackbone, size: int, source: Path, notes: Console
) -> tuple[NDArray[np.uint8], dict[str, Cuts]]:
    """Return the views of all photos that can be read, and what the rules make of them."""
    preprocess = clip.preprocess.model_copy(update={"size": size})
    paths = list_images(source).paths
    views: list[NDArray[np.uint8]] = []
    bad: list[tuple[Path, str]] = []

    def skip(_index: int, error: BadImage) -> None:
        bad.append((error.path, error.reason))

    def batches() -> Iterable[NDArray[np.uint8]]:
        with bar(notes, f"photos, {size} px") as progress:
            for batch in read_batches(paths, preprocess, BATCH, on_bad=skip):
                views.append(batch.images)
                yield batch.images
                progress.update(int(batch.indices[-1]) + 1, len(paths))
            if not views:
                raise DataError(
                    f"{printable(source)}: expected photos, found none in {len(paths)} files that "
                    "can be read; give another folder"
                )

    seen = cut_all(tower, preprocess, batches())
    tell_skipped(bad, notes)
    return np.concatenate(views), seen


def _rows(made: Composites, seen: dict[str, Cuts]) -> list[Row]:
    """Return the overlap of every affinity and rule, and of two masks to compare them with."""
    sizes, truth = Sizes(made.share, made.cutout), made.truth
    rows = []
    for affinity in AFFINITIES:
        mask = seen[affinity].mask
        shared = overlap(mask, truth[:, None])
        method = shared[:, RULES.index(METHOD)]
        for number, rule in enumerate(RULES):
            rows.append(_row(affinity, rule, shared[:, number], method, sizes))
        split = mask[:, RULES.index("otsu, seed")]
        better = np.maximum(overlap(split, truth), overlap(~split, truth))
        rows.append(_row(affinity, BETTER_SIDE, better, method, sizes))
    everything = overlap(np.ones_like(truth), truth)
    method = overlap(seen[AFFINITIES[0]].mask[:, 0], truth)
    return [*rows, _row("–", EVERYTHING, everything, method, sizes)]


def _row(
    affinity: str,
    rule: str,
    shared: NDArray[np.float64],
    method: NDArray[np.float64],
    sizes: Sizes,
) -> Row:
    return Row(
        affinity=affinity,
        rule=rule,
        overlap=sizes.means(shared),
        found=sizes.means((shared > FOUND).astype(float))["all"],
        gain=sizes.means(shared - method),
    )


def _facts(of: str, size: int, seen: dict[str, Cuts]) -> list[Facts]:
    """Return what the cuts of some images are like, an affinity a row."""
    return [
        Facts(
            of=of,
            pixels=size,
            affinity=affinity,
            images=len(cuts.mask),
            tokens=cuts.mask.shape[2],
            complete=cuts.complete.mean(),
            undefined=dict(zip(RULES, cuts.undefined.mean(axis=0), strict=True)),
            mask_share=dict(zip(RULES, cuts.mask.mean(axis=(0, 2)), strict=True)),
            effective=dict(zip(RULES, cuts.effective.mean(axis=0), strict=True)),
            likeness=_mean_where(cuts.likeness[:, 0], ~cuts.undefined[:, 0]),
            likeness_undefined=_mean_where(cuts.likeness[:, 0], cuts.undefined[:, 0]),
        )
        for affinity, cuts in seen.items()
    ]


def _mean_where(values: NDArray[np.float64], where: NDArray[np.bool_]) -> float | None:
    return float(values[where].mean()) if where.any() else None
