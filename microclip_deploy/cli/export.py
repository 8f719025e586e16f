"""`microclip-deploy export` and `verify`: graphs and engines, and the proof of both."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.options import (
    MODEL,
    OUTPUT,
    PROOF,
    AsJson,
    Batch,
    BitDepth,
    Calibration,
    Check,
    Compute,
    Dtype,
    Exportable,
    ExportDirectory,
    HardwareCompat,
    MaxPixels,
    OptLevel,
    PrintTrtexec,
    ProofDevice,
    ProofImages,
    TimingCache,
    Trt,
    VersionCompatible,
    Workspace,
    option,
)
from microclip_deploy.console import notes, out, print_json
from microclip_deploy.errors import UsageError, require
from microclip_deploy.serving import is_export

if TYPE_CHECKING:
    from microclip_deploy.export.proof.judge import Proof
    from microclip_deploy.serving.engines import BuildOptions
    from microclip_deploy.serving.exported import Precision

Target = Annotated[
    Path | None, option(OUTPUT, "DIR", "Directory to write; required for a run.", "-o", "--out")
]
ExportedDtype = Annotated[
    Dtype, option(MODEL, None, "Precision of the encoder; auto measures and keeps the fastest.")
]
Scales = Annotated[
    Calibration | None,
    option(
        MODEL,
        None,
        "Scales of int8: dynamic, of each batch, or static, of --images, for TensorRT.",
        show_default="dynamic",
    ),
]
Atol = Annotated[float | None, option(PROOF, "X", "Largest difference of logits allowed.", min=0)]
MinAgreement = Annotated[
    float | None, option(PROOF, "SHARE", "Least share of equal top-1 classes.", min=0, max=1)
]
Overwrite = Annotated[
    bool, option(OUTPUT, None, "Replace the export in --out.", show_default=False)
]
Triton = Annotated[
    Path | None,
    option(OUTPUT, "DIR", "Also write a model repository for Triton Inference Server."),
]


def export(
    source: Exportable,
    out_dir: Target = None,
    dtype: ExportedDtype = Dtype.fp32,
    calibration: Scales = None,
    images: ProofImages = None,
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
    device: ProofDevice = "cpu",
    atol: Atol = None,
    min_agreement: MinAgreement = None,
    overwrite: Overwrite = False,
    triton: Triton = None,
    trt: Trt = False,
    batch: Batch = None,
    workspace: Workspace = None,
    opt_level: OptLevel = None,
    timing_cache: TimingCache = None,
    version_compatible: VersionCompatible = False,
    hardware_compat: HardwareCompat = None,
    compute: Compute = None,
    check: Check = False,
    print_trtexec: PrintTrtexec = False,
    as_json: AsJson = False,
) -> None:
    """Export an adapted model to ONNX, and with --trt to TensorRT; prove both equal.

    With an export in place of the run, --trt only builds engines and --triton only writes the
    repository; neither needs PyTorch. TensorRT builds for the GPU at hand; TensorRT for RTX builds
    on any machine, and `verify` proves there.

    Example: microclip-deploy export runs/birds -o exports/birds --dtype fp16 --trt
    """
    require("onnx", "export")
    require("onnxruntime", "cpu")
    from microclip_deploy.export.build_options import parse_options
    from microclip_deploy.export.triton.repository import require_replaceable, write_repository

    given: dict[str, Any] = {"--batch": batch, "--workspace": workspace, "--opt-level": opt_level}
    given |= {"--timing-cache": timing_cache, "--version-compatible": version_compatible or None}
    given |= {"--hardware-compat": hardware_compat, "--print-trtexec": print_trtexec or None}
    given |= {"--compute": compute, "--check": check or None}
    build = parse_options(trt, given)
    proving: dict[str, Any] = {"images": images, "device": device}
    proving |= {"atol": atol, "min_agreement": min_agreement}
    proving |= {"max_pixels": max_pixels, "bit_depth": bit_depth}
    exported = (build is not None or triton is not None) and is_export(source)
    if exported:
        directory = _inside(source, out_dir)
    else:
        precision = _precision(dtype, calibration)
        directory = _target(out_dir, precision if trt and not check else None)
    if triton is not None:
        require_replaceable(directory, triton)
    if not exported:
        from microclip_deploy.export.command import run_export

        proof = run_export(
            source, directory, notes, dtype=precision, overwrite=overwrite, **proving
        )
        _show(proof, as_json)
    if build is not None and print_trtexec:
        _print_trtexec(directory, build)
    elif build is not None and check:
        _check(directory, build, as_json)
    elif build is not None:
        _build(directory, build, timing_cache, proving, as_json)
    if triton is not None:
        models = write_repository(directory, triton, notes)
        if as_json:
            print_json({"repository": str(triton), "models": models})
    next_steps.tell(
        notes,
        next_steps.predict(directory),
        next_steps.verify(directory),
        next_steps.bench(directory, "--batches", "1,8"),
    )


def _inside(export: Path, out_dir: Path | None) -> Path:
    """Return the export, which stays where it is."""
    if out_dir is not None:
        raise UsageError(
            f"--out {out_dir}: expected none with the export {export}, which stays where it is: "
            "engines are built inside it; leave it out"
        )
    return export


def _precision(dtype: Dtype, calibration: Calibration | None) -> "Precision | Literal['auto']":
    """Return the precision that both options name together."""
    if calibration is not None and dtype != Dtype.int8:
        raise UsageError(
            f"--calibration: expected --dtype int8 with it, found {dtype}; add it, or leave "
            "--calibration out"
        )
    return "int8-static" if calibration == Calibration.static else dtype.value


def _target(out_dir: Path | None, built_from: str | None) -> Path:
    """Return where a run is exported to, once it can be, and in a precision for engines if any."""
    from microclip_deploy.export.build_options import require_buildable

    require_exporter()
    if built_from is not None:
        require_buildable(built_from)
    if out_dir is None:
        raise UsageError("--out: expected a directory for the export, found none; give -o DIR")
    return out_dir


def _build(
    directory: Path,
    build: "BuildOptions",
    timing_cache: Path | None,
    proving: dict[str, Any],
    as_json: bool,
) -> None:
    from microclip_deploy.export.engine_command import run_build

    built = run_build(directory, build, notes, timing_cache=timing_cache, **proving)
    if built is not None:
        _show(built, as_json)


def _check(directory: Path, build: "BuildOptions", as_json: bool) -> None:
    from microclip_deploy.export.engine_check import run_check, table

    checked = run_check(directory, build, notes)
    if as_json:
        print_json([plan.model_dump(mode="json") for plan in checked])
    else:
        out.print(table(checked))


def _print_trtexec(directory: Path, build: "BuildOptions") -> None:
    from microclip_deploy.export.build_options import trtexec_commands
    from microclip_deploy.serving.exported import read_export

    commands = trtexec_commands(read_export(directory), build)
    out.print(commands, markup=False, highlight=False, soft_wrap=True)


def verify(
    export_dir: ExportDirectory,
    run: Annotated[
        Path | None, option(PROOF, "RUN", "Ask this run's PyTorch model instead of stored answers.")
    ] = None,
    images: ProofImages = None,
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
    device: ProofDevice = "cpu",
    as_json: AsJson = False,
) -> None:
    """Prove an export and its unproven engines on this machine; exit 5 where they depart."""
    require("onnxruntime", "cpu")
    from microclip_deploy.export.proof.engine_verify import prove_built
    from microclip_deploy.export.proof.judge import require_proven
    from microclip_deploy.export.proof.verify import VERIFIED, run_verify

    reading = {"max_pixels": max_pixels, "bit_depth": bit_depth}
    proof = run_verify(export_dir, notes, run=run, images=images, device=device, **reading)
    _show(proof, as_json)
    require_proven(proof, export_dir / VERIFIED)
    for each in prove_built(export_dir, notes, images=images, device=device, **reading):
        _show(each, as_json)
    bench = next_steps.bench(export_dir, "--batches", "1,8")
    next_steps.tell(notes, next_steps.predict(export_dir), bench)


def require_exporter() -> None:
    """Insist on what writes and proves graphs.

    Raises:
        EnvironmentProblem: a package is missing; comes with its install line.
    """
    for package, extra in (("torch", "adapt"), ("onnxscript", "export"), ("onnxruntime", "cpu")):
        require(package, extra)


def _show(proof: "Proof", as_json: bool) -> None:
    from microclip_deploy.export.proof.verify import table

    if as_json:
        print_json(proof.model_dump(mode="json"))
    else:
        out.print(table(proof))
