"""`export`: write the graphs, prove them, and only then put them in place.

Everything is written into a hidden folder beside the target and takes its place when it is proven;
an earlier export stays as it was until then. An export that is not proven is kept as TARGET.failed,
without a manifest: evidence, never a result.
"""

import datetime
import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import save

from microclip_deploy import artifact
from microclip_deploy.artifact import LOCK
from microclip_deploy.console import bar
from microclip_deploy.errors import CheckpointError, UsageError
from microclip_deploy.export.graphs import HeadGraph
from microclip_deploy.export.proof.answers import Graphs
from microclip_deploy.export.proof.forward_error import forward_error
from microclip_deploy.export.proof.judge import Proof, Stage, require_proven
from microclip_deploy.export.proof.limits import Tolerance
from microclip_deploy.export.proof.parity import compare_pixels, prove
from microclip_deploy.export.proof.probes import Photos, Reference, photos_with
from microclip_deploy.export.proof.quantised import quantisation_error
from microclip_deploy.export.proof.verify import VERIFIED, require_one_device
from microclip_deploy.export.to_onnx import OPSET, WEIGHTS, write_graphs
from microclip_deploy.model.checkpoint import CheckpointManifest, load_model, read_checkpoint
from microclip_deploy.model.clip import BackboneSpec
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.serving.engines import ENGINES
from microclip_deploy.serving.exported import (
    BACKBONE,
    CLASSIFIER,
    FULL,
    HEAD_WEIGHTS,
    PARITY,
    PROBES,
    SCHEMA,
    ExportManifest,
    GraphSpec,
    Parent,
    Precision,
)
from microclip_deploy.serving.onnx_graph import OnnxGraph

AUTO_BATCHES = (1, 8)
"""Batch sizes that `--dtype auto` measures; the geometric mean of both decides."""

AUTO_REPEATS = 9

_CANDIDATES: Mapping[str, Sequence[Precision]] = {"cpu": ("fp32", "int8"), "cuda": ("fp32", "fp16")}
"""What may be the fastest on a device; the others never are."""


_RESIZED = {
    "shortest": "short side, antialiased",
    "longest": "long side, antialiased, filled up",
    "squash": "both sides, antialiased",
}
"""What metadata tells people of a resize mode."""


class _Subject(NamedTuple):
    """What is exported, and what it is held against."""

    checkpoint: CheckpointManifest
    checkpoint_sha256: str
    model: MicroCLIP
    classifier: NDArray[np.float32]
    """(C, E): the model's class matrix."""
    reference: Reference
    photos: Photos
    pixels: Stage
    tolerance: Tolerance


class _Candidate(NamedTuple):
    """Graphs of one precision with their proof."""

    directory: Path
    graphs: dict[str, GraphSpec]
    proof: Proof
    tolerance: Tolerance


def run_export(
    run: Path,
    out: Path,
    notes: Console,
    *,
    dtype: Precision | Literal["auto"] = "fp32",
    images: Path | None = None,
    device: str = "cpu",
    atol: float | None = None,
    min_agreement: float | None = None,
    overwrite: bool = False,
    **reading: int | None,
) -> Proof:
    """Export a run and return the proof.

    Args:
        run: what `adapt` wrote.
        out: directory to write.
        notes: gets progress and remarks.
        dtype: precision of the encoder; "auto" measures and keeps the fastest.
        images: the user's, proven on as well.
        device: where the graphs are run.
        atol: as for `Tolerance.changed`.
        min_agreement: as for `Tolerance.changed`.
        overwrite: replace an export.
        reading: `max_pixels` and `bit_depth` in place of those of the run, also in the export.

    Raises:
        UsageError: the target is not empty and may not be replaced, or a limit is no number.
        CheckpointError: the run cannot be used.
        VerificationError: a graph departs from PyTorch; the evidence is kept.
        EnvironmentProblem: a package or device is missing, or the target cannot be written.
    """
    out = Path(os.path.realpath(out))  # a link is kept, and what it leads to is replaced
    require_one_device(device)
    automatic = _CANDIDATES["cuda" if device.startswith("cuda") else "cpu"]
    precisions = automatic if dtype == "auto" else (dtype,)
    own = Tolerance().changed(atol, min_agreement)
    evidence = _evidence(out)
    _require_free(out, overwrite)
    subject = _subject(run, images, own, notes, reading)
    with artifact.staged_directory(out) as folder:
        candidates = [_candidate(subject, p, device, folder, notes) for p in precisions]
        chosen = _chosen(candidates, subject.reference.images, device, evidence, notes)
        for path in chosen.directory.iterdir():
            path.replace(folder / path.name)
        for precision in precisions:
            shutil.rmtree(folder / precision)
        _complete(folder, subject, chosen)
        _require_free(out, overwrite)  # minutes have passed
    notes.print(f"exported: {out} ({chosen.proof.precision}, proven)", markup=False)
    return chosen.proof


def _evidence(target: Path) -> Path:
    """Return where a failure is kept; nothing else may be there."""
    evidence = target.with_name(f"{target.name}.failed")
    if evidence.exists() and not (evidence / PARITY).is_file():
        raise UsageError(
            f"{evidence}: expected no such path or the evidence of an earlier failure, found "
            "something else; move it, or choose another --out"
        )
    return evidence


def _require_free(target: Path, overwrite: bool) -> None:
    """Make sure that nothing but an earlier export is replaced, and only if that is wanted."""
    if Path.cwd().is_relative_to(target):
        raise UsageError(
            f"{target}: expected an --out that can be replaced, found the working directory or a "
            "folder around it; give a folder inside it"
        )
    if target.is_dir() and not any(target.iterdir()):
        return
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UsageError(
            f"{target}: expected no such directory or an empty one; replace an export with "
            "--overwrite, or give another --out"
        )
    try:
        stored = artifact.read_json(target / artifact.MANIFEST)
        ours = {*stored["files"], artifact.MANIFEST, ENGINES, LOCK, VERIFIED}
    except (CheckpointError, KeyError, TypeError):
        ours = set()
    if not ours or str(stored.get("schema")).partition("/")[0] != SCHEMA.partition("/")[0]:
        raise UsageError(f"{target}: --overwrite only replaces an export; choose another --out")
    foreign = sorted({path.name for path in target.iterdir()} - ours)
    if foreign:
        raise UsageError(
            f"{target}: --overwrite would remove what is no part of the export: "
            f"{', '.join(foreign[:3])}; move it, or choose another --out"
        )


def _subject(
    run: Path,
    images: Path | None,
    own: Tolerance,
    notes: Console,
    reading: Mapping[str, int | None],
) -> _Subject:
    """Load the model, let it answer, and measure its rounding."""
    checkpoint = read_checkpoint(run)
    preprocess = checkpoint.manifest.preprocess.reading(**reading)
    photos = photos_with(images, preprocess.size, notes, preprocess.photos)
    model = load_model(checkpoint)
    views = photos.views(preprocess)
    with bar(notes, "asking PyTorch") as progress:
        reference = Reference.of(model, preprocess, views, progress.update)
    with bar(notes, "asking PyTorch in float64") as progress:
        error = forward_error(model, preprocess, reference, progress.update)
    return _Subject(
        checkpoint.manifest.model_copy(update={"preprocess": preprocess}),
        artifact.sha256_file(run / artifact.MANIFEST),
        model,
        model.class_matrix().detach().numpy(),
        reference,
        photos,
        compare_pixels(photos.read(), views, preprocess),
        own.model_copy(update={"error": error}),
    )


def _candidate(
    subject: _Subject,
    precision: Precision,
    device: str,
    parent: Path,
    notes: Console,
) -> _Candidate:
    """Write the graphs of a precision and prove them."""
    checkpoint, matrix, folder = subject.checkpoint, subject.classifier, parent / precision
    folder.mkdir()
    notes.print(f"writing {precision} graphs")
    properties = _properties(subject, precision)
    images, tolerance = subject.reference.images, subject.tolerance
    written = write_graphs(
        subject.model, checkpoint.preprocess, precision, folder, properties, images
    )
    if precision == "int8-static":
        error = quantisation_error(folder / BACKBONE, subject.reference)
        tolerance = tolerance.model_copy(update={"quantised": error})
    # A matrix of one row more than the graph has inside: classes may change.
    other, share = np.concatenate([matrix[1:], matrix[:2]]), checkpoint.config.adapt.cls_share
    with bar(notes, f"proving {precision}") as progress:
        proof = prove(
            Graphs(folder, precision, checkpoint.ncut_spec(), other, share),
            subject.reference,
            subject.photos,
            tolerance=tolerance,
            pixels=subject.pixels,
            device=device,
            progress=progress.update,
        )
    artifact.write_json(folder / PARITY, proof.model_dump())
    return _Candidate(folder, written, proof, tolerance)


def _chosen(
    candidates: Sequence[_Candidate],
    images: NDArray[np.uint8],
    device: str,
    evidence: Path,
    notes: Console,
) -> _Candidate:
    """Return the fastest candidate that is proven; keep the evidence where none is."""
    proven = [candidate for candidate in candidates if candidate.proof.departure is None]
    if not proven:
        shutil.rmtree(evidence, ignore_errors=True)
        candidates[0].directory.replace(evidence)
        require_proven(candidates[0].proof, evidence / PARITY)
    for lost in (candidate for candidate in candidates if candidate not in proven):
        notes.print(f"{lost.proof.precision}: departs at {lost.proof.departure}; left out")
    if len(proven) == 1:
        return proven[0]
    times = _times([candidate.directory / FULL for candidate in proven], device, images)
    for candidate, seconds in zip(proven, times, strict=True):
        shown = ", ".join(
            f"{1e3 * value:.1f} ms for {batch}"
            for batch, value in zip(AUTO_BATCHES, seconds, strict=True)
        )
        notes.print(f"{candidate.proof.precision}: {shown}")
    means = [statistics.geometric_mean(seconds) for seconds in times]
    return proven[means.index(min(means))]


def _times(paths: Sequence[Path], device: str, images: NDArray[np.uint8]) -> list[list[float]]:
    """Return the median seconds of each graph for each of `AUTO_BATCHES`; graphs take turns."""
    graphs = [OnnxGraph(path, device) for path in paths]
    seconds = [
        [[_seconds(graph, images[:batch]) for graph in graphs] for _ in range(1 + AUTO_REPEATS)]
        for batch in AUTO_BATCHES
    ]
    medians: list[list[float]] = np.median(np.array(seconds)[:, 1:], axis=1).T.tolist()
    return medians  # without the first, which warms up


def _seconds(graph: OnnxGraph, images: NDArray[np.uint8]) -> float:
    start = time.perf_counter()
    graph.run(("logits",), {"image": images})
    return time.perf_counter() - start


def _properties(subject: _Subject, precision: Precision) -> dict[str, str]:
    """Return what a graph says about itself to those who have nothing else."""
    checkpoint, backbone = subject.checkpoint, subject.checkpoint.backbone
    packages = ("microclip-deploy", "torch", "onnx", "open_clip_torch")
    return {
        "format": SCHEMA,
        "task": "classify",
        "description": "microCLIP image classifier; README of microclip-deploy",
        "names": json.dumps(dict(enumerate(checkpoint.classes)), ensure_ascii=False),
        "imgsz": str(checkpoint.preprocess.size),
        "channels": "3",
        "precision": precision,
        "preprocess": json.dumps(
            {
                **checkpoint.preprocess.model_dump(),
                "resize": _RESIZED[checkpoint.preprocess.resize_mode],
                "crop": "center",
                "input": "uint8 NHWC RGB; normalised inside the graph",
            }
        ),
        "ncut": json.dumps(checkpoint.ncut_spec().stored()),
        "clip_model": _clip_model(backbone),
        "backbone_sha256": backbone.sha256,
        "checkpoint_sha256": subject.checkpoint_sha256,
        "versions": json.dumps({name: version(name) for name in packages}),
        "Image.BitmapPixelFormat": "Rgb8",
        "Image.ColorSpaceGamma": "SRGB",
        "Image.NominalPixelRange": "NominalRange_0_255",
    }


def _clip_model(backbone: BackboneSpec) -> str:
    """Return open_clip's names of a model; of paths, which say nothing elsewhere, the last part."""
    model, pretrained = backbone.model, backbone.pretrained or ""
    if model.startswith("local-dir:"):
        model = Path(model.removeprefix("local-dir:")).name
    return f"{model} {Path(pretrained).name}".strip()


def _complete(folder: Path, subject: _Subject, chosen: _Candidate) -> None:
    """Write class matrix, the head's matrices, stored images and, last, the manifest."""
    checkpoint, backbone = subject.checkpoint, subject.checkpoint.backbone
    artifact.write_bytes(folder / CLASSIFIER, save({"classifier": subject.classifier}))
    head = {name: value.numpy() for name, value in HeadGraph(subject.model).named_parameters()}
    artifact.write_bytes(folder / HEAD_WEIGHTS, save(head))
    subject.reference.write(folder / PROBES)
    manifest = ExportManifest(
        parent=Parent(
            checkpoint_sha256=subject.checkpoint_sha256,
            model=backbone.model,
            pretrained=backbone.pretrained,
            backbone_sha256=backbone.sha256,
            architecture=backbone.architecture,
        ),
        precision=chosen.proof.precision,
        opset=OPSET,
        preprocess=checkpoint.preprocess,
        ncut=checkpoint.ncut_spec().stored(),
        cls_share=checkpoint.config.adapt.cls_share,
        classes=checkpoint.classes,
        templates=checkpoint.texts.templates,
        graphs=chosen.graphs,
        calibration=checkpoint.calibration,
    )
    content = {
        "package": {"name": "microclip-deploy", "version": version("microclip-deploy")},
        "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **manifest.model_dump(mode="json"),
        "tolerance": chosen.tolerance.model_dump(),
        "agreement": chosen.proof.agreement,
    }
    shared = [WEIGHTS] if (folder / WEIGHTS).is_file() else []
    files = [*chosen.graphs, *shared, CLASSIFIER, HEAD_WEIGHTS, PROBES, PARITY]
    artifact.write_manifest(folder, SCHEMA, content, files)
