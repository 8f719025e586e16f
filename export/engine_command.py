"""`export --trt`: build engines for this machine, prove them, and only then put them in place.

They are written into a hidden folder beside their place, which they take when they are proven;
earlier engines stay until then. Engines that are not proven are kept as NAME.failed, without a
manifest: evidence, never loaded.
"""

import datetime
import importlib.util
import json
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
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
)
from microclip_deploy.export.proof.limits import Limits
from microclip_deploy.export.proof.parity import Proof
from microclip_deploy.export.proof.probes import Photos, Reference, made_up_photos, with_users
from microclip_deploy.export.proof.verify import stored_limits
from microclip_deploy.export.trtexec import trtexec_commands
from microclip_deploy.serving.engines import (
    ENGINES,
    PLAN_OF,
    SCHEMA,
    BuildOptions,
    EngineManifest,
    Hardware,
    PlanSpec,
    Span,
    Target,
)
from microclip_deploy.serving.exported import PARITY, PROBES, Export, read_export

if TYPE_CHECKING:
    import cupy

    from microclip_deploy.export.proof.engine_parity import Subject

BUILD_LOG = "build.log"

MOST_CLASSES = 4096
"""Rows of the class matrix that a full plan takes, or twice those of the build if that is more."""


_FLAGS: Mapping[str, str] = {
    "batch": "--batch",
    "workspace_gib": "--workspace",
    "opt_level": "--opt-level",
    "version_compatible": "--version-compatible",
    "hardware": "--hardware-compat",
}
"""Field of BuildOptions -> option of the command."""


@dataclass(frozen=True)
class EngineRequest:
    """The options of `export --trt` as they were given."""

    export: Path
    options: BuildOptions
    timing_cache: Path | None = None
    """Folder of timing caches; None: the export's folder of engines."""
    images: Path | None = None
    device: str = "cuda"
    atol: float | None = None
    min_agreement: float | None = None


def parse_options(
    *,
    trt: bool,
    batch: str | None,
    workspace_gib: float | None,
    opt_level: int | None,
    timing_cache: Path | None,
    version_compatible: bool,
    hardware: Hardware | None,
    print_trtexec: bool,
) -> BuildOptions | None:
    """Return how to build; None without --trt.

    Raises:
        UsageError: options of a build without --trt, or one with a value that does not work.
    """
    given = {
        "batch": None if batch is None else _parse_span(batch),
        "workspace_gib": workspace_gib,
        "opt_level": opt_level,
        "version_compatible": version_compatible or None,
        "hardware": hardware,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if trt:
        return validate(BuildOptions, chosen)
    stray = [_FLAGS[name] for name in chosen]
    stray += ["--timing-cache"] * (timing_cache is not None)
    stray += ["--print-trtexec"] * print_trtexec
    if stray:
        raise UsageError(f"{', '.join(stray)}: expected --trt with it, found none; add --trt")
    return None


def _parse_span(text: str) -> dict[str, int]:
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--batch: expected MIN:OPT:MAX such as 1:8:64, found {text}")
    return dict(zip(Span.model_fields, map(int, parts), strict=True))


def require_out(out: Path | None) -> Path:
    """Insist on a directory to write.

    Raises:
        UsageError: there is none.
    """
    if out is None:
        raise UsageError("--out: expected a directory for the export, found none; give -o DIR")
    return out


def require_no_out(export: Path, out: Path | None) -> Path:
    """Insist on building the engines of an export inside it.

    Raises:
        UsageError: there is another place.
    """
    if out is not None:
        raise UsageError(
            f"--out {out}: expected none with the export {export}, whose engines are built inside "
            "it; leave it out"
        )
    return export


def trtexec(export: Path, options: BuildOptions) -> str:
    """Return the trtexec commands that build the same engines.

    Raises:
        CheckpointError: the export is damaged.
        UsageError: as `require_buildable`.
    """
    found = read_export(export)
    require_buildable(found.manifest.precision)
    return trtexec_commands(found, options)


def run_build(request: EngineRequest, notes: Console) -> Proof:
    """Build the engines of an export for this machine and return their proof.

    Raises:
        CheckpointError: the export is damaged, or TensorRT cannot read its graphs.
        EnvironmentProblem: TensorRT, the GPU or its memory is missing; the export is untouched.
        UsageError: an export in a precision that TensorRT has no graph for.
        VerificationError: engines that depart; the evidence is kept.
    """
    export = read_export(request.export)
    require_buildable(export.manifest.precision)
    _require_toolchain(request)
    from microclip_deploy.serving.cuda_pipeline import cuda_errors, open_stream
    from microclip_deploy.serving.tensorrt_engine import target

    stream = open_stream(request.device)
    here = target(stream.device_id)
    place = export.directory / ENGINES / here.folder
    with (
        artifact.staged_directory(place) as folder,
        _kept_as(place.with_name(f"{place.name}.failed"), folder, notes),
        cuda_errors(request.device),
        _device(stream),
    ):
        manifest = _build_plans(folder, export, request, here, notes)
        proof = _proven(folder, export, manifest, request, stream, notes)
        _require_proven(proof)
        _complete(folder, manifest, proof)
    notes.print(f"engines: {place} ({proof.precision}, proven)", markup=False)
    return proof


def require_buildable(precision: str) -> None:
    """Refuse what TensorRT has no operators for.

    Raises:
        UsageError: int8, or a precision that is chosen by speed elsewhere.
    """
    if precision in ("int8", "auto"):
        raise UsageError(
            f"--trt: expected an export in fp32, fp16 or bf16, found {precision}, whose graph is "
            "for ONNX Runtime; export with --dtype fp16"
        )


def _require_toolchain(request: EngineRequest) -> None:
    """Name everything that is missing at once, and how to go on elsewhere."""
    missing = [f"package '{name}'" for name in _absent(("cupy", "onnx", "tensorrt"))]
    if not _absent(("cupy",)) and not _devices():
        missing.append("CUDA device")
    if not missing:
        return
    flags = "".join(f" {flag}" for flag in _flags(request))
    command = f"microclip-deploy export {shlex.quote(str(request.export))} --trt{flags}"
    raise EnvironmentProblem(
        f"--trt: expected TensorRT and an NVIDIA GPU, found no {' and no '.join(missing)}; "
        f"{printable(request.export)} is complete without engines. On the machine that will serve, "
        f'run: pip install "microclip-deploy[export,gpu]", then: {command}'
    )


def _flags(request: EngineRequest) -> Iterator[str]:
    """Return the options that are not the defaults, as they are to be given again."""
    options = request.options.model_dump(exclude_defaults=True)
    if "batch" in options:
        options["batch"] = request.options.batch
    own: dict[str, Any] = {"--timing-cache": request.timing_cache, "--images": request.images}
    own |= {"--atol": request.atol, "--min-agreement": request.min_agreement}
    for flag, value in {**{_FLAGS[name]: each for name, each in options.items()}, **own}.items():
        if value is True:
            yield flag
        elif value is not None:
            yield f"{flag} {shlex.quote(str(value))}"


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
def _device(stream: "cupy.cuda.Stream") -> Iterator[None]:
    """Make the stream's device the one that TensorRT builds for and runs on."""
    import cupy

    with cupy.cuda.Device(stream.device_id):
        yield


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
    folder: Path, export: Export, request: EngineRequest, here: Target, notes: Console
) -> EngineManifest:
    """Build and write the plans; return what is known of them before they are proven."""
    from microclip_deploy.export.to_tensorrt import build_plan
    from microclip_deploy.serving.tensorrt_engine import LOG

    classes = _classes(len(export.classifier))
    caches = request.timing_cache or export.directory / ENGINES
    plans = {}
    LOG.taken()
    try:
        for graph, plan in PLAN_OF.items():
            with bar(notes, f"building {plan}") as progress:
                built = build_plan(
                    export.directory / graph,
                    request.options,
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
        options=request.options,
        classes=classes,
        plans=plans,
    )


def _classes(count: int) -> Span:
    return Span(least=2, opt=count, most=max(MOST_CLASSES, 2 * count))


def _proven(
    folder: Path,
    export: Export,
    manifest: EngineManifest,
    request: EngineRequest,
    stream: "cupy.cuda.Stream",
    notes: Console,
) -> Proof:
    """Load the plans, compare them with ONNX Runtime, and write the proof beside them."""
    from microclip_deploy.export.proof.engine_parity import onnx_reference, prove_engines

    photos, images = _images(export, request, notes)
    notes.print("asking ONNX Runtime")
    reference: Reference = onnx_reference(export, images)
    notes.print("proving engines")
    subject = _subject(folder, export, manifest, stream)
    try:
        proof = prove_engines(
            export,
            subject,
            reference,
            _limits(export, request),
            photos.names,
            photos.source,
        )
    finally:
        subject.session.close()
    artifact.write_json(folder / PARITY, proof.model_dump())
    return proof


def _images(
    export: Export, request: EngineRequest, notes: Console
) -> tuple[Photos, NDArray[np.uint8]]:
    """Return the made-up images of the export, with the user's if given, and their test views."""
    photos = made_up_photos(export.manifest.preprocess.size)
    if request.images is None:
        return photos, Reference.read(export.directory / PROBES).images
    photos = with_users(photos, request.images)
    tell_skipped(photos.bad, notes)
    return photos, photos.views(export.manifest.preprocess)


def _subject(
    folder: Path, export: Export, manifest: EngineManifest, stream: "cupy.cuda.Stream"
) -> "Subject":
    """Load what is proven from the very bytes that will be served."""
    from microclip_deploy.export.proof.engine_parity import Subject
    from microclip_deploy.serving.engines import BACKBONE_PLAN
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


def _limits(export: Export, request: EngineRequest) -> Limits:
    return stored_limits(export).changed(request.atol, request.min_agreement)


def _complete(folder: Path, manifest: EngineManifest, proof: Proof) -> None:
    content = {
        "package": {"name": "microclip-deploy", "version": version("microclip-deploy")},
        "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **json.loads(manifest.model_dump_json()),
        "agreement": proof.agreement,
    }
    layers = [layers_of(plan) for plan in manifest.plans]
    artifact.write_manifest(folder, SCHEMA, content, [*manifest.plans, *layers, PARITY, BUILD_LOG])


def _require_proven(proof: Proof) -> None:
    if proof.departure is None:
        return
    stage = next(stage for stage in proof.stages if stage.departs)
    wanted = "a number" if stage.limit is None else f"at most {stage.limit:.3g} from ONNX Runtime"
    found = f"{stage.difference:.3g}"
    if stage.stage == "precision":
        wanted, found = f"layers in {proof.precision}", "others in TensorRT's inspector"
    raise VerificationError(
        f"{proof.departure}: expected {wanted}, found {found} on {proof.images} images "
        f"({proof.device}); the engines are not used; update TensorRT, or export with a more exact "
        "--dtype"
    )
