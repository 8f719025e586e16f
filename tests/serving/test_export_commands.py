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

TRAINING = ["torch", "torchvision", "open_clip", "timm", "onnx", "matplotlib", "jinja2"]
WITHOUT = """
import contextlib, io, json, sys

packages, *commands = map(json.loads, sys.argv[1:])
sys.modules.update(dict.fromkeys(packages))
from microclip_deploy.cli.main import main

for arguments in commands:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""

MakeExport = Callable[..., Path]


def without(packages: list[str], *commands: list[str]) -> list[tuple[int, str, str]]:
    """Run commands in one process in which packages cannot be imported.

    Returns:
        For each its exit code, stdout and stderr.
    """
    call = [sys.executable, "-c", WITHOUT, *map(json.dumps, (packages, *commands))]
    lines = subprocess.check_output(call, text=True).splitlines()
    return [tuple(json.loads(line)) for line in lines]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_export_is_used_without_the_training_stack(
    export: Path, photos: Path, tmp_path: Path
) -> None:
    before, overlays = content(export), tmp_path / "overlays"
    predict = ["predict", str(export), str(photos / "blue stripe"), "--overlay", str(overlays)]
    (code, told, notes), *predicted = without(
        TRAINING,
        ["evaluate", str(export), str(photos), "--json"],
        *([*predict, "--format", kind] for kind in ("table", "csv", "json", "jsonl")),
    )
    assert code == 0
    assert notes.startswith("device: cpu\nevaluating: 24/24")
    result = json.loads(told)
    assert [row["model"] for row in result["rows"]] == ["adapted"] * 3
    assert (result["rows"][0]["top1"], result["images"]) == (1.0, 24)
    for code, told, notes in predicted:
        assert code == 0
        assert notes.startswith("device: cpu\npredicting: 8/8")
        assert f"overlays: {overlays} (8 pictures)" in notes
        assert told.count("blue stripe") >= 8
    assert len(list(overlays.iterdir())) == 8
    assert content(export) == before


def test_missing_packages_are_named(export: Path, finished_run: Path, photos: Path) -> None:
    runs, exports = (
        [[command, str(model), str(photos)] for command in ("evaluate", "predict")]
        for model in (finished_run, export)
    )
    told = without(["torch", "onnxruntime"], *runs, *exports) + without(["open_clip"], *runs)
    packages = [("torch", "adapt"), ("onnxruntime", "cpu"), ("open_clip", "adapt")]
    for (code, _, error), (package, extra) in zip(told, np.repeat(packages, 2, 0), strict=True):
        assert code == 4
        assert error.count("error:") == 1
        assert package in error
        assert f'pip install "microclip-deploy[{extra}]"' in error


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
