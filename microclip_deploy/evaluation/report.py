"""report.html of a run: what was learnt, saliency before and after, data problems, settings."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from microclip_deploy import artifact
from microclip_deploy.adapt.log import HISTORY, read_history
from microclip_deploy.adapt.run_directory import RunInputs, read_inputs
from microclip_deploy.errors import CheckpointError, MicroclipError, printable
from microclip_deploy.evaluation import page, reliability
from microclip_deploy.evaluation.chart import (
    HALF,
    Drawing,
    column_chart,
    drawing,
    epoch_chart,
    matrix_chart,
)
from microclip_deploy.evaluation.evaluation import EVALUATION
from microclip_deploy.evaluation.masks import MaskFacts
from microclip_deploy.evaluation.moves import believed
from microclip_deploy.evaluation.page import data_uri, percent
from microclip_deploy.evaluation.predict import FailedImage, ImagePrediction, predict
from microclip_deploy.model.checkpoint import SCHEMA
from microclip_deploy.model.weights import DEMO_MODELS
from microclip_deploy.paths import StrPath, as_path
from microclip_deploy.serving import RunSessions, open_run
from microclip_deploy.serving.classification import Guess
from microclip_deploy.serving.overlay import attention_map, overlay

REPORT = "report.html"

_TILE = 208  # side of a montage picture, pixels
_LISTED = 200  # bad images that are listed
_BARS = 40  # up to this many classes each get a bar
_EXTREMES = 12  # most and least frequent classes shown beyond that; confused pairs
_CONFUSED = 24  # classes in the matrix of confusions


class Chart(NamedTuple):
    """A drawing and what is said about it."""

    title: str
    drawing: Drawing
    note: str = ""


class LabelBar(NamedTuple):
    """How often a class was chosen as pseudo-label in the last epoch."""

    name: str
    images: int
    width: float
    """Percent of the widest bar."""


class LabelCounts(NamedTuple):
    """The pseudo-labels of the last epoch."""

    groups: tuple[tuple[str, tuple[LabelBar, ...]], ...]
    """Heading and bars."""
    profile: Drawing | None
    """All counts in falling order; None where every class has a bar."""
    even: float
    """Count of every class if all were equally frequent."""
    unused: int
    """Classes that no image was labelled with."""


class Confusions(NamedTuple):
    """Which classes an evaluation found confused with one another."""

    matrix: str
    """SVG of the classes that are confused most."""
    shown: int
    """Classes in it."""
    pairs: tuple[tuple[str, str, int, int], ...]
    """Class, what it is taken for, images so taken, images of the class; the most first."""


@dataclass(frozen=True)
class SampleRow:
    """One image of the montage: data: URIs and what both models say."""

    name: str
    photo: str
    masks: tuple[tuple[str, str], ...]
    """Before and after adaptation, each with a caption."""
    attentions: tuple[str, ...]
    guesses: tuple[Guess, Guess]


class Montage(NamedTuple):
    """The montage, or why there is none."""

    rows: tuple[SampleRow, ...]
    note: str


def write_report(
    run_dir: StrPath,
    *,
    device: str = "cpu",
    sample_images: int = 12,
    sessions: RunSessions | None = None,
) -> Path:
    """Write report.html into a finished run directory.

    Where images or the backbone are no longer there, the report says so instead of the montage.

    Args:
        run_dir: directory that `adapt` wrote.
        device: what draws the montage.
        sample_images: images in the montage, spread evenly over the run's; 0 for none.
        sessions: of the run, if they are open; they stay so.

    Returns:
        The path of the report.

    Raises:
        CheckpointError: the run is not finished, or damaged.
        EnvironmentProblem: the disk is full or the directory cannot be written.
    """
    run_dir = as_path(run_dir, "run")
    manifest = artifact.read_manifest(run_dir, SCHEMA)
    inputs = _inputs(run_dir)
    montage = _montage(run_dir, inputs, device, sample_images, sessions)
    history = read_history(run_dir / HISTORY)
    text = render(manifest, history, inputs, montage, _evaluation(run_dir))
    artifact.write_bytes(run_dir / REPORT, text.encode())
    return run_dir / REPORT


def render(
    manifest: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    inputs: RunInputs | None,
    montage: Montage,
    evaluation: Mapping[str, Any] | None,
) -> str:
    """Return the page as text.

    Args:
        manifest: of the checkpoint.
        history: its epochs, oldest first.
        inputs: what the run depends on; None leaves out texts and skipped images.
        montage: pictures.
        evaluation: `Evaluation.to_json`, if the run was evaluated.
    """
    return page.render(
        "evaluation/report.html.j2",
        manifest=manifest,
        inputs=inputs,
        montage=montage,
        evaluation=evaluation,
        believed=believed(manifest, inputs),
        mask_lines=_mask_lines(evaluation),
        confusions=_confusions(evaluation),
        reliability=reliability.chart_of(evaluation),
        charts=_charts(history),
        labels=_label_counts(manifest["classes"], history),
        headline=_headline(manifest, history, evaluation),
        warnings=_warnings(manifest, evaluation),
        created=_created(manifest),
        settings=_settings(manifest),
        listed=_LISTED,
    )


def _inputs(run_dir: Path) -> RunInputs | None:
    try:
        return read_inputs(run_dir)
    except CheckpointError:
        # A checkpoint may have been copied without them: it works, and the report says less.
        return None


def _evaluation(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / EVALUATION
    return dict(artifact.read_json(path)) if path.is_file() else None


def _headline(
    manifest: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any] | None,
) -> list[tuple[str, str, str]]:
    """Return (label, value, remark) of the figures at the top."""
    images = manifest["images"]
    skipped = f"{images['bad']} skipped" if images["bad"] else "none skipped"
    figures = [
        ("Classes", f"{len(manifest['classes']):,}", ""),
        ("Images", f"{images['used']:,}", skipped),
        ("Epochs", str(len(history)), _duration(sum(e["seconds"] for e in history))),
        ("Backbone", *_backbone(manifest)),
    ]
    if "verdict" in manifest:
        figures.insert(0, ("Verdict without labels", *_verdict(manifest["verdict"])))
    # A caller of the library may have measured other things than accuracy.
    validation = [epoch.get("validation") or {} for epoch in history]
    measured = [line["top1"] for line in validation if "top1" in line]
    before, after = _top1(evaluation, "zero-shot", "cls"), _top1(evaluation, "adapted", "fused")
    if after is not None:
        change = "" if before is None else f"{100 * (after - before):+.1f} points over zero-shot"
        figures.insert(0, ("Accuracy", _from_to(before, after), change))
    elif measured:
        figures.insert(0, ("Validation accuracy", percent(measured[-1]), "after the last epoch"))
    elif history and "verdict" not in manifest:
        remark = "of the strong view with its pseudo-label"
        figures.insert(0, ("Agreement", percent(history[-1]["agreement"]), remark))
    return figures


def _verdict(said: Mapping[str, Any]) -> tuple[str, str]:
    """Return the decision, and the accuracy change that is predicted."""
    if said["change"] is None:
        return said["decision"], "no prediction"
    return said["decision"], f"{said['low']:+.0f} to {said['high']:+.0f} points predicted"


def _backbone(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of the model behind a run, and where its weights are from."""
    model, pretrained = manifest["backbone"]["model"], manifest["backbone"]["pretrained"]
    kind, _, place = model.rpartition(":")
    weights = {"local-dir": "a local folder", "hf-hub": place.partition("/")[0]}.get(kind, "")
    if model in DEMO_MODELS:
        weights = "a tiny model of this package"
    origin = Path(pretrained).name if pretrained else weights
    side = f"{manifest['preprocess']['size']} pixels"
    return Path(place).name or model, f"{origin}, {side}" if origin else side


def _top1(evaluation: Mapping[str, Any] | None, model: str, token: str) -> float | None:
    texts = {"zero-shot": "names", "adapted": "adapted"}[model]
    wanted = (model, token, texts)
    rows = evaluation["rows"] if evaluation else []
    return next((r["top1"] for r in rows if (r["model"], r["token"], r["texts"]) == wanted), None)


def _from_to(before: float | None, after: float) -> str:
    return percent(after) if before is None else f"{100 * before:.1f} → {percent(after)}"


def _created(manifest: Mapping[str, Any]) -> str:
    """Return when the checkpoint was written, to the minute; '' where it does not say."""
    created = str(manifest.get("created_utc", ""))
    return f"{created[:10]} {created[11:16]} UTC" if created else ""


def _mask_lines(evaluation: Mapping[str, Any] | None) -> list[str]:
    """Return what an evaluation tells of the masks; nothing where an older one tells none."""
    masks = evaluation.get("masks") if evaluation else None
    return MaskFacts(**masks).lines() if masks else []


def _confusions(evaluation: Mapping[str, Any] | None) -> Confusions | None:
    """Return the confused classes; None where there are none, or an older evaluation tells none."""
    found = evaluation.get("confusions") if evaluation else None
    if not evaluation or not found:
        return None
    of = {line["class"]: (line["images"], line["correct"]) for line in evaluation["per_class"]}
    counts = {(line["class"], line["predicted"]): line["images"] for line in found}
    # Classes that are confused stand beside each other.
    names = list(dict.fromkeys(name for pair in counts for name in pair))[:_CONFUSED]
    counts |= {(name, name): of[name][1] for name in names}
    rows = [[counts.get((a, b), 0) / max(of[a][0], 1) for b in names] for a in names]
    pairs = ((line["class"], line["predicted"], line["images"]) for line in found[:_EXTREMES])
    listed = tuple((*pair, of[pair[0]][0]) for pair in pairs)
    return Confusions(matrix_chart(names, rows), len(names), listed)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _warnings(manifest: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[str]:
    found = [*manifest.get("warnings", ()), *(evaluation["warnings"] if evaluation else ())]
    return list(dict.fromkeys(found))


def _settings(manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the resolved configuration by section; the graph's constants as they were used."""
    sections = {
        **manifest["config"],
        "ncut": manifest["ncut"],
        "preprocess": manifest["preprocess"],
    }
    return [
        (name, [(key, json.dumps(value, ensure_ascii=False)) for key, value in values.items()])
        for name, values in sections.items()
    ]


def _charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    def columns(*keys: str) -> list[list[float | None]]:
        return [[epoch.get(key) for epoch in history] for key in keys]

    def chart(title: str, names: Mapping[str, str], note: str = "", *, share: bool = True) -> Chart:
        series = dict(zip(names.values(), columns(*names), strict=True))
        return Chart(title, _epochs(series, percent=share), note)

    loss = {"loss": "total", "cross_entropy": "cross-entropy", "fairness": "fairness"}
    agreement = {
        "agreement": "strong view agrees with its pseudo-label",
        "prior_agreement": "pseudo-label is the frozen prior's choice",
    }
    graphs = {
        "mask_share": "tokens in the foreground",
        "complete_graphs": "complete graphs",
        "degenerate_graphs": "undefined cuts",
    }
    churn = {"churn": "labels that changed since the epoch before"}
    found = [
        chart("Pseudo-labels", agreement),
        chart("Churn", churn, "Falls towards zero as the labels settle; the first epoch has none."),
        chart("Loss", loss, share=False),
        chart("Saliency graphs", graphs, "Complete or undefined graphs carry no saliency."),
    ]
    validation = [epoch.get("validation") or {} for epoch in history]
    names = {"top1": "fused", "cls_top1": "[CLS] only", "fg_top1": "[FG] only"}
    measured = {
        title: [line.get(key) for line in validation]
        for key, title in names.items()
        if any(key in line for line in validation)
    }
    if measured:
        note = "Top-1 on labelled images that never reach the training."
        found.insert(0, Chart("Validation accuracy", _epochs(measured, percent=True), note))
    return [entry for entry in found if entry.drawing.wide]


def _epochs(series: Mapping[str, Sequence[float | None]], *, percent: bool) -> Drawing:
    return drawing(partial(epoch_chart, series, percent=percent), HALF)


def _label_counts(
    classes: Sequence[str], history: Sequence[Mapping[str, Any]]
) -> LabelCounts | None:
    if not history:
        return None
    counts = list(history[-1]["label_counts"])
    widest = max(*counts, 1)
    order = sorted(range(len(classes)), key=lambda i: (-counts[i], i))
    bars = [LabelBar(classes[i], counts[i], 100 * counts[i] / widest) for i in order]
    even = sum(counts) / len(classes)
    unused = sum(count == 0 for count in counts)
    if len(bars) <= _BARS:
        half = math.ceil(len(bars) / 2)
        groups = (("", tuple(bars[:half])), ("", tuple(bars[half:])))
        return LabelCounts(groups, None, even, unused)
    groups = (
        ("Most frequent", tuple(bars[:_EXTREMES])),
        ("Least frequent", tuple(bars[-_EXTREMES:])),
    )
    profile = drawing(partial(column_chart, sorted(counts, reverse=True), even))
    return LabelCounts(groups, profile, even, unused)


def _montage(
    run_dir: Path, inputs: RunInputs | None, device: str, count: int, sessions: RunSessions | None
) -> Montage:
    if inputs is None or count < 1:
        return Montage((), "The run directory does not name its images." if count else "")
    total = len(inputs.images)
    wanted = min(count, total)
    paths = [Path(inputs.images[i * total // wanted]) for i in range(wanted)]
    try:
        with nullcontext(sessions) if sessions else open_run(run_dir, device) as models:
            before, after = (
                list(predict(session, paths, 1, batch_size=wanted))
                for session in (models.initial, models.adapted)
            )
    except MicroclipError as error:
        return Montage((), f"No pictures: {error}")
    rows = [
        _sample_row(old, new)
        for old, new in zip(before, after, strict=True)
        if not isinstance(old, FailedImage) and not isinstance(new, FailedImage)
    ]
    lost = wanted - len(rows)
    return Montage(tuple(rows), f"{lost} of {wanted} images can no longer be read." if lost else "")


def _sample_row(before: ImagePrediction, after: ImagePrediction) -> SampleRow:
    scale = max(1, math.ceil(_TILE / len(after.view)))
    both = (before, after)
    return SampleRow(
        name=printable(after.path.name),
        photo=data_uri(Image.fromarray(after.view), _TILE),
        masks=tuple(
            (data_uri(overlay(p.view, p.mask, None, scale), _TILE), _extent(p)) for p in both
        ),
        attentions=tuple(data_uri(attention_map(p.view, p.attention, scale), _TILE) for p in both),
        guesses=(before.top[0], after.top[0]),
    )


def _extent(prediction: ImagePrediction) -> str:
    """Say how much of the image the mask holds; the whole image means that nothing stands out."""
    if prediction.mask.all():
        return "complete graph" if prediction.complete else "whole image"
    return percent(float(prediction.mask.mean()), 0)
