"""`verify`: proven again, without the training stack; a changed graph is found out."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from rich.console import Console
from safetensors.numpy import load_file, save_file

from microclip_deploy import artifact
from microclip_deploy.cli.main import main
from microclip_deploy.errors import EnvironmentProblem
from microclip_deploy.export import to_onnx
from microclip_deploy.export.class_rows import remove_classes
from microclip_deploy.export.command import ExportRequest, run_export
from microclip_deploy.export.proof.verify import VERIFIED
from microclip_deploy.serving.exported import BACKBONE, FULL, HEAD, PARITY, PROBES, SCHEMA

if TYPE_CHECKING:
    from tests.export.conftest import Remember

TRAINING = (
    "torch", "torchvision", "open_clip", "timm", "onnx", "onnx_ir", "onnxscript", "matplotlib",
    "jinja2", "tensorboard",
)  # fmt: skip

WITHOUT_TRAINING = f"""\
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {TRAINING!r} else find(name, path, target)

PathFinder.find_spec = find_spec
from microclip_deploy.cli.main import main
status = main(sys.argv[1:])
sys.exit(status or bool(set({TRAINING!r}) & sys.modules.keys()))
"""
"""Runs a command as where these packages are not installed."""


@pytest.fixture
def export(tiny_export: Path, tmp_path: Path) -> Path:
    """Return an export that may be damaged."""
    return shutil.copytree(tiny_export, tmp_path / "export")


@pytest.fixture(scope="module")
def large_export(
    finished_run: Path, remember: "Remember", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return an export whose weights are a file of their own."""
    directory = tmp_path_factory.mktemp("large") / "export"
    with pytest.MonkeyPatch.context() as patch, remember():
        patch.setattr(to_onnx, "SINGLE_FILE_LIMIT", 1000)
        run_export(ExportRequest(finished_run, directory), Console(quiet=True))
    return directory


def verify(export: Path, *options: str) -> int:
    return main(["verify", str(export), *options])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one error line."""
    found = capsys.readouterr().err
    assert "Traceback" not in found
    (line,) = (line for line in found.splitlines() if line.startswith("error: "))
    return line


def change(export: Path, name: str, changed: Callable[[ModelProto], None]) -> None:
    """Rewrite a graph and, so that nobody notices, the manifest."""
    model = onnx.load(export / name, load_external_data=False)
    changed(model)
    (export / name).write_bytes(model.SerializeToString())
    declare(export, name)


def declare(export: Path, *names: str, **fields: Any) -> None:
    """Let the manifest say that files and fields are as they should be."""
    manifest = json.loads((export / artifact.MANIFEST).read_text())
    manifest.pop("sha256")
    stored = {name: value for name, value in (manifest | fields).items() if value is not None}
    artifact.rewrite_manifest(export, stored, list(names))


def weight(name: str, to: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[ModelProto], None]:
    def changed(model: ModelProto) -> None:
        (tensor,) = (each for each in model.graph.initializer if each.name == name)
        array = np.ascontiguousarray(to(numpy_helper.to_array(tensor).copy()))
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return changed


def test_an_intact_export_is_proven_again(
    export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    before = {path.name: path.read_bytes() for path in export.iterdir()}
    assert verify(export) == 0
    told = capsys.readouterr()
    assert "fp32 against PyTorch, on cpu" in told.out
    assert "same class: 100.00% of all answers" in told.out
    after = {path.name: path.read_bytes() for path in export.iterdir()}
    assert after.keys() - before.keys() == {VERIFIED}
    assert before.items() <= after.items()
    proof, first = (artifact.read_json(export / name) for name in (VERIFIED, PARITY))
    assert proof["departure"] is None
    assert proof["stages"] == first["stages"]


def test_verifying_needs_no_training_stack(export: Path) -> None:
    call = [sys.executable, "-c", WITHOUT_TRAINING, "verify", str(export), "--json"]
    told = subprocess.run(call, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    proof = json.loads(told.stdout)
    assert proof["departure"] is None
    assert proof == artifact.read_json(export / VERIFIED)
    assert [stage["stage"] for stage in proof["stages"]][-1] == "top1"


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        (BACKBONE, "backbone.patch", "backbone.onnx: cls"),
        (HEAD, "head.match", "head.onnx: attention"),
        (FULL, "head.project", "full.onnx: fg"),
        (FULL, "classifier", "full.onnx: logits"),
    ],
)
def test_a_graph_changed_behind_the_manifest_departs(
    export: Path, capsys: pytest.CaptureFixture[str], name: str, tensor: str, expected: str
) -> None:
    change(export, name, weight(tensor, lambda array: array[::-1]))
    assert verify(export) == 5
    told = error_of(capsys)
    assert told.startswith(f"error: {expected}: expected at most ")
    assert str(export / VERIFIED) in told
    assert artifact.read_json(export / VERIFIED)["departure"] == expected


def test_weights_that_are_no_numbers_depart(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(export, FULL, weight("classifier", lambda array: array * np.float32(np.nan)))
    assert verify(export, "--json") == 5
    told = capsys.readouterr()
    assert "error: full.onnx: logits: expected at most" in told.err
    assert json.loads(told.out)["departure"] == "full.onnx: logits"


def test_what_is_no_number_departs_without_a_limit(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(export, FULL, weight("classifier", lambda array: array * np.float32(np.nan)))
    declare(export, limits={"top1": 1.0})
    assert verify(export) == 5
    assert error_of(capsys).startswith("error: full.onnx: logits: expected a number, found nan ")


@pytest.mark.parametrize("name", [FULL, BACKBONE, HEAD, PROBES])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_file_is_bad_data(export: Path, name: str, damage: str) -> None:
    content = (export / name).read_bytes()
    flipped = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    if damage == "missing":
        (export / name).unlink()
    else:
        (export / name).write_bytes(flipped if damage == "flipped" else content[:-1])
    assert verify(export) == 3
    assert not (export / VERIFIED).exists()


def test_other_pixels_than_this_machine_makes_depart(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = load_file(export / PROBES)
    stored["images"][3, 5, 5] ^= 8
    save_file(stored, export / PROBES)
    declare(export, PROBES)
    assert verify(export) == 5
    assert error_of(capsys).startswith("error: preprocess: pixels: ")


@pytest.mark.parametrize(
    "limits", [None, {}, {"top1": "much"}, {"top1": 0, "speed": 1}, [1, 2], "none"]
)
def test_a_manifest_without_limits_is_bad_data(
    export: Path, capsys: pytest.CaptureFixture[str], limits: Any
) -> None:
    declare(export, limits=limits)
    assert verify(export) == 3
    assert "limits" in error_of(capsys)


def test_probes_of_another_model_are_bad_data(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = load_file(export / PROBES)
    save_file({**stored, "logits": np.pad(stored["logits"], ((0, 0), (0, 4)))}, export / PROBES)
    declare(export, PROBES)
    assert verify(export) == 3
    assert "expected shape" in error_of(capsys)


@pytest.mark.parametrize("kind", ["missing", "empty", "run"])
def test_what_is_no_export_is_bad_data(finished_run: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "empty").mkdir()
    assert verify(finished_run if kind == "run" else tmp_path / kind) == 3


def test_a_run_answers_anew(export: Path, finished_run: Path, tmp_path: Path) -> None:
    (export / PROBES).write_bytes(b"")
    declare(export, PROBES)  # the stored answers are not needed
    run = shutil.copytree(finished_run, tmp_path / "moved")
    assert verify(export, "--run", str(run)) == 0


def test_a_run_answers_to_photos_of_the_users(
    export: Path, finished_run: Path, photos: Path
) -> None:
    assert verify(export, "--run", str(finished_run), "--images", str(photos)) == 0
    assert artifact.read_json(export / VERIFIED)["images"] == 48


def test_photos_without_a_run_have_no_answers(
    export: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(export, "--images", str(photos)) == 2
    assert "--run" in error_of(capsys)


def test_another_run_is_bad_data(
    export: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(finished_run, tmp_path / "other")
    declare(other, created_utc="another day")
    assert verify(export, "--run", str(other)) == 3
    assert "expected the run that was exported" in error_of(capsys)


@pytest.mark.parametrize("kind", ["missing", "export"])
def test_a_run_that_is_none_is_bad_data(
    export: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(export, "--run", str(export if kind == "export" else tmp_path / "none")) == 3
    assert error_of(capsys)


def test_an_export_that_cannot_be_written_to_is_proven(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(path: Path, _value: object) -> None:
        raise EnvironmentProblem(f"{path}: read-only file system")

    monkeypatch.setattr(artifact, "write_json", read_only)
    assert verify(export) == 0
    assert "warning: " in capsys.readouterr().err


def test_changed_classes_leave_the_proof_valid(export: Path) -> None:
    remove_classes(export, ["green square"])
    assert verify(export) == 0


def test_large_weights_are_proven(large_export: Path) -> None:
    assert (large_export / to_onnx.WEIGHTS).is_file()
    assert verify(large_export) == 0


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_large_weights_are_bad_data(
    large_export: Path, tmp_path: Path, damage: str
) -> None:
    export = shutil.copytree(large_export, tmp_path / "export")
    weights = export / to_onnx.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.unlink()
    if damage == "flipped":
        weights.write_bytes(content)
    assert verify(export) == 3


@pytest.mark.parametrize("location", ["../x", "/etc/passwd", "folder/../../x"])
@pytest.mark.parametrize("name", [FULL, BACKBONE, HEAD])
def test_weights_outside_the_export_are_refused(
    large_export: Path,
    tmp_path: Path,
    name: str,
    location: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export = shutil.copytree(large_export, tmp_path / "export")
    shutil.copy(large_export / to_onnx.WEIGHTS, tmp_path / "x")

    def elsewhere(model: ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    change(export, name, elsewhere)
    assert verify(export) == 3
    assert name in error_of(capsys)


def test_bfloat16_needs_onnx_to_be_proven_on_a_cpu(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declare(export, precision="bf16")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert verify(export) == 4
    assert 'pip install "microclip-deploy[export]"' in error_of(capsys)


def test_the_schema_is_the_exports(export: Path) -> None:
    declare(export, schema="microclip.export/2")
    assert SCHEMA == "microclip.export/1"
    assert verify(export) == 3
