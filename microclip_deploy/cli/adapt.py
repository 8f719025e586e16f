"""What `adapt` does between parsing and printing: choose a device, check data, run, report."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from microclip_deploy import artifact
from microclip_deploy.adapt.run import execute
from microclip_deploy.adapt.run_directory import (
    BAD_IMAGES,
    INPUTS,
    RunInputs,
    locked,
    make_inputs,
    read_inputs,
    remove_run,
    require_replaceable,
    write_inputs,
)
from microclip_deploy.adapt.trainer import Operation, Recipe, StepReport, Validator
from microclip_deploy.cli.commands import gpu_memory, listing_too_many_bad, update_report
from microclip_deploy.config import merge, parse_override, read_recipe, resolve, validate
from microclip_deploy.console import bar, tell_skipped, waiting
from microclip_deploy.data.classes import DEFAULT_TEMPLATES, class_texts
from microclip_deploy.data.labelled import LabelledImages
from microclip_deploy.data.sources import check_images, list_images
from microclip_deploy.errors import UsageError, printable
from microclip_deploy.evaluation.evaluate import accuracy
from microclip_deploy.evaluation.report import REPORT
from microclip_deploy.model.checkpoint import read_checkpoint
from microclip_deploy.model.clip import BackboneSpec, Clip, load_clip
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.serving import open_run
from microclip_deploy.serving.torch_session import TorchSession, resolve_device

DEFAULT_MODEL = "ViT-B-32"
DEFAULT_TAG = "openai"


class Asked(NamedTuple):
    """What a run is to be made of; its inputs hold the same once it has begun."""

    images: Path | None = None
    classes: Path | None = None
    descriptions: Path | None = None
    templates: tuple[str, ...] = ()
    model: str | None = None
    pretrained: str | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    val_dir: Path | None = None


def run_adapt(
    out: Path,
    asked: Asked,
    notes: Console,
    *,
    device: str = "auto",
    workers: int | None = None,
    max_bad: str = "1%",
    save_every: int = 200,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Start or resume a run and write its checkpoint and report; return the manifest's content."""
    if resume and overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it; give one of them")
    started = resume and (out / INPUTS).is_file()
    if not started and (asked.images is None or asked.classes is None):
        missing = f"no started run in {out}" if resume else "no images or classes"
        raise UsageError(f"adapt: expected IMAGES and --classes FILE, found {missing}")
    device = choose_device(device, notes)
    with locked(out), gpu_memory():
        if started:
            inputs, clip = _resumed(out, asked, device, notes)
        else:
            require_replaceable(out, overwrite)
            inputs, clip = _new(out, asked, device, max_bad, notes)
            remove_run(out)
            write_inputs(out, inputs)
        if started and (out / artifact.MANIFEST).is_file():
            return _finished(out, device, clip, notes)
        operation = Operation(out, _workers(device) if workers is None else workers, save_every)
        validator = _validator(inputs, clip, device)
        with bar(notes, "adapting") as progress:
            step = _stepper(progress.update)
            content = execute(inputs, operation, clip, validator=validator, on_step=step)
        for warning in content["warnings"]:
            notes.print(f"warning: {warning}", style="yellow", markup=False)
        with open_run(out, device, clip=clip) as run:
            update_report(out, run, notes)
    notes.print(f"adapted: {printable(out)}", markup=False)
    return content


def choose_device(device: str, notes: Console) -> str:
    """Turn "auto" into the device that will be used, and say so.

    Raises:
        UsageError: not the name of a device we know.
        EnvironmentProblem: a CUDA device was asked for and is not there.
    """
    device = resolve_device(device)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "this CPU"
    notes.print(f"device: {device} ({name})", markup=False)
    return device


def _new(
    out: Path, asked: Asked, device: str, max_bad: str, notes: Console
) -> tuple[RunInputs, Clip]:
    """Check everything a new run needs, cheapest first."""
    assert asked.images is not None, "checked by run_adapt"
    assert asked.classes is not None, "checked by run_adapt"
    recipe = resolve(Recipe, asked.recipe, asked.overrides)
    texts = class_texts(asked.classes, asked.descriptions, asked.templates or DEFAULT_TEMPLATES)
    with waiting(notes, f"looking for images in {printable(asked.images)}"):
        listed = list_images(asked.images)
    if asked.val_dir is not None:
        LabelledImages.read(asked.val_dir, texts.names)
    with waiting(notes, "loading CLIP"):
        clip = load_clip(_backbone(asked), device)
    with listing_too_many_bad(out, notes), bar(notes, "checking images", "images") as progress:
        checked = check_images(listed.paths, max_bad=max_bad, on_progress=progress.update)
    tell_skipped(checked.bad, notes, out / BAD_IMAGES)
    notes.print(
        f"{len(checked.good)} images, {len(checked.bad)} skipped, {len(texts.names)} classes"
    )
    good, bad = checked.good, checked.bad
    return make_inputs(clip, recipe, texts, good=good, bad=bad, val_dir=asked.val_dir), clip


def _resumed(out: Path, asked: Asked, device: str, notes: Console) -> tuple[RunInputs, Clip]:
    """Read the inputs of a started run; what is given again must be the same."""
    inputs = read_inputs(out)
    differing = _differences(asked, inputs)
    if differing:
        raise UsageError(
            f"--resume: {out} was started with other inputs: {'; '.join(differing)}; drop "
            "these options, or start again with --overwrite"
        )
    inputs.require_images()
    if asked.val_dir is not None:
        inputs = inputs.model_copy(update={"val_dir": str(asked.val_dir)})
    notes.print(f"resuming {printable(out)}", markup=False)
    # A model that was moved may be named again: its weights are what counts.
    return inputs, load_clip(_backbone(asked) if asked.model else inputs.backbone, device)


def _differences(asked: Asked, inputs: RunInputs) -> list[str]:
    """Name what a command line says otherwise than the inputs of the run it resumes."""
    given = read_recipe(asked.recipe) if asked.recipe else {}
    for override in asked.overrides:
        given = merge(given, parse_override(override))
    stored = inputs.recipe.model_dump()
    again = validate(Recipe, merge(stored, given)).model_dump()
    found = [
        f"{section}.{key} is {stored[section][key]}, given {value}"
        for section, fields in again.items()
        for key, value in fields.items()
        if value != stored[section][key]
    ]
    if asked.classes is not None:
        templates = asked.templates or inputs.templates
        texts = class_texts(asked.classes, asked.descriptions, templates)
        same = texts.descriptions == inputs.descriptions or asked.descriptions is None
        if texts.names != inputs.classes or texts.templates != inputs.templates or not same:
            found.append("class names, descriptions or templates")
    if asked.images is not None:
        present = {str(path.absolute()) for path in list_images(asked.images).paths}
        missing = [path for path in inputs.images if path not in present]
        if missing:
            found.append(f"images, {printable(missing[0])} among others is not in {asked.images}")
    return found


def _finished(directory: Path, device: str, clip: Clip, notes: Console) -> dict[str, Any]:
    """Verify a finished run and return its manifest."""
    read_checkpoint(directory)
    notes.print(f"{printable(directory)}: already finished", markup=False)
    if not (directory / REPORT).is_file():
        with open_run(directory, device, clip=clip) as run:
            update_report(directory, run, notes)
    return dict(artifact.read_json(directory / artifact.MANIFEST))


def _backbone(asked: Asked) -> BackboneSpec:
    model = asked.model or DEFAULT_MODEL
    located = model == "demo" or model.startswith(("hf-hub:", "local-dir:"))
    if model.startswith("local-dir:"):
        model = f"local-dir:{Path(model.removeprefix('local-dir:')).absolute()}"
    if located and asked.pretrained:
        raise UsageError(f"--pretrained: --model {model} already names its weights; drop it")
    if located:
        return BackboneSpec(model=model)
    pretrained = asked.pretrained or DEFAULT_TAG
    if Path(pretrained).is_file():
        pretrained = str(Path(pretrained).absolute())
    return BackboneSpec(model=model, pretrained=pretrained)


def _workers(device: str) -> int:
    """Leave a small CPU to the model; keep a GPU fed."""
    return min(8, os.cpu_count() or 1) if device.startswith("cuda") else 0


def _stepper(update: Callable[[int, int, str], None]) -> Callable[[StepReport], None]:
    def show(step: StepReport) -> None:
        note = f"epoch {step.epoch}  loss {step.loss:.3f}  {step.images_per_s:.0f} images/s"
        update(step.done, step.total, note)

    return show


def _validator(inputs: RunInputs, clip: Clip, device: str) -> Validator | None:
    """Return the measurement of the run's labelled folder, or None without one."""
    if inputs.val_dir is None:
        return None
    labelled = LabelledImages.read(Path(inputs.val_dir), inputs.classes)

    def measure(model: MicroCLIP, _labels: Tensor) -> Mapping[str, float]:
        return accuracy(TorchSession(model, inputs.classes, clip.preprocess, device), labelled)

    return measure
