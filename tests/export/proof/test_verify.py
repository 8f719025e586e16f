"""`verify`: proven again, without the training stack; a changed graph is found out."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import ModelProto
from safetensors.numpy import load_file, save_file

from microclip_deploy import artifact
from microclip_deploy.cli.main import main
from microclip_deploy.errors import EnvironmentProblem
from microclip_deploy.export.class_rows import remove_classes
from microclip_deploy.export.proof.verify import VERIFIED
from microclip_deploy.export.to_onnx import WEIGHTS
from microclip_deploy.serving.exported import BACKBONE, FULL, HEAD, PARITY, PROBES
from tests.export.damage import change, declare, unknown, weight

if TYPE_CHECKING:
    from tests.export.conftest import ErrorLine, Write

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


def verify(export: Path, *options: str) -> int:
    return main(["verify", str(export), *options])


def change_probes(export: Path, **changed: Callable[[Any], Any]) -> None:
    """Rewrite stored answers, so that nobody notices."""
    stored = load_file(export / PROBES)
    save_file(
        {**stored, **{name: to(stored[name]) for name, to in changed.items()}}, export / PROBES
    )
    declare(export, PROBES)


def test_an_intact_export_is_proven_again(
    export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    before = {path.name: path.read_bytes() for path in export.iterdir()}
    assert verify(export) == 0
    printed = capsys.readouterr().out
    assert "fp32 against PyTorch, on cpu" in printed
    assert "same class: 100.00% of all answers" in printed
    after = {path.name: path.read_bytes() for path in export.iterdir()}
    assert after.keys() - before.keys() == {VERIFIED}
    assert before.items() <= after.items()
    proof, first = (artifact.read_json(export / name) for name in (VERIFIED, PARITY))
    assert proof["departure"] is None
    assert proof["stages"] == first["stages"]


def test_verifying_needs_no_training_stack(export: Path) -> None:
    remove_classes(export, ["green square"])  # which leaves the proof valid
    call = [sys.executable, "-c", WITHOUT_TRAINING, "verify", str(export), "--json"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)
    assert proof["departure"] is None
    assert proof == artifact.read_json(export / VERIFIED)


def test_a_graph_changed_behind_the_manifest_departs(export: Path, error_line: "ErrorLine") -> None:
    change(export / HEAD, weight("head.match", lambda array: array[::-1]))
    declare(export, HEAD)
    assert verify(export) == 5
    line = error_line()
    assert line.startswith("error: head.onnx: attention: expected at most ")
    assert str(export / VERIFIED) in line
    assert artifact.read_json(export / VERIFIED)["departure"] == "head.onnx: attention"


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"tolerance": {"atol": 1.0}}, "at most 1 from"),
        ({"tolerance": None, "limits": {"logits": 1.0, "top1": 1.0}}, "at most 1 from"),
        ({"precision": "int8"}, "a number"),
    ],
)
def test_what_is_no_number_departs_whatever_the_limit(
    export: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], wanted: str
) -> None:
    change(export / FULL, weight("classifier", unknown))
    declare(export, FULL, **fields)
    assert verify(export, "--json") == 5
    printed = capsys.readouterr()
    assert f"error: full.onnx: logits: expected {wanted}" in printed.err
    assert json.loads(printed.out)["departure"] == "full.onnx: logits"


def test_scales_are_measured_anew_where_the_run_is_given(
    write: "Write", finished_run: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(write("int8-static"), tmp_path / "export")
    assert verify(directory) == 0
    stored = artifact.read_json(directory / artifact.MANIFEST)["tolerance"]
    assert 1e-3 < stored["quantised"]["cls"] < 0.02
    declare(directory, tolerance={**stored, "quantised": {"cls": 1e-5, "patches": 1e-5}})
    assert verify(directory) == 5
    assert verify(directory, "--run", str(finished_run)) == 0


def test_other_pixels_than_this_machine_makes_depart(export: Path, error_line: "ErrorLine") -> None:
    def other(images: Any) -> Any:
        images[3, 5, 5] ^= 8
        return images

    change_probes(export, images=other)
    assert verify(export) == 5
    line = error_line()
    assert line.startswith("error: preprocess: pixels: ")
    assert line.endswith("use the Pillow and torchvision of the export")


@pytest.mark.parametrize("name", [FULL, BACKBONE, HEAD, PROBES, WEIGHTS])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_file_is_bad_data(
    write_large: "Write", tmp_path: Path, name: str, damage: str
) -> None:
    export = shutil.copytree(write_large("fp32"), tmp_path / "export")
    content = bytearray((export / name).read_bytes())
    content[500] ^= 1
    (export / name).unlink()
    if damage == "flipped":
        (export / name).write_bytes(content)
    assert verify(export) == 3
    assert not (export / VERIFIED).exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        *(({"tolerance": None, "limits": limits}, "limits") for limits in (
            None, {}, {"top1": "much"}, [1, 2], "none"
        )),
        *(({"tolerance": tolerance}, "tolerance") for tolerance in (
            {"error": 1}, {"speed": 1}, [1, 2], "none"
        )),
        ({"schema": "microclip.export/2"}, "expected schema microclip.export/1"),
    ],
)  # fmt: skip
def test_a_manifest_that_says_too_little_is_bad_data(
    export: Path, error_line: "ErrorLine", fields: dict[str, Any], told: str
) -> None:
    declare(export, **fields)
    assert verify(export) == 3
    assert told in error_line()


def test_probes_of_another_model_are_bad_data(export: Path, error_line: "ErrorLine") -> None:
    change_probes(export, logits=lambda logits: np.pad(logits, ((0, 0), (0, 4))))
    assert verify(export) == 3
    assert "expected shape" in error_line()


@pytest.mark.parametrize("kind", ["missing", "empty", "run"])
def test_what_is_no_export_is_bad_data(finished_run: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "empty").mkdir()
    assert verify(finished_run if kind == "run" else tmp_path / kind) == 3


def test_a_run_answers_anew_to_photos_of_the_users(
    export: Path, finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    (export / PROBES).write_bytes(b"")
    declare(export, PROBES)  # the stored answers are not needed
    run = shutil.copytree(finished_run, tmp_path / "moved")
    assert verify(export, "--run", str(run), "--images", str(photos)) == 0
    assert artifact.read_json(export / VERIFIED)["images"] == 48


def test_photos_without_a_run_have_no_answers(
    export: Path, photos: Path, error_line: "ErrorLine"
) -> None:
    assert verify(export, "--images", str(photos)) == 2
    assert "--run" in error_line()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("other", "expected the run that was exported"),
        ("none", "expected a finished artifact"),
        ("export", "expected schema microclip.checkpoint/1"),
    ],
)
def test_a_run_that_was_not_exported_is_bad_data(
    export: Path, finished_run: Path, tmp_path: Path, error_line: "ErrorLine", kind: str, told: str
) -> None:
    declare(shutil.copytree(finished_run, tmp_path / "other"), created_utc="another day")
    assert verify(export, "--run", str(tmp_path / kind)) == 3
    assert told in error_line()


def test_an_export_that_cannot_be_written_to_is_proven(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(path: Path, _value: object) -> None:
        raise EnvironmentProblem(f"{path}: read-only file system")

    monkeypatch.setattr(artifact, "write_json", read_only)
    assert verify(export) == 0
    assert "warning: " in capsys.readouterr().err


@pytest.mark.parametrize("location", ["../x", "/etc/passwd", "folder/../../x"])
@pytest.mark.parametrize("name", [FULL, BACKBONE, HEAD])
def test_weights_outside_the_export_are_refused(
    write_large: "Write", tmp_path: Path, name: str, location: str, error_line: "ErrorLine"
) -> None:
    export = shutil.copytree(write_large("fp32"), tmp_path / "export")
    shutil.copy(export / WEIGHTS, tmp_path / "x")

    def elsewhere(model: ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    change(export / name, elsewhere)
    declare(export, name)
    assert verify(export) == 3
    assert name in error_line()


def test_bfloat16_needs_onnx_to_be_proven_on_a_cpu(
    export: Path, monkeypatch: pytest.MonkeyPatch, error_line: "ErrorLine"
) -> None:
    declare(export, precision="bf16")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert verify(export) == 4
    assert 'pip install "microclip-deploy[export]"' in error_line()
