"""The proof of engines on the GPU that serves them: of those just built, and of those built ahead.

`verify` proves the second kind where they are: each GPU has a folder of its proof inside theirs,
and the manifest names it once it is proven.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from microclip_deploy import artifact
from microclip_deploy.export.proof.judge import Proof, require_proven
from microclip_deploy.export.proof.limits import Tolerance
from microclip_deploy.export.proof.probes import Photos, photos_with
from microclip_deploy.export.proof.verify import stored_tolerance
from microclip_deploy.serving.engines import (
    BACKBONE_PLAN,
    KERNELS,
    EngineManifest,
    Engines,
    Target,
    has_unproven,
    unproven_engines,
)
from microclip_deploy.serving.exported import PARITY, Export, read_export
from microclip_deploy.serving.flavour import devices, flavour_here

if TYPE_CHECKING:
    import cupy

    from microclip_deploy.export.proof.engine_parity import Subject

REMEDY = "the engines are not used; update TensorRT, or export with a more exact --dtype"


def prove_built(
    directory: Path,
    notes: Console,
    *,
    images: Path | None = None,
    device: str = "cuda",
    **reading: int | None,
) -> list[Proof]:
    """Prove the engines that were built elsewhere and fit this machine, and mark them proven here.

    Args:
        directory: the export.
        notes: gets progress and remarks.
        images: the user's, proven on as well.
        device: as for `run_build`.
        reading: as for `run_build`.

    Returns:
        A proof for each folder of engines; none without a GPU and its library.

    Raises:
        CheckpointError: export or engines are damaged, or the library refuses a plan.
        EnvironmentProblem: the GPU or its memory fails.
        VerificationError: engines that depart; they stay unproven.
    """
    if flavour_here() is None or not devices():
        if has_unproven(directory):
            notes.print("engines: still not proven, for want of a GPU and its TensorRT here")
        return []
    import cupy

    from microclip_deploy.serving.cuda_pipeline import cuda_errors, open_stream
    from microclip_deploy.serving.tensorrt_engine import target

    export = read_export(directory)
    device = device if device.startswith("cuda") else "cuda"
    stream = open_stream(device)
    here = target(stream.device_id)
    waiting = unproven_engines(export, here)
    if not waiting:
        return []
    preprocess = export.manifest.preprocess.reading(**reading)
    photos = photos_with(images, preprocess.size, notes, preprocess.photos)
    with cuda_errors(device), cupy.cuda.Device(stream.device_id):
        return [
            _prove_in_place(export, engines, here, stream, photos, notes) for engines in waiting
        ]


def _prove_in_place(
    export: Export,
    engines: Engines,
    here: Target,
    stream: "cupy.cuda.Stream",
    photos: Photos,
    notes: Console,
) -> Proof:
    """Prove engines where they are; the proof gets a folder for each GPU."""
    directory, manifest = engines.directory, engines.manifest
    folder = directory / here.gpu_slug
    artifact.make_directory(folder)
    plans = {plan: engines.plan(plan) for plan in manifest.plans}
    tolerance = stored_tolerance(export)
    on_this_gpu = manifest.model_copy(update={"target": here})
    proof = prove_plans(folder, plans, export, on_this_gpu, stream, photos, tolerance, notes)
    require_proven(proof, folder / PARITY, REMEDY)
    names = (*map(layers_of, plans), PARITY, KERNELS)
    added = [f"{folder.name}/{name}" for name in names if (folder / name).is_file()]
    proven = sorted({*(manifest.proven or ()), here.gpu})
    stored = {**engines.stored, "proven": proven, "agreement": proof.agreement}
    artifact.rewrite_manifest(directory, stored, added)
    notes.print(f"engines: {directory} ({proof.precision}, proven on {here.gpu})", markup=False)
    return proof


def prove_plans(
    folder: Path,
    plans: Mapping[str, bytes],
    export: Export,
    manifest: EngineManifest,
    stream: "cupy.cuda.Stream",
    photos: Photos,
    tolerance: Tolerance,
    notes: Console,
) -> Proof:
    """Load the plans, compare them with ONNX Runtime, and write the proof into the folder."""
    from microclip_deploy.export.proof.engine_parity import onnx_reference, prove_engines

    notes.print("asking ONNX Runtime")
    reference = onnx_reference(export, photos.views(export.manifest.preprocess))
    notes.print("proving engines")
    subject = _subject(folder, plans, export, manifest, stream)
    try:
        proof = prove_engines(export, subject, reference, photos, tolerance)
        kernels = subject.served.kernels()
    finally:
        subject.session.close()
    if kernels:  # those that served are those that are kept
        artifact.write_bytes(folder / KERNELS, kernels)
    artifact.write_json(folder / PARITY, proof.model_dump())
    return proof


def _subject(
    folder: Path,
    data: Mapping[str, bytes],
    export: Export,
    manifest: EngineManifest,
    stream: "cupy.cuda.Stream",
) -> "Subject":
    """Load what is proven from the very bytes that will be served."""
    from microclip_deploy.export.proof.engine_parity import Subject
    from microclip_deploy.serving.tensorrt_encoder import session_of
    from microclip_deploy.serving.tensorrt_engine import Engine

    plans = {plan: Engine(data[plan], stream, plan) for plan in data}
    layers: dict[str, Any] = {}
    for plan, engine in plans.items():
        layers[plan] = engine.layers()
        artifact.write_json(folder / layers_of(plan), layers[plan])
    served = Engine(data[BACKBONE_PLAN], stream, BACKBONE_PLAN)
    session = session_of(export, manifest, served, stream)
    return Subject(manifest, plans, session, served, layers, stream)


def layers_of(plan: str) -> str:
    """Return the file of what the inspector tells of a plan."""
    return f"{Path(plan).stem}.layers.json"
