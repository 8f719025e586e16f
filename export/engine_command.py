"""`export --trt`: build engines for this machine, prove them, and only then put them in place.

They are written into a hidden folder beside their place, which they take when they are proven;
earlier engines stay until then. Engines that are not proven are kept as NAME.failed, without a
manifest: evidence, never loaded.
"""

import datetime
import importlib.util
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from microclip_deploy import artifact
from microclip_deploy.console import bar
from microclip_deploy.errors import (
    CheckpointError,
    EnvironmentProblem,
    VerificationError,
    printable,
)
from microclip_deploy.export.build_options import require_buildable, spelled
from microclip_deploy.export.proof.judge import Proof, require_proven
from microclip_deploy.export.proof.limits import Tolerance
from microclip_deploy.export.proof.probes import Photos, photos_with
from microclip_deploy.export.proof.verify import stored_tolerance
from microclip_deploy.serving.engines import (
    BACKBONE_PLAN,
    ENGINES,
    PLAN_OF,
    SCHEMA,
    BuildOptions,
    EngineManifest,
    PlanSpec,
    Span,
    Target,
)
from microclip_deploy.serving.exported import PARITY, Export, read_export

if TYPE_CHECKING:
    import cupy

    from microclip_deploy.export.proof.engine_parity import Subject

BUILD_LOG = "build.log"

MOST_CLASSES = 4096
"""Rows of the class matrix that a full plan takes, or twice those of the build if that is more."""


def run_build(
    directory: Path,
    options: BuildOptions,
    notes: Console,
    *,
    timing_cache: Path | None = None,
    images: Path | None = None,
    device: str = "cuda",
    atol: float | None = None,
    min_agreement: float | None = None,
    **reading: int | None,
) -> Proof:
    """Build the engines of an export for this machine and return their proof.

    Args:
        directory: the export.
        options: how to build.
        notes: gets progress and remarks.
        timing_cache: folder of timing caches; None: the export's folder of engines.
        images: the user's, proven on as well.
        device: "cuda" or "cuda:N"; any other stands for "cuda".
        atol: as for `Tolerance.changed`.
        min_agreement: as for `Tolerance.changed`.
        reading: `max_pixels` and `bit_depth` in place of those of the export.

    Raises:
        CheckpointError: the export is damaged, or TensorRT cannot read its graphs.
        EnvironmentProblem: TensorRT, the GPU or its memory is missing; the export is untouched.
        UsageError: an export in a precision that TensorRT has no graph for.
        VerificationError: engines that depart; the evidence is kept.
    """
    export = read_export(directory)
    require_buildable(export.manifest.precision)
    others: dict[str, Any] = {"--timing-cache": timing_cache, "--images": images}
    others |= {"--atol": atol, "--min-agreement": min_agreement}
    others |= {f"--{name.replace('_', '-')}": value for name, value in reading.items()}
    _require_toolchain(directory, spelled(options, others))
    import cupy

    from microclip_deploy.serving.cuda_pipeline import cuda_errors, open_stream
    from microclip_deploy.serving.tensorrt_engine import target

    device = device if device.startswith("cuda") else "cuda"
    stream = open_stream(device)
    here = target(stream.device_id)
    tolerance = stored_tolerance(export).changed(atol, min_agreement)
    place = directory / ENGINES / here.folder
    evidence = place.with_name(f"{place.name}.failed")
    with (
        artifact.staged_directory(place) as folder,
        _kept_as(evidence, folder, notes),
        cuda_errors(device),
        cupy.cuda.Device(stream.device_id),  # TensorRT builds for the current one
    ):
        caches = timing_cache or directory / ENGINES
        manifest = _build_plans(folder, export, options, here, caches, notes)
        preprocess = export.manifest.preprocess.reading(**reading)
        photos = photos_with(images, preprocess.size, notes, preprocess.photos)
        proof = _prove(folder, export, manifest, stream, photos, tolerance, notes)
        remedy = "the engines are not used; update TensorRT, or export with a more exact --dtype"
        require_proven(proof, evidence / PARITY, remedy)
        _complete(folder, manifest, proof)
    notes.print(f"engines: {place} ({proof.precision}, proven)", markup=False)
    return proof


def _require_toolchain(directory: Path, options: str) -> None:
    """Name everything that is missing at once, and how to go on elsewhere."""
    missing = [f"package '{name}'" for name in _absent(("cupy", "onnx", "tensorrt"))]
    if not _absent(("cupy",)) and not _devices():
        missing.append("CUDA device")
    if not missing:
        return
    command = f"microclip-deploy export {shlex.quote(str(directory))} --trt{options}"
    raise EnvironmentProblem(
        f"--trt: expected TensorRT and an NVIDIA GPU, found no {' and no '.join(missing)}; "
        f"{printable(directory)} is complete without engines. On the machine that will serve, "
        f'run: pip install "microclip-deploy[export,gpu]", then: {command}'
    )


def _absent(packages: Iterable[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _devices() -> int:
    """Count CUDA devices; before TensorRT is touched, which crashes without one."""
    import cupy

    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


@contextmanager
def _kept_as(evidence: Path, folder: Path, notes: Console) -> Iterator[None]:
    """Keep a folder whose engines cannot be built or proven, for those who want to know why."""
    try:
        yield
    except (CheckpointError, EnvironmentProblem, VerificationError):
        shutil.rmtree(evidence, ignore_errors=True)
        folder.replace(evidence)
        notes.print(f"evidence: {printable(evidence)}", markup=False)
        raise


def _build_plans(
    folder: Path,
    export: Export,
    options: BuildOptions,
    here: Target,
    caches: Path,
    notes: Console,
) -> EngineManifest:
    """Build and write the plans; return what is known of them before they are proven."""
    from microclip_deploy.export.to_tensorrt import build_plan
    from microclip_deploy.serving.tensorrt_library import LOG

    count = len(export.classifier)
    classes = Span(least=2, opt=count, most=max(MOST_CLASSES, 2 * count))
    plans = {}
    LOG.taken()
    try:
        for graph, plan in PLAN_OF.items():
            with bar(notes, f"building {plan}") as progress:
                built = build_plan(
                    export.directory / graph,
                    options,
                    classes,
                    timing_cache=caches / f"{here.folder}.timing-cache",
                    progress=progress.update,
                )
            artifact.write_bytes(folder / plan, built.plan)
            products = ", ".join(f"{n} in {kind}" for kind, n in built.products.items())
            notes.print(f"{plan}: {len(built.plan) / 2**20:.0f} MiB; products: {products}")
            plans[plan] = PlanSpec(
                graph=graph,
                graph_sha256=export.stored["files"][graph]["sha256"],
                tensors=export.manifest.graphs[graph],
            )
    finally:
        artifact.write_bytes(folder / BUILD_LOG, "\n".join(LOG.taken()).encode())
    return EngineManifest(
        target=here,
        precision=export.manifest.precision,
        options=options,
        classes=classes,
        plans=plans,
    )


def _prove(
    folder: Path,
    export: Export,
    manifest: EngineManifest,
    stream: "cupy.cuda.Stream",
    photos: Photos,
    tolerance: Tolerance,
    notes: Console,
) -> Proof:
    """Load the plans, compare them with ONNX Runtime, and write the proof beside them."""
    from microclip_deploy.export.proof.engine_parity import onnx_reference, prove_engines

    notes.print("asking ONNX Runtime")
    reference = onnx_reference(export, photos.views(export.manifest.preprocess))
    notes.print("proving engines")
    subject = _subject(folder, export, manifest, stream)
    try:
        proof = prove_engines(export, subject, reference, photos, tolerance)
    finally:
        subject.session.close()
    artifact.write_json(folder / PARITY, proof.model_dump())
    return proof


def _subject(
    folder: Path, export: Export, manifest: EngineManifest, stream: "cupy.cuda.Stream"
) -> "Subject":
    """Load what is proven from the very bytes that will be served."""
    from microclip_deploy.export.proof.engine_parity import Subject
    from microclip_deploy.serving.tensorrt_encoder import session_of
    from microclip_deploy.serving.tensorrt_engine import Engine

    data = {plan: (folder / plan).read_bytes() for plan in manifest.plans}
    plans = {plan: Engine(data[plan], stream, plan) for plan in data}
    layers: dict[str, Any] = {}
    for plan, engine in plans.items():
        layers[plan] = engine.layers()
        artifact.write_json(folder / layers_of(plan), layers[plan])
    session = session_of(export, manifest, data[BACKBONE_PLAN], stream)
    return Subject(manifest, plans, session, layers, stream)


def layers_of(plan: str) -> str:
    """Return the file of what the inspector tells of a plan."""
    return f"{Path(plan).stem}.layers.json"


def _complete(folder: Path, manifest: EngineManifest, proof: Proof) -> None:
    content = {
        "package": {"name": "microclip-deploy", "version": version("microclip-deploy")},
        "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **manifest.model_dump(mode="json"),
        "agreement": proof.agreement,
    }
    layers = [layers_of(plan) for plan in manifest.plans]
    artifact.write_manifest(folder, SCHEMA, content, [*manifest.plans, *layers, PARITY, BUILD_LOG])
