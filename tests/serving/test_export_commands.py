"""`evaluate` and `predict` of an export: without PyTorch, and without a trace in the export."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from microclip_deploy.cli.main import main
from microclip_deploy.evaluation.evaluate import evaluate

TRAINING = ("torch", "torchvision", "open_clip", "timm", "onnx", "matplotlib", "jinja2")

MakeExport = Callable[..., Path]


def without(packages: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command where these packages cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
        "from microclip_deploy.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    call = [sys.executable, "-c", code, *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=False)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_export_is_evaluated_without_the_training_stack(export: Path, photos: Path) -> None:
    before = content(export)
    found = without(TRAINING, "evaluate", str(export), str(photos), "--json")
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert [row["model"] for row in result["rows"]] == ["adapted"] * 3
    assert result["rows"][0]["top1"] == 1.0
    assert result["images"] == 24
    assert found.stderr == "device: cpu\nevaluating: 24/24\n"
    assert content(export) == before


@pytest.mark.parametrize("output_format", ["table", "csv", "json", "jsonl"])
def test_an_export_predicts_without_the_training_stack(
    export: Path, photos: Path, tmp_path: Path, output_format: str
) -> None:
    overlays = tmp_path / "overlays"
    arguments = ["--format", output_format, "--overlay", str(overlays), "--device", "cpu"]
    found = without(TRAINING, "predict", str(export), str(photos / "blue stripe"), *arguments)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("blue stripe") >= 8
    assert len(list(overlays.iterdir())) == 8
    assert found.stderr == "device: cpu\n"


@pytest.mark.parametrize(
    ("package", "extra"), [("onnxruntime", "cpu"), ("torch", "adapt"), ("open_clip", "adapt")]
)
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_the_backend_says_which_package_is_missing(
    export: Path, finished_run: Path, photos: Path, command: str, package: str, extra: str
) -> None:
    model = export if package == "onnxruntime" else finished_run
    found = without((package,), command, str(model), str(photos))
    assert found.returncode == 4
    assert found.stderr.count("error:") == 1
    assert package in found.stderr
    assert f'pip install "microclip-deploy[{extra}]"' in found.stderr


@pytest.mark.parametrize("zero_shot", [True, False])
def test_an_export_has_no_zero_shot_rows(export: Path, photos: Path, zero_shot: bool) -> None:
    found = evaluate(export, photos, zero_shot=zero_shot, batch_size=7)
    tokens = [("adapted", token, "adapted") for token in ("fused", "cls", "fg")]
    assert [row[:3] for row in found.rows] == tokens
    assert found.to_json()["per_class"][0]["zero_shot_correct"] is None
    assert found.warnings == ()


def test_classes_added_later_are_pointed_out(make_export: MakeExport, photos: Path) -> None:
    rows = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0.6, 0.8]], np.float32)
    names = ("red circle", "green square", "blue stripe", "cyan\nline")
    export = make_export(classifier=rows, classes=names, unadapted=names[3:])
    found = evaluate(export, photos)
    assert len(found.warnings) == 1
    assert "recognised zero-shot: 1, such as cyan" in found.warnings[0]
    assert "\n" not in found.warnings[0]


@pytest.mark.parametrize(
    ("device", "code", "part"),
    [("tpu", 2, "openvino"), ("openvino", 4, "pip install"), ("cuda:99", 4, "--device cpu")],
)
def test_devices_an_export_cannot_use(
    export: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    device: str,
    code: int,
    part: str,
) -> None:
    assert main(["predict", str(export), str(photos), "--device", device]) == code
    found = capsys.readouterr().err
    assert found.count("error:") == 1
    assert part in found


def test_a_damaged_export_is_one_error(
    make_export: MakeExport, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = make_export(b"no graph")
    assert main(["evaluate", str(export), str(photos), "--device", "cpu"]) == 3
    found = capsys.readouterr().err
    assert found.count("error:") == 1
    assert "Traceback" not in found


def test_help_names_both_kinds_of_directory(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("evaluate", "predict"):
        assert main([command, "--help"]) == 0
        assert "RUN_OR_EXPORT" in capsys.readouterr().out
