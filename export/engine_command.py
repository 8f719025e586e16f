"""`export --trt`: build engines, prove them, and only then put them in place.

TensorRT builds for this machine. TensorRT for RTX builds on any; what it built is put in place
unproven, and `verify` proves it on the GPU that serves.

They are written into a hidden folder beside their place, which they take when they are proven;
earlier engines stay until then. Engines that are not proven are kept as NAME.failed, without a
manifest: evidence, never loaded.
"""

import datetime
import importlib.util
import platform
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from microclip_deploy import artifact
from microclip_deploy.console import bar
from microclip_deploy.errors import (
    CheckpointError,
    EnvironmentProblem,
    VerificationError,
    printable,
)
from microclip_deploy.export.build_options import require_buildable, require_known, spelled
from microclip_deploy.export.layer_listing import fused_attention
from microclip_deploy.export.proof.engine_verify import REMEDY, layers_of, prove_plans
from microclip_deploy.export.proof.judge import Proof, require_proven
from microclip_deploy.export.proof.probes import photos_with
from microclip_deploy.export.proof.verify import stored_tolerance
from microclip_deploy.serving.engines import (
    ENGINES,
    PLAN_OF,
    SCHEMA,
    BuildOptions,
    EngineManifest,
    PlanSpec,
    Span,
    Target,
    prove_command,
)
from microclip_deploy.serving.exported import PARITY, Export, read_export
from microclip_deploy.serving.flavour import RTX, Flavour, devices, flavour_here

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
) -> Proof | None:
    """Build the engines of an export; return their proof, None of those that are built ahead.

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
        UsageError: an export in a precision that TensorRT has no graph for, or options that the
            library at hand does not know.
        VerificationError: engines that depart; the evidence is kept.
    """
    export = read_export(directory)
    require_buildable(export.manifest.precision)
    others: dict[str, Any] = {"--timing-cache": timing_cache, "--images": images}
    others |= {"--atol": atol, "--min-agreement": min_agreement}
    others |= {f"--{name.replace('_', '-')}": value for name, value in reading.items()}
    flavour = require_flavour(directory, spelled(options, others))
    require_known(options, flavour, timing_cache)
    if flavour == RTX:
        _build_ahead(export, options, notes)
        return None
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
        plans = {plan: (folder / plan).read_bytes() for plan in manifest.plans}
        proof = prove_plans(folder, plans, export, manifest, stream, photos, tolerance, notes)
        require_proven(proof, evidence / PARITY, REMEDY)
        _complete(folder, manifest, proof)
    notes.print(f"engines: {place} ({proof.precision}, proven)", markup=False)
    return proof


def require_flavour(directory: Path, options: str) -> Flavour:
    """Return the library that builds; where there is none, name everything that is missing at once.

    Args:
        directory: the export, complete without engines.
        options: of the command that is to be run elsewhere.

    Raises:
        EnvironmentProblem: with the install lines of both and how to go on.
    """
    flavour = flavour_here()
    needed = ("onnx",) if flavour == RTX else ("cupy", "onnx", "tensorrt")
    missing = [f"package '{name}'" for name in needed if importlib.util.find_spec(name) is None]
    if flavour != RTX and importlib.util.find_spec("cupy") is not None and not devices():
        missing.append("CUDA device")
    if flavour is not None and not missing:
        return flavour
    command = f"microclip-deploy export {shlex.quote(str(directory))} --trt{options}"
    raise EnvironmentProblem(
        "--trt: expected TensorRT and an NVIDIA GPU, or TensorRT for RTX, found no "
        f"{' and no '.join(missing)}; {printable(directory)} is complete without engines. "
        f'On the machine that will serve, run: pip install "microclip-deploy[export,gpu]"; or on '
        f'any machine, for GeForce and RTX PRO: pip install "microclip-deploy[export,rtx]"; '
        f"then: {command}"
    )


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


def _build_ahead(export: Export, options: BuildOptions, notes: Console) -> None:
    """Build with TensorRT for RTX and put the plans in place, for `verify` to prove."""
    from microclip_deploy.serving.tensorrt_library import trt

    goal = Target(
        flavour=RTX,
        tensorrt=trt.__version__,
        capabilities=options.compute,
        system=f"{platform.system()} {platform.machine()}",
    )
    place = export.directory / ENGINES / goal.folder
    evidence = place.with_name(f"{place.name}.failed")
    with artifact.staged_directory(place) as folder, _kept_as(evidence, folder, notes):
        manifest = _build_plans(folder, export, options, goal, place.parent, notes)
        _complete(folder, manifest, None)
    notes.print(f"engines: {place} ({manifest.precision}, built, not proven)", markup=False)
    notes.print(
        f"They run on GPUs of compute capability {', '.join(options.compute)} and are served once "
        f"they are proven; on such a machine: {prove_command(export.directory)}",
        markup=False,
    )


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

    classes = class_span(export)
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
            fused = fused_attention(built.layers)
            told = f"; kernels of fused attention: {fused}" if built.layers else ""
            notes.print(f"{plan}: {len(built.plan) / 2**20:.0f} MiB; products: {products}{told}")
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


def class_span(export: Export) -> Span:
    """Return how many rows of the class matrix a full plan takes."""
    count = len(export.classifier)
    return Span(least=2, opt=count, most=max(MOST_CLASSES, 2 * count))


def _complete(folder: Path, manifest: EngineManifest, proof: Proof | None) -> None:
    """Write the manifest; without a proof the plans are built and no more."""
    content = {
        "package": {"name": "microclip-deploy", "version": version("microclip-deploy")},
        "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **manifest.model_dump(mode="json"),
        "proven": [] if proof is None else [manifest.target.gpu],
        "agreement": None if proof is None else proof.agreement,
    }
    proofs = [] if proof is None else [*map(layers_of, manifest.plans), PARITY]
    artifact.write_manifest(folder, SCHEMA, content, [*manifest.plans, *proofs, BUILD_LOG])
