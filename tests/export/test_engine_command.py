"""`export --trt`: engines or none; what was there stays, and every missing part is named."""

import hashlib
import platform
import sys
from collections import Counter
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from microclip_deploy import artifact
from microclip_deploy.cli.main import main
from microclip_deploy.errors import EnvironmentProblem, Interrupted, VerificationError
from microclip_deploy.export.engine_command import BUILD_LOG, run_build
from microclip_deploy.export.proof.engine_verify import prove_built
from microclip_deploy.export.proof.judge import Proof, Stage
from microclip_deploy.serving.engines import (
    BACKBONE_PLAN,
    ENGINES,
    FULL_PLAN,
    BuildOptions,
    Span,
    Target,
    find_engines,
)
from microclip_deploy.serving.exported import PARITY, read_export
from microclip_deploy.serving.flavour import RTX
from microclip_deploy.serving.onnx_session import OnnxSession

if TYPE_CHECKING:
    from tests.export.conftest import ErrorLine

HERE = Target(
    tensorrt="11.4.0.106", gpu="NVIDIA H200", compute_capability="9.0", system="Linux x86_64"
)


QUIET = Console(quiet=True)
AHEAD = "rtx1.7.1.116-sm86-sm89-sm120"
GEFORCE = Target(
    flavour=RTX,
    tensorrt="1.7.1.116",
    gpu="NVIDIA GeForce RTX 4090",
    compute_capability="8.9",
    system=f"{platform.system()} {platform.machine()}",
)


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# ---- without TensorRT


def test_without_tensorrt_the_onnx_export_is_complete(
    finished_run: Path, tmp_path: Path, error_line: "ErrorLine"
) -> None:
    out = tmp_path / "my exports" / "tiny"
    options = ["--batch", "1:2:16", "--opt-level", "0", "--hardware-compat", "same-cc"]
    assert main(["export", str(finished_run), "-o", str(out), "--trt", *options]) == 4
    line = error_line()
    assert "no package 'tensorrt'" in line
    assert 'pip install "microclip-deploy[export,gpu]"' in line
    assert line.endswith(f"microclip-deploy export '{out}' --trt {' '.join(options)}")
    assert read_export(out).manifest.precision == "fp32"
    assert not (out / ENGINES).exists()


def test_without_tensorrt_an_export_is_not_touched(export: Path, error_line: "ErrorLine") -> None:
    before = contents(export)
    assert main(["export", str(export), "--trt"]) == 4
    assert error_line().endswith(f"microclip-deploy export {export} --trt")
    assert contents(export) == before


def test_trtexec_commands_are_printed_and_nothing_is_built(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--print-trtexec", "--batch", "2:4:8", "--workspace", "1.5"]
    assert main(["export", str(export), "--trt", *options, "--version-compatible"]) == 0
    printed = capsys.readouterr().out
    assert not (export / ENGINES).exists()
    for graph in ("backbone", "full"):
        assert f"--onnx={export}/{graph}.onnx" in printed
        assert f"--saveEngine={graph}.plan" in printed
    for flag in (
        "--profile=0", "--profile=1", "--minShapes=image:2x32x32x3", "--maxShapes=image:8x32x32x3",
        "--noTF32", "--memPoolSize=workspace:1536M", "--excludeLeanRuntime",
    ):  # fmt: skip
        assert printed.count(flag) == 2
    assert "TENSORRT_10=--stronglyTyped" in printed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--batch", "1:8:64"], "--batch: expected --trt"),
        (["--opt-level", "3", "--workspace", "2"], "--workspace, --opt-level: expected --trt"),
        (["--version-compatible"], "--version-compatible: expected --trt"),
        (["--print-trtexec"], "--print-trtexec: expected --trt"),
        (["--timing-cache", "x"], "--timing-cache: expected --trt"),
        (["--hardware-compat", "none"], "--hardware-compat: expected --trt"),
        (["--compute", "8.9"], "--compute: expected --trt"),
        (["--check"], "--check: expected --trt"),
        (["--trt", "--compute", "ampere"], "--compute: expected compute capabilities"),
        (["--trt", "--batch", "8"], "--batch: expected MIN:OPT:MAX"),
        (["--trt", "--batch", "1:x:64"], "--batch: expected MIN:OPT:MAX"),
        (["--trt", "--batch", "-1:8:64"], "--batch: expected MIN:OPT:MAX"),
        (["--trt", "--batch", "8:4:64"], "MIN <= OPT <= MAX"),
        (["--trt", "--batch", "0:1:2"], "batch"),
        (["--trt", "--workspace", "0"], "workspace"),
        (["--trt", "--dtype", "int8"], "fp32, fp16, bf16 or int8-static, found int8"),
        (["--trt", "--dtype", "auto"], "fp32, fp16, bf16 or int8-static, found auto"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    told: str,
) -> None:
    assert main(["export", str(finished_run), "-o", str(tmp_path / "out"), *options]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_needs_a_directory_and_an_export_none(
    finished_run: Path, tiny_export: Path, tmp_path: Path, error_line: "ErrorLine"
) -> None:
    assert main(["export", str(finished_run)]) == 2
    assert "--out: expected a directory" in error_line()
    assert main(["export", str(tiny_export), "--trt", "-o", str(tmp_path / "out")]) == 2
    assert "built inside it" in error_line()


# ---- with a stand-in for TensorRT


class Machine:
    """Stands in for what builds, loads and proves; each part can be made to fail."""

    def __init__(self) -> None:
        self.here = HERE
        self.devices = 1
        self.departure: str | None = None
        self.problem: BaseException | None = None
        self.asked: list[tuple[str, Path]] = []
        """Graph and timing cache of each build."""

    def build_plan(self, graph: Path, _options: Any, _classes: Span, **given: Any) -> Any:
        if self.problem is not None:
            raise self.problem
        self.asked.append((graph.name, given["timing_cache"]))
        given["progress"](1, 2, "Building")
        return SimpleNamespace(
            plan=b"plan of " + graph.name.encode(), products=Counter(FLOAT=3), layers=()
        )

    def prove(self, *_: Any) -> Proof:
        stage = Stage(graph=FULL_PLAN, stage="logits", difference=2.5, limit=0.1)
        return Proof(
            precision="fp32", device=str(HERE), reference="ONNX Runtime", source="made-up images",
            images=24, stages=(stage,), departure=self.departure, agreement=1, flips=(),
            batches={}, undetermined=(), other_masks=(),
        )  # fmt: skip


class Engine:
    """A plan that was loaded."""

    def __init__(self, plan: bytes, _stream: Any, name: str) -> None:
        assert plan == b"plan of " + name.replace(".plan", ".onnx").encode()

    def layers(self) -> Any:
        return {"Layers": []}

    def kernels(self) -> bytes:
        return b"compiled" if "tensorrt" not in sys.modules else b""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a machine with TensorRT as far as the command can tell."""
    made = Machine()

    def module(name: str, **members: Any) -> None:
        module = ModuleType(name)
        vars(module).update(members, __spec__=ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)

    runtime = SimpleNamespace(getDeviceCount=lambda: made.devices)
    module("tensorrt")
    module("cupy", cuda=SimpleNamespace(Device=nullcontext, runtime=runtime))
    serving = "microclip_deploy.serving"
    stream = SimpleNamespace(device_id=0)
    module(f"{serving}.cuda_pipeline", cuda_errors=nullcontext, open_stream=lambda _device: stream)
    log = SimpleNamespace(taken=lambda: ["INFO: news"])
    module(f"{serving}.tensorrt_engine", target=lambda _number: made.here, Engine=Engine)
    trt = SimpleNamespace(__version__="1.7.1.116")
    module(f"{serving}.tensorrt_library", LOG=log, trt=trt)
    session = SimpleNamespace(close=lambda: None)
    module(f"{serving}.tensorrt_encoder", session_of=lambda *_: session)
    module("microclip_deploy.export.to_tensorrt", build_plan=made.build_plan)
    module(
        "microclip_deploy.export.proof.engine_parity",
        onnx_reference=lambda *_: None,
        prove_engines=made.prove,
        Subject=lambda *parts: SimpleNamespace(session=parts[2], served=parts[3]),
    )
    return made


def build(export: Path, **options: Any) -> Proof:
    proof = run_build(export, BuildOptions(), QUIET, **options)
    assert proof is not None
    return proof


def test_proven_engines_are_found_by_who_serves(machine: Machine, export: Path) -> None:
    assert build(export).departure is None
    engines = find_engines(read_export(export), HERE)
    assert engines.directory == export / ENGINES / HERE.folder
    assert engines.plan(BACKBONE_PLAN) == b"plan of backbone.onnx"
    names = {"backbone.layers.json", "full.layers.json", PARITY, BUILD_LOG}
    assert set(engines.stored["files"]) == {BACKBONE_PLAN, FULL_PLAN, *names}
    assert (engines.directory / BUILD_LOG).read_text() == "INFO: news"
    cache = export / ENGINES / f"{HERE.folder}.timing-cache"
    assert machine.asked == [("backbone.onnx", cache), ("full.onnx", cache)]
    with OnnxSession.open(export) as session:  # the export itself is as it was
        assert session.classes


def test_a_timing_cache_may_lie_elsewhere(machine: Machine, export: Path, tmp_path: Path) -> None:
    build(export, timing_cache=tmp_path / "caches")
    assert {path.parent for _, path in machine.asked} == {tmp_path / "caches"}


def test_engines_that_depart_are_evidence_and_nothing_else(machine: Machine, export: Path) -> None:
    build(export)
    earlier = contents(export / ENGINES / HERE.folder)
    machine.departure = f"{FULL_PLAN}: logits"
    with pytest.raises(
        VerificationError, match=r"full\.plan: logits: expected at most 0\.1 .* found 2\.5"
    ):
        build(export)
    evidence = export / ENGINES / f"{HERE.folder}.failed"
    assert artifact.read_json(evidence / PARITY)["departure"] == "full.plan: logits"
    assert not (evidence / artifact.MANIFEST).exists()
    assert contents(export / ENGINES / HERE.folder) == earlier


def test_a_build_that_fails_keeps_its_log(machine: Machine, export: Path) -> None:
    machine.problem = EnvironmentProblem("no memory")
    with pytest.raises(EnvironmentProblem, match="no memory"):
        build(export)
    assert [path.name for path in (export / ENGINES).iterdir()] == [f"{HERE.folder}.failed"]
    assert (export / ENGINES / f"{HERE.folder}.failed" / BUILD_LOG).read_text() == "INFO: news"


def test_a_signal_leaves_what_was_there(machine: Machine, export: Path) -> None:
    build(export)
    before = contents(export)
    machine.problem = Interrupted("stopped")
    with pytest.raises(Interrupted):
        build(export)
    assert contents(export) == before
    assert [path.name for path in (export / ENGINES).iterdir()] == [HERE.folder]


# ---- ahead of time, with a stand-in for TensorRT for RTX


@pytest.fixture
def anywhere(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a machine with TensorRT for RTX and no GPU."""
    monkeypatch.delitem(sys.modules, "tensorrt")
    rtx = ModuleType("tensorrt_rtx_bindings")
    rtx.__spec__ = ModuleSpec(rtx.__name__, None)
    monkeypatch.setitem(sys.modules, rtx.__name__, rtx)
    machine.devices = 0
    return machine


def prove_on(machine: Machine, here: Target, export: Path) -> list[Proof]:
    machine.devices, machine.here = 1, here
    return prove_built(export, QUIET)


def test_what_is_built_ahead_is_served_where_it_was_proven(anywhere: Machine, export: Path) -> None:
    assert run_build(export, BuildOptions(), QUIET) is None
    found = read_export(export)
    place = export / ENGINES / AHEAD
    stored = artifact.read_json(place / artifact.MANIFEST)
    assert stored["proven"] == []
    assert stored["target"]["flavour"] == RTX
    assert prove_built(export, QUIET) == []  # no GPU here
    with pytest.raises(EnvironmentProblem, match=f"not proven.*microclip-deploy verify {export}"):
        find_engines(found, GEFORCE)
    assert [proof.departure for proof in prove_on(anywhere, GEFORCE, export)] == [None]
    engines = find_engines(found, GEFORCE)
    assert engines.directory == place
    assert engines.manifest.proven == (GEFORCE.gpu,)
    proof = f"{GEFORCE.gpu_slug}/{PARITY}"
    assert {BACKBONE_PLAN, FULL_PLAN, BUILD_LOG, proof} <= set(engines.stored["files"])
    assert engines.kernels(GEFORCE) == b"compiled"
    assert prove_on(anywhere, GEFORCE, export) == []  # once is enough


def test_every_gpu_is_proven_by_itself(anywhere: Machine, export: Path) -> None:
    run_build(export, BuildOptions(), QUIET)
    other = GEFORCE.model_copy(update={"gpu": "NVIDIA RTX 5090", "compute_capability": "12.0"})
    prove_on(anywhere, GEFORCE, export)
    with pytest.raises(EnvironmentProblem, match=r"on NVIDIA RTX 5090, found them built"):
        find_engines(read_export(export), other)
    prove_on(anywhere, other, export)
    for here in (GEFORCE, other):
        assert find_engines(read_export(export), here).manifest.is_proven(here)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"compute_capability": "9.0"}, r"built for compute capability 8\.6, 8\.9, 12\.0"),
        ({"tensorrt": "1.8.0.1"}, r"built with TensorRT for RTX 1\.7\.1\.116"),
        ({"flavour": "TensorRT"}, r"built with TensorRT for RTX"),
        ({"system": "Windows AMD64"}, "built on"),
    ],
)
def test_plans_built_ahead_are_not_for_every_machine(
    anywhere: Machine, export: Path, changed: dict[str, str], told: str
) -> None:
    run_build(export, BuildOptions(), QUIET)
    here = GEFORCE.model_copy(update=changed)
    assert prove_on(anywhere, here, export) == []
    with pytest.raises(EnvironmentProblem, match=told):
        find_engines(read_export(export), here)


def test_engines_that_depart_stay_unproven(anywhere: Machine, export: Path) -> None:
    run_build(export, BuildOptions(), QUIET)
    anywhere.departure = f"{FULL_PLAN}: logits"
    with pytest.raises(VerificationError, match=GEFORCE.gpu_slug):
        prove_on(anywhere, GEFORCE, export)
    assert artifact.read_json(export / ENGINES / AHEAD / artifact.MANIFEST)["proven"] == []


def test_a_plan_that_was_exchanged_is_not_proven(anywhere: Machine, export: Path) -> None:
    run_build(export, BuildOptions(), QUIET)
    (export / ENGINES / AHEAD / FULL_PLAN).write_bytes(b"another plan")
    assert prove_on(anywhere, GEFORCE, export) == []
    with pytest.raises(EnvironmentProblem, match="bytes are not the manifest's"):
        find_engines(read_export(export), GEFORCE)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--timing-cache", "x"], "--timing-cache: expected options of TensorRT for RTX"),
        (["--hardware-compat", "none"], "--hardware-compat: expected options of TensorRT for RTX"),
        (["--compute", "8.x"], "--compute: expected compute capabilities such as"),
    ],
)
def test_options_of_the_other_library_are_refused(
    anywhere: Machine, export: Path, error_line: "ErrorLine", options: list[str], told: str
) -> None:
    assert main(["export", str(export), "--trt", *options]) == 2
    assert told in error_line()
    assert not (export / ENGINES).exists()


def test_capabilities_are_for_tensorrt_for_rtx(
    machine: Machine, export: Path, error_line: "ErrorLine"
) -> None:
    assert main(["export", str(export), "--trt", "--compute", "8.9"]) == 2
    assert "--compute: expected options of TensorRT, which builds here" in error_line()


def test_another_export_in_its_place_removes_the_engines(
    machine: Machine, finished_run: Path, export: Path
) -> None:
    build(export)
    assert main(["export", str(finished_run), "-o", str(export), "--overwrite"]) == 0
    assert not (export / ENGINES).exists()
