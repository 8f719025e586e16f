"""What `adapt` does between parsing and printing: choose a device, check data, run, report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from microclip_deploy import artifact
from microclip_deploy.adapt.frequencies import summary, warning
from microclip_deploy.adapt.ranks import join, neighbours, own_device
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
from microclip_deploy.adapt.trainer import Operation, Prior, Recipe, StepReport, Validator
from microclip_deploy.cli.commands import gpu_memory, listing_too_many_bad, update_report
from microclip_deploy.config import merge, parse_override, read_recipe, resolve, validate
from microclip_deploy.console import (
    bar,
    counter,
    tell_left_out,
    tell_skipped,
    tell_warnings,
    waiting,
)
from microclip_deploy.data.classes import DEFAULT_TEMPLATES, class_texts
from microclip_deploy.data.contents import copies
from microclip_deploy.data.labelled import LabelledImages
from microclip_deploy.data.location import absolute
from microclip_deploy.data.sources import check_images, list_images
from microclip_deploy.errors import UsageError, printable
from microclip_deploy.evaluation.evaluate import accuracy
from microclip_deploy.evaluation.report import REPORT
from microclip_deploy.model.checkpoint import read_checkpoint
from microclip_deploy.model.clip import BackboneSpec, Clip, load_clip
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.model.text import TextHeads, text_heads
from microclip_deploy.model.weights import DEMO_MODELS, default_tag, file_warning
from microclip_deploy.processors import usable_cpus
from microclip_deploy.serving import open_run
from microclip_deploy.serving.torch_session import TorchSession, resolve_device
from microclip_deploy.verdict import Verdict

DEFAULT_MODEL = "ViT-B-32"
DEFAULT_RECIPE = "default"


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
    """Start or resume a run and write its checkpoint and report; return the manifest's content.

    Of several processes that torchrun started, all but the first return nothing.
    """
    if resume and overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it; give one of them")
    started = resume and (out / INPUTS).is_file()
    if not started and (asked.images is None or asked.classes is None):
        given = {"IMAGES": asked.images, "--classes FILE": asked.classes}
        missing = " and no ".join(name for name, value in given.items() if value is None)
        nothing = f"no started run in {out}, " if resume else ""
        raise UsageError(f"adapt: expected IMAGES and --classes FILE, found {nothing}no {missing}")
    device = resolve_device(own_device(device))
    ranks = join(device)
    operation = Operation(out, _workers(device) if workers is None else workers, save_every, ranks)
    if not ranks.leads:
        _help(operation, asked, device)
        return {}
    choose_device(device, notes)
    if ranks.count > 1:
        notes.print(f"processes: {ranks.count}, each with its share of every batch", markup=False)
    with locked(out), gpu_memory():
        if started:
            inputs, clip = _resumed(out, asked, device, notes)
            if (out / artifact.MANIFEST).is_file():
                ranks.wait()
                return _finished(out, device, clip, notes)
            inputs = _images_again(out, asked.images, inputs, notes)
            heads = text_heads(clip.text, inputs.texts())
        else:
            require_replaceable(out, overwrite)
            inputs, clip, heads = _new(out, asked, device, max_bad, notes)
            remove_run(out)
            write_inputs(out, inputs)
        ranks.wait()
        validator = _validator(inputs, clip, device)
        with bar(notes, "adapting") as progress:
            content = execute(
                inputs,
                operation,
                clip,
                heads,
                validator=validator,
                on_look=lambda done, total: progress.update(done, total, "looking at the photos"),
                on_prior=lambda prior: _tell_frequencies(prior, inputs, notes),
                on_step=_stepper(progress.update),
            )
        tell_warnings(content["warnings"], notes)
        told = Verdict.model_validate(content["verdict"]).sentence()
        notes.print(f"verdict without labels: {told}", markup=False)
        with open_run(out, device, clip=clip) as run:
            update_report(out, run, notes)
    notes.print(f"adapted: {printable(out)}", markup=False)
    return content


def _help(operation: Operation, asked: Asked, device: str) -> None:
    """Adapt with the first process, which has everything checked and written, if need be."""
    operation.ranks.wait()
    with gpu_memory():
        inputs, clip = _resumed(operation.directory, asked, device, Console(quiet=True))
        if not (operation.directory / artifact.MANIFEST).is_file():
            execute(inputs, operation, clip, text_heads(clip.text, inputs.texts()))


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
) -> tuple[RunInputs, Clip, TextHeads]:
    """Check everything a new run needs, cheapest first."""
    assert asked.images is not None, "checked by run_adapt"
    assert asked.classes is not None, "checked by run_adapt"
    recipe = resolve(Recipe, asked.recipe or DEFAULT_RECIPE, asked.overrides)
    texts = class_texts(asked.classes, asked.descriptions, asked.templates or DEFAULT_TEMPLATES)
    with counter(notes, "looking for images") as found:
        listed = list_images(asked.images, on_found=found)
    tell_left_out(listed.left_out.summary(), notes)
    if asked.val_dir is not None:
        LabelledImages.read(asked.val_dir, texts.names)
    backbone = _backbone(asked)
    doubt = file_warning(backbone.model, backbone.pretrained)
    with waiting(notes, "loading CLIP"):
        clip = load_clip(backbone, device)
    if doubt:
        notes.print(f"warning: {doubt}", style="yellow", markup=False)
    heads = text_heads(clip.text, texts)
    with listing_too_many_bad(out, notes), bar(notes, "checking images", "images") as progress:
        checked = check_images(
            listed.paths, recipe.photos, max_bad=max_bad, on_progress=progress.update
        )
    tell_skipped(checked.bad, notes, out / BAD_IMAGES)
    tell_warnings(checked.remarks, notes)
    notes.print(
        f"{len(checked.good)} images, {len(checked.bad)} skipped, {len(texts.names)} classes"
    )
    with bar(notes, "hashing images") as progress:
        inputs = make_inputs(
            clip,
            recipe,
            texts,
            good=checked.good,
            bad=checked.bad,
            val_dir=asked.val_dir,
            on_progress=progress.update,
            left_out=listed.left_out.to_json(),
            remarks=checked.remarks,
        )
    again = copies(checked.good, inputs.images_sha256 or ())
    if again:
        told = f"{len(again)} images are copies of others, such as {printable(again[0])}"
        notes.print(told, markup=False)
    return inputs, clip, heads


def _resumed(out: Path, asked: Asked, device: str, notes: Console) -> tuple[RunInputs, Clip]:
    """Read the inputs of a started run; what is given again must be the same."""
    inputs = read_inputs(out)
    differing = _differences(asked, inputs)
    if differing:
        raise UsageError(
            f"--resume: {out} was started with other inputs: {'; '.join(differing)}; drop "
            "these options, or start again with --overwrite"
        )
    if asked.val_dir is not None:
        inputs = inputs.model_copy(update={"val_dir": str(asked.val_dir)})
    notes.print(f"resuming {printable(out)}", markup=False)
    # A model that was moved may be named again: what it computes is what counts.
    given = asked.model or asked.pretrained
    clip = load_clip(_backbone(asked, inputs.backbone.model) if given else inputs.backbone, device)
    inputs.require_model(clip)
    return inputs, clip


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
    return found


def _images_again(out: Path, given: Path | None, inputs: RunInputs, notes: Console) -> RunInputs:
    """Make sure that the images are the ones the run began with, perhaps at another place now."""
    paths = () if given is None else list_images(given).paths
    with bar(notes, "checking images") as progress:
        if given is None or {absolute(path) for path in paths}.issuperset(inputs.images):
            inputs.require_images(progress.update)
            return inputs
        inputs = inputs.moved_to(paths, progress.update)
    write_inputs(out, inputs)
    notes.print(f"the images are found again in {given}", markup=False)
    return inputs


def _finished(directory: Path, device: str, clip: Clip, notes: Console) -> dict[str, Any]:
    """Verify a finished run and return its manifest."""
    read_checkpoint(directory)
    notes.print(f"{printable(directory)}: already finished", markup=False)
    if not (directory / REPORT).is_file():
        with open_run(directory, device, clip=clip) as run:
            update_report(directory, run, notes)
    return dict(artifact.read_json(directory / artifact.MANIFEST))


def _backbone(asked: Asked, default: str = DEFAULT_MODEL) -> BackboneSpec:
    model = asked.model or default
    located = model in DEMO_MODELS or model.startswith(("hf-hub:", "local-dir:"))
    if model.startswith("local-dir:"):
        model = f"local-dir:{Path(model.removeprefix('local-dir:')).absolute()}"
    if located and asked.pretrained:
        raise UsageError(f"--pretrained: --model {model} names its weights itself; leave it out")
    if located:
        return BackboneSpec(model=model)
    pretrained = asked.pretrained or default_tag(model)
    if pretrained is not None and Path(pretrained).is_file():
        pretrained = str(Path(pretrained).absolute())
    return BackboneSpec(model=model, pretrained=pretrained)


def _workers(device: str) -> int:
    """Leave a small CPU to the model; keep a GPU fed."""
    return min(8, max(usable_cpus() // neighbours(), 1)) if device.startswith("cuda") else 0


def _tell_frequencies(prior: Prior, inputs: RunInputs, notes: Console) -> None:
    found, photos = prior.frequencies, len(inputs.images)
    notes.print(summary(found, inputs.classes, photos), markup=False)
    doubt = warning(found, photos, inputs.recipe.adapt)
    tell_warnings([doubt] if doubt else [], notes)


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
        session = TorchSession(model, inputs.classes, inputs.preprocess(clip), device)
        return accuracy(session, labelled)

    return measure
