"""The schema of the manifest chooses the backend, and a missing package is named."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from microclip_deploy import checkpoint, exported
from microclip_deploy.errors import CheckpointError, UsageError
from microclip_deploy.serving import is_export, open_session
from microclip_deploy.serving.onnx_backend import OnnxSession
from microclip_deploy.serving.torch_backend import TorchSession


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


@pytest.mark.parametrize(
    ("schema", "package", "extra"),
    [
        (checkpoint.SCHEMA, "torch", "adapt"),
        (checkpoint.SCHEMA, "open_clip", "adapt"),
        (exported.SCHEMA, "onnxruntime", "cpu"),
    ],
)
def test_a_missing_package_comes_with_its_install_line(
    tmp_path: Path, schema: str, package: str, extra: str
) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from pathlib import Path\n"
        "from microclip_deploy import open_session\n"
        "from microclip_deploy.errors import EnvironmentProblem\n"
        "try:\n    open_session(Path(sys.argv[1]))\n"
        "except EnvironmentProblem as error:\n    print(error)\n"
    )
    directory = manifest(tmp_path, json.dumps({"schema": schema}))
    call = [sys.executable, "-c", code, str(directory)]
    found = subprocess.check_output(call, text=True)
    assert f'pip install "microclip-deploy[{extra}]"' in found
    assert package in found
