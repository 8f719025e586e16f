"""`verify`: prove an export again on this machine, without PyTorch or against the checkpoint."""

import re
from pathlib import Path

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from microclip_deploy import artifact
from microclip_deploy.config import validate
from microclip_deploy.console import bar
from microclip_deploy.errors import CheckpointError, EnvironmentProblem, UsageError, require
from microclip_deploy.export.proof.answers import Graphs
from microclip_deploy.export.proof.judge import Proof
from microclip_deploy.export.proof.limits import ForwardError, Tolerance
from microclip_deploy.export.proof.parity import compare_pixels, prove
from microclip_deploy.export.proof.probes import Photos, Reference, photos_with
from microclip_deploy.export.proof.quantised import quantisation_error
from microclip_deploy.serving.exported import BACKBONE, PROBES, Export, read_export

VERIFIED = "verify.json"
"""The newest proof on this machine; parity.json is the one from the export."""

_SHOWN = 10  # flips that a table lists


class _EarlierLimits(BaseModel):
    """What earlier exports stored instead of a tolerance, as far as users could change it."""

    logits: float | None = None
    logits_relative: float | None = None
    """Share of the largest logit that is allowed besides; None or 0 where the user decided."""
    top1: float


def run_verify(
    directory: Path,
    notes: Console,
    *,
    run: Path | None = None,
    images: Path | None = None,
    device: str = "cpu",
    **reading: int | None,
) -> Proof:
    """Prove an export and write the proof beside it.

    Args:
        directory: the export.
        notes: progress and remarks.
        run: where its model is, to answer anew; None: PyTorch's stored answers are what counts.
        images: the user's, for the run to answer to as well.
        device: as for `require_one_device`.
        reading: `max_pixels` and `bit_depth` in place of those of the export.

    Raises:
        UsageError: images without a run.
        CheckpointError: export or run are missing, damaged, or do not belong together.
        DataError: no image can be read.
    """
    if images is not None and run is None:
        raise UsageError(
            "--images: PyTorch must answer to them; give the run that was exported with --run"
        )
    require_one_device(device)
    export = read_export(directory)
    manifest = export.manifest
    preprocess = manifest.preprocess.reading(**reading)
    photos = photos_with(images, preprocess.size, notes, preprocess.photos)
    tolerance = stored_tolerance(export)
    if run is None:
        reference = Reference.read(directory / PROBES)
    else:
        reference, error = _answers_of(run, export, photos, notes)
        changes: dict[str, object] = {"error": error.or_more(tolerance.error)}
        if tolerance.quantised is not None:
            quantised = quantisation_error(directory / BACKBONE, reference)
            changes["quantised"] = quantised.or_more(tolerance.quantised)
        tolerance = tolerance.model_copy(update=changes)
    graphs = Graphs(
        directory,
        manifest.precision,
        manifest.ncut_spec(),
        export.classifier,
        manifest.cls_share,
    )
    with bar(notes, "proving") as progress:
        proof = prove(
            graphs,
            reference,
            photos,
            tolerance=tolerance,
            pixels=compare_pixels(photos.read(), reference.images, manifest.preprocess),
            device=device,
            progress=progress.update,
        )
    try:
        artifact.write_json(directory / VERIFIED, proof.model_dump())
    except EnvironmentProblem as error:  # a read-only export can still be verified
        notes.print(f"warning: {error}", style="yellow", markup=False)
    return proof


def require_one_device(device: str) -> None:
    """Refuse "auto": a proof names the device it was made on.

    Raises:
        UsageError: not one device.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?|openvino", device):
        raise UsageError(
            f"--device: expected cpu, cuda, cuda:N or openvino, found {device}; name one of them"
        )


def table(proof: Proof) -> Table:
    """Return the stages for a terminal."""
    sizes = ", ".join(f"{size}: {value:.1e}" for size, value in proof.batches.items())
    notes = [
        f"{proof.images} {proof.source}; same class: {proof.agreement:.2%} of all answers",
        f"largest difference of logits by batch size: {sizes}",
        f"masks: {len(proof.undetermined)} images undetermined, {len(proof.other_masks)} differ",
    ]
    flips = [f"{f.image}: class {f.torch} -> {f.onnx}, margin {f.margin:.3g}" for f in proof.flips]
    notes += flips[:_SHOWN]
    if len(flips) > _SHOWN:
        notes.append(f"and {len(flips) - _SHOWN} more")
    shown = Table(
        title=f"{proof.precision} against {proof.reference}, on {proof.device}",
        caption=Text("\n".join(notes)),
        caption_justify="left",
    )
    for heading in ("graph", "stage"):
        shown.add_column(heading)
    for heading in ("difference", "relative", "least cosine", "limit"):
        shown.add_column(heading, justify="right")
    for stage in proof.stages:
        relative = "" if stage.relative is None else f"{stage.relative:.1e}"
        cosine = "" if stage.cosine is None else f"{stage.cosine:.6f}"
        limit = "" if stage.limit is None else f"{stage.limit:.0e}"
        cells = (stage.graph, stage.stage, f"{stage.difference:.1e}", relative, cosine, limit)
        shown.add_row(*cells, style="bold red" if stage.departs else "")
    return shown


def stored_tolerance(export: Export) -> Tolerance:
    """Return the tolerance that the export was proven with."""
    key = "tolerance" if "tolerance" in export.stored else "limits"
    try:
        if key == "tolerance":
            return validate(Tolerance, export.stored[key])
        earlier = validate(_EarlierLimits, export.stored.get(key, {}))
    except UsageError as error:
        raise CheckpointError(
            f"{export.directory / artifact.MANIFEST}: {key}: {error}; export again"
        ) from error
    own = Tolerance().limits(export.manifest.precision)
    return Tolerance(
        atol=None if earlier.logits_relative else earlier.logits,
        min_agreement=None if earlier.top1 == own.top1 else 1 - earlier.top1,
    )


def _answers_of(
    run: Path, export: Export, photos: Photos, notes: Console
) -> tuple[Reference, ForwardError]:
    """Ask the model of a run, and measure its rounding."""
    require("torch", "adapt")
    from microclip_deploy.export.proof.forward_error import forward_error
    from microclip_deploy.model.checkpoint import load_model, read_checkpoint

    checkpoint, preprocess = read_checkpoint(run), export.manifest.preprocess
    expected, given = (
        export.manifest.parent.checkpoint_sha256,
        artifact.sha256_file(run / artifact.MANIFEST),
    )
    if given != expected:
        raise CheckpointError(
            f"--run {run}: expected the run that was exported, manifest sha256 {expected[:12]}, "
            f"found {given[:12]}; give the right one, or export this one"
        )
    model = load_model(checkpoint)
    with bar(notes, "asking PyTorch") as progress:
        reference = Reference.of(model, preprocess, photos.views(preprocess), progress.update)
    with bar(notes, "asking PyTorch in float64") as progress:
        return reference, forward_error(model, preprocess, reference, progress.update)
