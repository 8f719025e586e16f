"""`verify`: prove an export again on this machine, without PyTorch or against the checkpoint."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from microclip_deploy import artifact
from microclip_deploy.config import validate
from microclip_deploy.console import bar, tell_skipped
from microclip_deploy.errors import (
    CheckpointError,
    EnvironmentProblem,
    UsageError,
    VerificationError,
    printable,
    require,
)
from microclip_deploy.export.proof.limits import Limits
from microclip_deploy.export.proof.parity import Proof, Serving, compare_pixels, prove
from microclip_deploy.export.proof.probes import Photos, Reference, made_up_photos, with_users
from microclip_deploy.serving.exported import PROBES, Export, read_export

if TYPE_CHECKING:
    from rich.table import Table

VERIFIED = "verify.json"
"""The newest proof on this machine; parity.json is the one from the export."""

_SHOWN = 10  # flips that a table lists


@dataclass(frozen=True)
class VerifyRequest:
    """The options of `verify` as they were given."""

    export: Path
    run: Path | None = None
    images: Path | None = None
    device: str = "cpu"


def run_verify(request: VerifyRequest, notes: Console) -> Proof:
    """Prove an export and write the proof beside it.

    Without a run the stored answers of PyTorch to the stored images are what counts; with one,
    the run's model answers anew, to the user's images if given.

    Raises:
        UsageError: images without a run.
        CheckpointError: export or run are missing, damaged, or do not belong together.
        DataError: no image can be read.
    """
    if request.images is not None and request.run is None:
        raise UsageError(
            "--images: PyTorch must answer to them; give the run that was exported with --run"
        )
    require_one_device(request.device)
    export = read_export(request.export)
    preprocess = export.manifest.preprocess
    photos = made_up_photos(preprocess.size)
    if request.images is not None:
        photos = with_users(photos, request.images)
        tell_skipped(photos.bad, notes)
    if request.run is None:
        reference = Reference.read(request.export / PROBES)
    else:
        reference = _answers_of(request.run, export, photos, notes)
    with bar(notes, "proving") as progress:
        proof = prove(
            request.export,
            reference,
            export.manifest.ncut_spec(),
            export.manifest.precision,
            limits=stored_limits(export),
            serving=Serving(export.classifier, export.manifest.cls_share),
            pixels=compare_pixels(photos.read(), reference.images, preprocess),
            names=photos.names,
            source=photos.source,
            device=request.device,
            progress=progress.update,
        )
    try:
        artifact.write_json(request.export / VERIFIED, proof.model_dump())
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


def require_proven(proof: Proof, evidence: Path) -> None:
    """Refuse an export that departs.

    Raises:
        VerificationError: with the first stage that departs and where the evidence is.
    """
    if proof.departure is None:
        return
    stage = next(stage for stage in proof.stages if stage.departs)
    wanted = "a number" if stage.limit is None else f"at most {stage.limit:.3g} from PyTorch"
    remedy = (
        "use the Pillow and torchvision of the export"
        if stage is proof.stages[0]
        else "choose a more exact --dtype, or export again"
    )
    raise VerificationError(
        f"{proof.departure}: expected {wanted}, found {stage.difference:.3g} on {proof.images} "
        f"images ({proof.precision}, {proof.device}); evidence: {printable(evidence)}; {remedy}"
    )


def table(proof: Proof) -> "Table":
    """Return the stages for a terminal."""
    from rich.table import Table
    from rich.text import Text

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
    found = Table(
        title=f"{proof.precision} against {proof.reference}, on {proof.device}",
        caption=Text("\n".join(notes)),
        caption_justify="left",
    )
    for heading in ("graph", "stage"):
        found.add_column(heading)
    for heading in ("difference", "relative", "least cosine", "limit"):
        found.add_column(heading, justify="right")
    for stage in proof.stages:
        relative = "" if stage.relative is None else f"{stage.relative:.1e}"
        cosine = "" if stage.cosine is None else f"{stage.cosine:.6f}"
        limit = "" if stage.limit is None else f"{stage.limit:.0e}"
        cells = (stage.graph, stage.stage, f"{stage.difference:.1e}", relative, cosine, limit)
        found.add_row(*cells, style="bold red" if stage.departs else "")
    return found


def stored_limits(export: Export) -> Limits:
    """Return the limits that the export was proven with."""
    try:
        return validate(Limits, export.stored.get("limits") or {})
    except UsageError as error:
        raise CheckpointError(
            f"{export.directory / artifact.MANIFEST}: limits: {error}; export again"
        ) from error


def _answers_of(run: Path, export: Export, photos: Photos, notes: Console) -> Reference:
    """Ask the model of a run."""
    require("torch", "adapt")
    from microclip_deploy.model.checkpoint import load_model, read_checkpoint

    checkpoint = read_checkpoint(run)
    found = artifact.sha256_file(run / artifact.MANIFEST)
    expected = export.manifest.parent.checkpoint_sha256
    if found != expected:
        raise CheckpointError(
            f"--run {run}: expected the run that was exported, manifest sha256 {expected[:12]}, "
            f"found {found[:12]}; give the right one, or export this one"
        )
    with bar(notes, "asking PyTorch") as progress:
        return Reference.of(
            load_model(checkpoint),
            export.manifest.preprocess,
            photos.views(export.manifest.preprocess),
            progress.update,
        )
