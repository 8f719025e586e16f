"""`export --trt`: engines or none; what was there stays, and every missing part is named."""

import hashlib
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from microclip_deploy import artifact
from microclip_deploy.cli.main import main
from microclip_deploy.errors import EnvironmentProblem, Interrupted, VerificationError
from microclip_deploy.export import engine_command
from microclip_deploy.export.engine_command import BUILD_LOG, EngineRequest, run_build
from microclip_deploy.export.proof.parity import Proof, Stage
from microclip_deploy.serving import onnx_session
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

QUIET = Console(quiet=True)
HERE = Target(
    tensorrt="11.4.0.106", gpu="NVIDIA H200", compute_capability="9.0", system="Linux x86_64"
)


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one error line."""
    (line,) = (each for each in capsys.readouterr().err.splitlines() if "error: " in each)
    return line


# ---- without TensorRT


def test_without_tensorrt_the_onnx_export_is_complete(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my exports" / "tiny"
    command = ["export", str(finished_run), "-o", str(out), "--trt", "--batch", "1:2:16"]
    assert main([*command, "--opt-level", "4", "--hardware-compat", "same-cc"]) == 4
    told = error_of(capsys)
    assert "no package 'tensorrt'" in told
    assert 'pip install "microclip-deploy[export,gpu]"' in told
    wanted = f"microclip-deploy export '{out}' --trt --batch 1:2:16 --opt-level 4"
    assert told.endswith(f"{wanted} --hardware-compat same-cc")
    assert read_export(out).manifest.precision == "fp32"
    assert not (out / ENGINES).exists()
    assert main(["verify", str(out)]) == 0


def test_without_tensorrt_an_export_is_not_touched(
    tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = shutil.copytree(tiny_export, tmp_path / "export")
    before = contents(export)
    assert main(["export", str(export), "--trt"]) == 4
    assert error_of(capsys).endswith(f"microclip-deploy export {export} --trt")
    assert contents(export) == before


def test_trtexec_commands_are_printed_and_nothing_is_built(
    tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = shutil.copytree(tiny_export, tmp_path / "export")
    options = ["--print-trtexec", "--batch", "2:4:8", "--workspace", "1.5"]
    assert main(["export", str(export), "--trt", *options, "--version-compatible"]) == 0
    printed = capsys.readouterr().out
    assert not (export / ENGINES).exists()
    for graph in ("backbone", "full"):
        assert f"--onnx={export}/{graph}.onnx" in printed
        assert f"--saveEngine={graph}.plan" in printed
    assert printed.count("--profile=0") == printed.count("--profile=1") == 2
    assert printed.count("--minShapes=image:2x32x32x3") == 2
    assert printed.count("--maxShapes=image:8x32x32x3") == 2
    assert printed.count("--noTF32") == 2
    assert printed.count("--memPoolSize=workspace:1536M") == 2
    assert printed.count("--excludeLeanRuntime") == 2
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
        (["--trt", "--batch", "8"], "--batch: expected MIN:OPT:MAX"),
        (["--trt", "--batch", "1:x:64"], "--batch: expected MIN:OPT:MAX"),
        (["--trt", "--batch", "-1:8:64"], "--batch: expected MIN:OPT:MAX"),
        (["--trt", "--batch", "8:4:64"], "MIN <= OPT <= MAX"),
        (["--trt", "--batch", "0:1:2"], "batch"),
        (["--trt", "--workspace", "0"], "workspace"),
        (["--trt", "--dtype", "int8"], "fp32, fp16 or bf16, found int8"),
        (["--trt", "--dtype", "auto"], "fp32, fp16 or bf16, found auto"),
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
    finished_run: Path, tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(finished_run)]) == 2
    assert "--out: expected a directory" in error_of(capsys)
    assert main(["export", str(tiny_export), "--trt", "-o", str(tmp_path / "out")]) == 2
    assert "built inside it" in error_of(capsys)


# ---- with a stand-in for TensorRT


class Built:
    """Stands in for what builds, loads and proves; each part can be made to fail."""

    def __init__(self) -> None:
        self.departure: str | None = None
        self.problem: BaseException | None = None
        self.lines = ["INFO: news"]
        self.asked: list[tuple[str, Path]] = []

    def plan(self, graph: Path, _options: Any, _classes: Span, **given: Any) -> Any:
        """Build, or fail."""
        if self.problem is not None:
            raise self.problem
        self.asked.append((graph.name, given["timing_cache"]))
        given["progress"](1, 2, "Building")
        return SimpleNamespace(plan=b"plan of " + graph.name.encode(), products=Counter(FLOAT=3))

    def proof(self, export: Any, subject: Any, *_: Any) -> Proof:
        """Prove, or depart."""
        stage = Stage(graph=FULL_PLAN, stage="logits", difference=2.5, limit=0.1)
        return Proof(
            precision="fp32", device=str(HERE), reference="ONNX Runtime", source="made-up images",
            images=24, stages=(stage,), departure=self.departure, agreement=1, flips=(),
            batches={}, undetermined=(), other_masks=(),
        )  # fmt: skip


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    """Return a machine with TensorRT as far as the command can tell."""
    found = Built()

    def module(name: str, **members: Any) -> None:
        made = ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)

    class Engine:
        def __init__(self, plan: bytes, _stream: Any, name: str) -> None:
            assert plan == b"plan of " + name.replace(".plan", ".onnx").encode()

        def layers(self) -> Any:
            return {"Layers": []}

    @contextmanager
    def no_errors(_device: str) -> Iterator[None]:
        yield

    log = SimpleNamespace(taken=lambda: found.lines)
    serving = "microclip_deploy.serving"
    stream = SimpleNamespace(device_id=0)
    module(f"{serving}.cuda_pipeline", cuda_errors=no_errors, open_stream=lambda _device: stream)
    module(f"{serving}.tensorrt_engine", target=lambda _number: HERE, Engine=Engine, LOG=log)
    session = SimpleNamespace(close=lambda: None)
    module(f"{serving}.tensorrt_encoder", session_of=lambda *_: session)
    module("microclip_deploy.export.to_tensorrt", build_plan=found.plan)
    module(
        "microclip_deploy.export.proof.engine_parity",
        onnx_reference=lambda *_: None,
        prove_engines=found.proof,
        Subject=lambda *parts: SimpleNamespace(session=parts[2]),
    )
    monkeypatch.setattr(engine_command, "_absent", lambda _packages: [])
    monkeypatch.setattr(engine_command, "_devices", lambda: 1)
    monkeypatch.setattr(engine_command, "_device", lambda _stream: nullcontext())
    return found


@pytest.fixture
def export(tiny_export: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_export, tmp_path / "export")


def request(export: Path, **changed: Any) -> EngineRequest:
    return EngineRequest(export, BuildOptions(), **changed)


def test_proven_engines_are_found_by_who_serves(built: Built, export: Path) -> None:
    assert run_build(request(export), QUIET).departure is None
    engines = find_engines(read_export(export), HERE)
    assert engines.directory == export / ENGINES / HERE.folder
    assert engines.plan(BACKBONE_PLAN) == b"plan of backbone.onnx"
    names = {"backbone.layers.json", "full.layers.json", PARITY, BUILD_LOG}
    assert set(engines.stored["files"]) == {BACKBONE_PLAN, FULL_PLAN, *names}
    assert (engines.directory / BUILD_LOG).read_text() == "INFO: news"
    cache = export / ENGINES / f"{HERE.folder}.timing-cache"
    assert built.asked == [("backbone.onnx", cache), ("full.onnx", cache)]
    with onnx_session.OnnxSession.open(export) as session:  # the export itself is as it was
        assert session.classes


def test_a_timing_cache_may_lie_elsewhere(built: Built, export: Path, tmp_path: Path) -> None:
    run_build(request(export, timing_cache=tmp_path / "caches"), QUIET)
    assert {path.parent for _, path in built.asked} == {tmp_path / "caches"}


def test_engines_that_depart_are_evidence_and_nothing_else(built: Built, export: Path) -> None:
    run_build(request(export), QUIET)
    earlier = contents(export / ENGINES / HERE.folder)
    built.departure = f"{FULL_PLAN}: logits"
    with pytest.raises(
        VerificationError, match=r"full\.plan: logits: expected at most 0\.1 .* found 2\.5"
    ):
        run_build(request(export), QUIET)
    evidence = export / ENGINES / f"{HERE.folder}.failed"
    assert artifact.read_json(evidence / PARITY)["departure"] == "full.plan: logits"
    assert not (evidence / artifact.MANIFEST).exists()
    assert contents(export / ENGINES / HERE.folder) == earlier


def test_a_build_that_fails_keeps_its_log(built: Built, export: Path) -> None:
    built.problem = EnvironmentProblem("no memory")
    with pytest.raises(EnvironmentProblem, match="no memory"):
        run_build(request(export), QUIET)
    assert [path.name for path in (export / ENGINES).iterdir()] == [f"{HERE.folder}.failed"]
    assert (export / ENGINES / f"{HERE.folder}.failed" / BUILD_LOG).read_text() == "INFO: news"


def test_a_signal_leaves_what_was_there(built: Built, export: Path) -> None:
    run_build(request(export), QUIET)
    before = contents(export)
    built.problem = Interrupted("stopped")
    with pytest.raises(Interrupted):
        run_build(request(export), QUIET)
    assert contents(export) == before
    assert [path.name for path in (export / ENGINES).iterdir()] == [HERE.folder]


def test_another_export_in_its_place_removes_the_engines(
    built: Built, finished_run: Path, export: Path
) -> None:
    run_build(request(export), QUIET)
    assert main(["export", str(finished_run), "-o", str(export), "--overwrite"]) == 0
    assert not (export / ENGINES).exists()
    (export / "mine.txt").write_text("keep")
    assert main(["export", str(finished_run), "-o", str(export), "--overwrite"]) == 2
    assert (export / "mine.txt").read_text() == "keep"
