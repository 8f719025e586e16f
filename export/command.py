"""`export`: write the graphs, prove them, and only then put them in place.

Everything is written into a hidden folder beside the target and takes its place when it is proven;
an earlier export stays as it was until then. An export that is not proven is kept as TARGET.failed,
without a manifest: evidence, never a result.
"""

import datetime
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import save

from microclip_deploy import artifact
from microclip_deploy.artifact import LOCK
from microclip_deploy.console import bar, tell_skipped
from microclip_deploy.errors import CheckpointError, UsageError
from microclip_deploy.export.graphs import HeadGraph
from microclip_deploy.export.proof.limits import LIMITS, Limits
from microclip_deploy.export.proof.parity import Proof, Serving, Stage, compare_pixels, prove
from microclip_deploy.export.proof.probes import Photos, Reference, made_up_photos, with_users
from microclip_deploy.export.proof.verify import VERIFIED, require_one_device, require_proven
from microclip_deploy.export.to_onnx import OPSET, WEIGHTS, write_graphs
from microclip_deploy.model.checkpoint import Checkpoint, load_model, read_checkpoint
from microclip_deploy.model.clip import BackboneSpec
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.serving.engines import ENGINES
from microclip_deploy.serving.exported import (
    CLASSIFIER,
    FULL,
    HEAD_WEIGHTS,
    PARITY,
    PROBES,
    SCHEMA,
    GraphSpec,
    Precision,
)
from microclip_deploy.serving.onnx_graph import OnnxGraph

AUTO_BATCHES = (1, 8)
"""Batch sizes that `--dtype auto` measures; the geometric mean of both decides."""

AUTO_REPEATS = 9

_CANDIDATES: Mapping[str, Sequence[Precision]] = {"cpu": ("fp32", "int8"), "cuda": ("fp32", "fp16")}
"""What may be the fastest on a device; the others never are."""


@dataclass(frozen=True)
class ExportRequest:
    """The options of `export` as they were given."""

    run: Path
    out: Path
    dtype: Literal["fp32", "fp16", "bf16", "int8", "auto"] = "fp32"
    images: Path | None = None
    device: str = "cpu"
    atol: float | None = None
    min_agreement: float | None = None
    overwrite: bool = False


class _Subject(NamedTuple):
    """What is exported, and what it is held against."""

    checkpoint: Checkpoint
    model: MicroCLIP
    reference: Reference
    photos: Photos
    pixels: Stage


class _Candidate(NamedTuple):
    """Graphs of one precision with their proof."""

    directory: Path
    graphs: dict[str, GraphSpec]
    limits: Limits
    proof: Proof


def run_export(request: ExportRequest, notes: Console) -> Proof:
    """Export a run and return the proof.

    Raises:
        UsageError: the target is not empty and may not be replaced.
        CheckpointError: the run cannot be used.
        VerificationError: a graph departs from PyTorch; the evidence is kept.
        EnvironmentProblem: a package or device is missing, or the target cannot be written.
    """
    # A link is kept, and what it leads to is replaced.
    request = replace(request, out=Path(os.path.realpath(request.out)))
    _require_sensible(request)
    _require_free(request.out, request.overwrite)
    subject = _subject(request, notes)
    with artifact.staged_directory(request.out) as folder:
        precisions = _precisions(request)
        candidates = [_candidate(request, subject, p, folder / p, notes) for p in precisions]
        chosen = _chosen(candidates, request, subject, notes)
        for path in chosen.directory.iterdir():
            path.replace(folder / path.name)
        for precision in precisions:
            shutil.rmtree(folder / precision)
        _complete(folder, request, subject, chosen)
        _require_free(request.out, request.overwrite)  # minutes have passed
    notes.print(f"exported: {request.out} ({chosen.proof.precision}, proven)", markup=False)
    return chosen.proof


def _require_sensible(request: ExportRequest) -> None:
    """Refuse limits that are no numbers, and folders that must not be replaced as a whole."""
    require_one_device(request.device)
    for option, limit in (("atol", request.atol), ("min-agreement", request.min_agreement)):
        if limit is not None and not math.isfinite(limit):
            raise UsageError(f"--{option}: expected a finite number, found {limit}; give one")
    if Path.cwd().is_relative_to(request.out):
        raise UsageError(
            f"{request.out}: expected an --out that can be replaced, found the working directory "
            "or a folder around it; give a folder inside it"
        )
    evidence = _evidence(request.out)
    if evidence.exists() and not (evidence / PARITY).is_file():
        raise UsageError(
            f"{evidence}: expected no such path or the evidence of an earlier failure, found "
            "something else; move it, or choose another --out"
        )


def _evidence(target: Path) -> Path:
    return target.with_name(f"{target.name}.failed")


def _require_free(target: Path, overwrite: bool) -> None:
    """Make sure that nothing but an earlier export is replaced, and only if that is wanted."""
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


def _subject(request: ExportRequest, notes: Console) -> _Subject:
    """Load the model and let it answer."""
    checkpoint = read_checkpoint(request.run)
    model, preprocess = load_model(checkpoint), checkpoint.manifest.preprocess
    photos = made_up_photos(preprocess.size)
    if request.images is not None:
        photos = with_users(photos, request.images)
        tell_skipped(photos.bad, notes)
    views = photos.views(preprocess)
    with bar(notes, "asking PyTorch") as progress:
        reference = Reference.of(model, preprocess, views, progress.update)
    pixels = compare_pixels(photos.read(), views, preprocess)
    return _Subject(checkpoint, model, reference, photos, pixels)


def _precisions(request: ExportRequest) -> Sequence[Precision]:
    if request.dtype != "auto":
        return (request.dtype,)
    return _CANDIDATES["cuda" if request.device.startswith("cuda") else "cpu"]


def _candidate(
    request: ExportRequest, subject: _Subject, precision: Precision, folder: Path, notes: Console
) -> _Candidate:
    """Write the graphs of a precision and prove them."""
    manifest = subject.checkpoint.manifest
    folder.mkdir()
    notes.print(f"writing {precision} graphs")
    properties = _properties(request, subject, precision)
    graphs = write_graphs(subject.model, manifest.preprocess, precision, folder, properties)
    limits = LIMITS[precision].changed(request.atol, request.min_agreement)
    with bar(notes, f"proving {precision}") as progress:
        proof = prove(
            folder,
            subject.reference,
            manifest.ncut_spec(),
            precision,
            limits=limits,
            serving=_serving(subject),
            pixels=subject.pixels,
            names=subject.photos.names,
            source=subject.photos.source,
            device=request.device,
            progress=progress.update,
        )
    artifact.write_json(folder / PARITY, proof.model_dump())
    return _Candidate(folder, graphs, limits, proof)


def _serving(subject: _Subject) -> Serving:
    """Return a matrix of one row more than the graph has inside: classes may change."""
    matrix = subject.model.class_matrix().detach().numpy()
    share = subject.checkpoint.manifest.config.adapt.cls_share
    return Serving(np.concatenate([matrix[1:], matrix[:2]]), share)


def _chosen(
    candidates: Sequence[_Candidate], request: ExportRequest, subject: _Subject, notes: Console
) -> _Candidate:
    """Return the fastest candidate that is proven; keep the evidence where none is."""
    proven = [candidate for candidate in candidates if candidate.proof.departure is None]
    if not proven:
        evidence = _evidence(request.out)
        shutil.rmtree(evidence, ignore_errors=True)
        candidates[0].directory.replace(evidence)
        require_proven(candidates[0].proof, evidence / PARITY)
    for lost in (candidate for candidate in candidates if candidate not in proven):
        notes.print(f"{lost.proof.precision}: departs at {lost.proof.departure}; left out")
    if len(proven) == 1:
        return proven[0]
    paths = [candidate.directory / FULL for candidate in proven]
    times = _times(paths, request.device, subject.reference.images)
    for candidate, seconds in zip(proven, times, strict=True):
        shown = ", ".join(
            f"{1e3 * value:.1f} ms for {batch}"
            for batch, value in zip(AUTO_BATCHES, seconds, strict=True)
        )
        notes.print(f"{candidate.proof.precision}: {shown}")
    return min(
        zip(proven, times, strict=True), key=lambda pair: statistics.geometric_mean(pair[1])
    )[0]


def _times(paths: Sequence[Path], device: str, images: NDArray[np.uint8]) -> list[list[float]]:
    """Return the median seconds of each graph for each of `AUTO_BATCHES`; graphs take turns."""
    graphs = [OnnxGraph(path, device) for path in paths]
    times: list[list[float]] = [[] for _ in graphs]
    for batch in AUTO_BATCHES:
        feeds = {"image": images[:batch]}
        taken: list[list[float]] = [[] for _ in graphs]
        for _ in range(AUTO_REPEATS + 1):  # the first warms up
            for graph, seconds in zip(graphs, taken, strict=True):
                start = time.perf_counter()
                graph.run(("logits",), feeds)
                seconds.append(time.perf_counter() - start)
        for column, seconds in zip(times, taken, strict=True):
            column.append(statistics.median(seconds[1:]))
    return times


def _properties(request: ExportRequest, subject: _Subject, precision: Precision) -> dict[str, str]:
    """Return what a graph says about itself to those who have nothing else."""
    manifest = subject.checkpoint.manifest
    preprocess, backbone = manifest.preprocess, manifest.backbone
    packages = ("microclip-deploy", "torch", "onnx", "open_clip_torch")
    return {
        "format": SCHEMA,
        "task": "classify",
        "description": "microCLIP image classifier; README of microclip-deploy",
        "names": json.dumps(dict(enumerate(manifest.classes)), ensure_ascii=False),
        "imgsz": str(preprocess.size),
        "channels": "3",
        "precision": precision,
        "preprocess": json.dumps(
            {
                **preprocess.model_dump(),
                "resize": "short side, antialiased",
                "crop": "center",
                "input": "uint8 NHWC RGB; normalised inside the graph",
            }
        ),
        "ncut": json.dumps(manifest.ncut_spec().stored()),
        "clip_model": _clip_model(backbone),
        "backbone_sha256": backbone.sha256,
        "checkpoint_sha256": artifact.sha256_file(request.run / artifact.MANIFEST),
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


def _complete(folder: Path, request: ExportRequest, subject: _Subject, chosen: _Candidate) -> None:
    """Write class matrix, the head's matrices, stored images and, last, the manifest."""
    manifest, precision = subject.checkpoint.manifest, chosen.proof.precision
    matrix = subject.model.class_matrix().detach().numpy()
    artifact.write_bytes(folder / CLASSIFIER, save({"classifier": matrix}))
    head = {name: value.numpy() for name, value in HeadGraph(subject.model).named_parameters()}
    artifact.write_bytes(folder / HEAD_WEIGHTS, save(head))
    subject.reference.write(folder / PROBES)
    backbone = manifest.backbone
    content = {
        "package": {"name": "microclip-deploy", "version": version("microclip-deploy")},
        "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parent": {
            "checkpoint_sha256": artifact.sha256_file(request.run / artifact.MANIFEST),
            "model": backbone.model,
            "pretrained": backbone.pretrained,
            "backbone_sha256": backbone.sha256,
        },
        "precision": precision,
        "opset": OPSET,
        "preprocess": manifest.preprocess.model_dump(mode="json"),
        "ncut": manifest.ncut_spec().stored(),
        "cls_share": manifest.config.adapt.cls_share,
        "classes": list(manifest.classes),
        "unadapted": [],
        "templates": list(manifest.texts.templates),
        "classifier": CLASSIFIER,
        "graphs": {name: graph.model_dump(mode="json") for name, graph in chosen.graphs.items()},
        "limits": chosen.limits.model_dump(),
        "agreement": chosen.proof.agreement,
    }
    shared = [WEIGHTS] if (folder / WEIGHTS).is_file() else []
    files = [*chosen.graphs, *shared, CLASSIFIER, HEAD_WEIGHTS, PROBES, PARITY]
    artifact.write_manifest(folder, SCHEMA, content, files)
