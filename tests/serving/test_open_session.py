"""The schema of the manifest chooses the backend, and a missing package is named."""

import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from microclip_deploy.errors import CheckpointError, EnvironmentProblem, MicroclipError, UsageError
from microclip_deploy.model import checkpoint
from microclip_deploy.serving import (
    exported,
    is_export,
    onnx_graph,
    open_session,
    opening,
    torch_session,
)
from microclip_deploy.serving.onnx_session import OnnxSession
from microclip_deploy.serving.torch_session import TorchSession


def manifest(directory: Path, content: str) -> Path:
    (directory / "manifest.json").write_text(content)
    return directory


def test_a_run_is_opened_with_torch(finished_run: Path) -> None:
    with open_session(finished_run, "auto") as session:
        assert isinstance(session, TorchSession)
        assert session.device in ("cpu", "cuda")
    assert not is_export(finished_run)


def test_an_export_is_opened_with_onnxruntime(export: Path) -> None:
    with open_session(export, "auto") as session:
        assert isinstance(session, OnnxSession)
        assert re.fullmatch(r"cpu|cuda:\d", session.device)
    assert is_export(export)


@pytest.mark.parametrize("schema", ["microclip.plan/1", "checkpoint/1", "", "microclip.export"])
def test_other_schemas_are_refused(tmp_path: Path, schema: str) -> None:
    directory = manifest(tmp_path, json.dumps({"schema": schema}))
    with pytest.raises(CheckpointError, match=r"expected schema microclip\.checkpoint/N or") as e:
        open_session(directory)
    assert f"found {schema};" in str(e.value)


@pytest.mark.parametrize("schema", [checkpoint.SCHEMA, exported.SCHEMA])
def test_other_versions_are_refused_by_their_backend(tmp_path: Path, schema: str) -> None:
    newer = schema.partition("/")[0] + "/99"
    with pytest.raises(CheckpointError, match=f"expected schema {schema}, found {newer}"):
        open_session(manifest(tmp_path, json.dumps({"schema": newer})))


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '"x"', "{}", '{"schema": 3}', "\ud800"])
def test_a_manifest_without_a_schema_is_bad_data(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"manifest\.json: expected a"):
        open_session(tmp_path)


@pytest.mark.parametrize("place", [".", "none", "file"])
def test_what_is_no_artifact_is_bad_data(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"expected a finished artifact"):
        open_session(tmp_path / place)


@pytest.mark.parametrize("device", ["openvino", "gpu", "cuda:", "CPU"])
def test_a_run_refuses_the_devices_of_exports(finished_run: Path, device: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda or cuda:N"):
        open_session(finished_run, device)


class Machine:
    """A machine with a GPU, of which the tests say what else it has; names what was opened."""

    cupy = True
    problem: MicroclipError | None = None

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(opening, "_has", lambda package: package == "cupy" and self.cupy)
        patch.setattr(onnx_graph, "has_cuda", lambda: True)
        patch.setattr(
            torch_session, "resolve_device", lambda device: device.replace("auto", "cuda")
        )
        manifest = SimpleNamespace(classes=(), preprocess=None, calibration=None)
        known = SimpleNamespace(manifest=manifest)
        patch.setattr(checkpoint, "read_checkpoint", lambda _path: known)
        patch.setattr(checkpoint, "load_model", lambda *_: None)
        for encoder, opener in (("torch_encoder", "session_of"), ("onnx_encoder", "open_export")):
            module = SimpleNamespace(**{opener: self._kernels})
            patch.setitem(sys.modules, f"microclip_deploy.serving.{encoder}", module)
        patch.setattr(torch_session, "TorchSession", self._plain)
        patch.setattr(OnnxSession, "open", self._plain)

    def _kernels(self, *arguments: Any, calibration: None = None) -> Any:
        if self.problem is not None:
            raise self.problem
        return SimpleNamespace(device=f"kernels on {arguments[-1]}")

    @staticmethod
    def _plain(*arguments: Any, threads: int | None = None, calibration: None = None) -> Any:
        return SimpleNamespace(device=arguments[-1].replace("auto", "cuda:0"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture(params=[checkpoint.SCHEMA, exported.SCHEMA])
def artifact_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a run and an export, as far as the choice of a backend looks at them."""
    return manifest(tmp_path, json.dumps({"schema": request.param}))


@pytest.mark.parametrize(("device", "used"), [("auto", "cuda"), ("cuda", "cuda"), ("cuda:1",) * 2])
@pytest.mark.usefixtures("machine")
def test_a_gpu_is_served_by_the_kernels(
    artifact_dir: Path, device: str, used: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert open_session(artifact_dir, device).device == f"kernels on {used}"
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert f"on kernels on {used}" in record.message


@pytest.mark.usefixtures("machine")
def test_a_cpu_is_served_without_the_kernels(
    artifact_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_session(artifact_dir, "cpu").device == "cpu"
    assert not caplog.records


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_a_gpu_without_cupy_is_served_with_a_warning(
    artifact_dir: Path, machine: Machine, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine.cupy = False
    assert open_session(artifact_dir, device).device.startswith("cuda")
    (record,) = caplog.records
    assert 'pip install "microclip-deploy[gpu]"' in record.message


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_models_the_kernels_do_not_know_are_served_without_them(
    artifact_dir: Path, machine: Machine, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine.problem = UsageError("patch tokens: expected 4 to 1024")
    assert open_session(artifact_dir, device).device.startswith("cuda")
    assert "without the CUDA kernels: patch tokens: expected 4 to 1024" in caplog.text


@pytest.mark.parametrize("problem", [CheckpointError("export again"), EnvironmentProblem("full")])
def test_what_the_kernels_cannot_open_is_an_error_unless_auto_may_choose(
    artifact_dir: Path,
    machine: Machine,
    problem: MicroclipError,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine.problem = problem
    with pytest.raises(type(problem), match=str(problem)):
        open_session(artifact_dir, "cuda")
    assert open_session(artifact_dir, "auto").device.startswith("cuda")
    assert f"without the CUDA kernels: {problem}" in caplog.text
