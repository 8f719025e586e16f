"""What the commands do between parsing and printing: choose a device, check data, call."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from microclip_deploy import artifact
from microclip_deploy.adapt import Operation, Recipe, StepReport, Validator
from microclip_deploy.backbone import BackboneSpec, Clip, load_clip
from microclip_deploy.classes import DEFAULT_TEMPLATES, class_texts
from microclip_deploy.config import resolve
from microclip_deploy.errors import EnvironmentProblem, UsageError
from microclip_deploy.evaluate import EVALUATION, Evaluation, accuracy, evaluate
from microclip_deploy.images import printable
from microclip_deploy.labelled_images import LabelledImages
from microclip_deploy.model import MicroCLIP
from microclip_deploy.predict import CsvWriter, JsonLinesWriter, OverlayWriter, predict, table
from microclip_deploy.progress import bar
from microclip_deploy.report import REPORT, write_report
from microclip_deploy.run import (
    INPUTS,
    RunInputs,
    execute,
    locked,
    make_inputs,
    read_inputs,
    require_unused,
    write_inputs,
)
from microclip_deploy.serving import open_session
from microclip_deploy.serving.torch_backend import TorchSession, require_device
from microclip_deploy.sources import check_images, list_images

DEFAULT_TAG = "openai"


@dataclass(frozen=True)
class AdaptRequest:
    """The options of `adapt` as they were given."""

    out: Path
    images: Path | None = None
    classes: Path | None = None
    descriptions: Path | None = None
    templates: tuple[str, ...] = ()
    model: str = "ViT-B-32"
    pretrained: str | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    val_dir: Path | None = None
    device: str = "auto"
    workers: int | None = None
    max_bad_images: str = "1%"
    save_every: int = 200
    resume: bool = False
    overwrite: bool = False


def run_adapt(request: AdaptRequest, notes: Console) -> dict[str, Any]:
    """Start or resume a run and write its checkpoint and report; return the manifest's content."""
    device = choose_device(request.device, notes)
    with locked(request.out):
        resuming = request.resume and (request.out / INPUTS).is_file()
        if resuming and (request.out / artifact.MANIFEST).is_file():
            notes.print(f"{request.out}: already finished", markup=False)
            if not (request.out / REPORT).is_file():
                _report(request.out, device, notes)
            return dict(artifact.read_json(request.out / artifact.MANIFEST))
        inputs, clip = (_resumed if resuming else _new)(request, device, notes)
        validator = _validator(request.val_dir, inputs, clip, device)
        workers = request.workers if request.workers is not None else _default_workers(device)
        operation = Operation(request.out, workers, request.save_every)
        with bar(notes, "adapting") as progress:
            content = execute(
                inputs, operation, clip, validator=validator, on_step=_stepper(progress.update)
            )
    for warning in content["warnings"]:
        notes.print(f"warning: {warning}", style="yellow", markup=False)
    _report(request.out, device, notes)
    notes.print(f"adapted: {request.out}", markup=False)
    return content


def choose_device(device: str, notes: Console) -> str:
    """Turn "auto" into the device that will be used, and say so.

    Raises:
        EnvironmentProblem: a CUDA device was asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    require_device(device)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "this CPU"
    notes.print(f"device: {device} ({name})", markup=False)
    return device


def _new(request: AdaptRequest, device: str, notes: Console) -> tuple[RunInputs, Clip]:
    """Check everything a new run needs, cheapest first, and write its inputs."""
    if request.images is None or request.classes is None:
        raise UsageError(
            "adapt: expected IMAGES and --classes FILE (or --resume with a started run)"
        )
    require_unused(request.out, request.overwrite)
    recipe = resolve(Recipe, request.recipe, request.overrides)
    texts = class_texts(
        request.classes, request.descriptions, request.templates or DEFAULT_TEMPLATES
    )
    listed = list_images(request.images)
    clip = load_clip(_backbone(request), device)
    with bar(notes, "checking images") as progress:
        checked = check_images(
            listed.paths, max_bad=request.max_bad_images, on_progress=progress.update
        )
    for file in checked.bad:
        notes.print(f"skipped: {printable(file.path)}: {file.reason}", style="yellow", markup=False)
    notes.print(
        f"{len(checked.good)} images, {len(checked.bad)} skipped, {len(texts.names)} classes"
    )
    inputs = make_inputs(clip, recipe, texts, checked.good, checked.bad)
    write_inputs(request.out, inputs)
    return inputs, clip


def _resumed(request: AdaptRequest, device: str, notes: Console) -> tuple[RunInputs, Clip]:
    """Read the inputs of a started run; settings given again must be the same."""
    inputs = read_inputs(request.out)
    if request.recipe or request.overrides:
        again = resolve(Recipe, request.recipe, request.overrides)
        if again != inputs.recipe:
            raise UsageError(
                f"--resume: {request.out} was started with other settings (config.json); drop "
                "--recipe and --set, or start again with --overwrite"
            )
    notes.print(f"resuming {request.out}", markup=False)
    return inputs, load_clip(inputs.backbone, device)


def _backbone(request: AdaptRequest) -> BackboneSpec:
    located = request.model == "demo" or request.model.startswith(("hf-hub:", "local-dir:"))
    model = request.model
    if model.startswith("local-dir:"):
        model = f"local-dir:{Path(model.removeprefix('local-dir:')).absolute()}"
    if located and request.pretrained:
        raise UsageError(
            f"--pretrained: --model {request.model} already names its weights; drop it"
        )
    if located:
        return BackboneSpec(model=model)
    pretrained = request.pretrained or DEFAULT_TAG
    if Path(pretrained).is_file():
        pretrained = str(Path(pretrained).absolute())
    return BackboneSpec(model=model, pretrained=pretrained)


def _default_workers(device: str) -> int:
    """Leave a small CPU to the model; keep a GPU fed."""
    return min(8, os.cpu_count() or 1) if device.startswith("cuda") else 0


def _stepper(update: Callable[[int, int, str], None]) -> Callable[[StepReport], None]:
    def show(step: StepReport) -> None:
        note = f"epoch {step.epoch}  loss {step.loss:.3f}  {step.images_per_s:.0f} images/s"
        update(step.done, step.total, note)

    return show


def _validator(
    val_dir: Path | None, inputs: RunInputs, clip: Clip, device: str
) -> Validator | None:
    """Return the measurement of a labelled folder, or None without one."""
    if val_dir is None:
        return None
    labelled = LabelledImages.read(val_dir, inputs.classes)

    def measure(model: MicroCLIP, _labels: Tensor) -> Mapping[str, float]:
        return accuracy(TorchSession(model, inputs.classes, clip.preprocess, device), labelled)

    return measure


def run_evaluate(
    run: Path, data: Path, device: str, batch_size: int, zero_shot: bool, notes: Console
) -> Evaluation:
    """Evaluate a run on labelled images and put the outcome into its report."""
    device = choose_device(device, notes)
    with bar(notes, "evaluating") as progress:
        found = evaluate(
            run,
            data,
            device=device,
            batch_size=batch_size,
            zero_shot=zero_shot,
            progress=progress.update,
        )
    try:
        artifact.write_json(run / EVALUATION, found.to_json())
        _report(run, device, notes)
    except EnvironmentProblem as error:  # a read-only run directory can still be evaluated
        notes.print(f"warning: {error}", style="yellow", markup=False)
    return found


@dataclass(frozen=True)
class PredictRequest:
    """The options of `predict` as they were given."""

    run: Path
    images: tuple[Path, ...]
    top_k: int
    output_format: Literal["table", "csv", "jsonl"]
    overlay: Path | None
    device: str
    batch_size: int


def run_predict(request: PredictRequest, out: Console, notes: Console) -> None:
    """Classify images and print the results as they come."""
    device = choose_device(request.device, notes)
    overlays = OverlayWriter(request.overlay) if request.overlay else None
    with open_session(request.run, device) as session:
        results = predict(session, request.images, request.top_k, batch_size=request.batch_size)
        if request.output_format == "table":
            out.print(table(results, overlays.write if overlays else None))
            return
        as_csv = request.output_format == "csv"
        writer = CsvWriter(sys.stdout, request.top_k) if as_csv else JsonLinesWriter(sys.stdout)
        for result in results:
            writer.write(result)
            if overlays:
                overlays.write(result)


def _report(directory: Path, device: str, notes: Console) -> None:
    """Write report.html; the checkpoint is complete without it."""
    write_report(directory, device=device)
    notes.print(f"report: {directory / 'report.html'}", markup=False)
