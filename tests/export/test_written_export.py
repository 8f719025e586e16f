"""What an export holds: the same bytes for the same run, and all that is needed to use it."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file

from microclip_deploy import artifact
from microclip_deploy.cli.main import main
from microclip_deploy.errors import CheckpointError
from microclip_deploy.export import to_onnx
from microclip_deploy.export.proof.limits import LIMITS, Limits
from microclip_deploy.model.checkpoint import read_checkpoint
from microclip_deploy.serving import open_session
from microclip_deploy.serving.exported import (
    BACKBONE,
    CLASSIFIER,
    FULL,
    HEAD,
    HEAD_WEIGHTS,
    PARITY,
    PROBES,
    Precision,
    read_export,
    read_head,
)

if TYPE_CHECKING:
    from tests.export.conftest import Remember, Subject

GRAPHS = (FULL, BACKBONE, HEAD)
FILES = {*GRAPHS, CLASSIFIER, HEAD_WEIGHTS, PROBES, PARITY, artifact.MANIFEST}


@pytest.fixture(scope="module", autouse=True)
def _trace_once(remember: "Remember") -> Iterator[None]:
    with remember():
        yield


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def export(run: Path, out: Path, *options: str) -> int:
    return main(["export", str(run), "-o", str(out), *options])


@pytest.fixture(scope="module")
def elsewhere(
    finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return an export by another process in another folder, and what it printed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    call = [
        sys.executable,
        "-m",
        "microclip_deploy.cli",
        "export",
        str(finished_run),
        "-o",
        "new",
    ]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "COLUMNS": "100"}
    told = subprocess.run(
        call, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return folder / "new", told


def test_another_process_writes_the_same_bytes(
    elsewhere: tuple[Path, Any], tiny_export: Path
) -> None:
    for name in (*GRAPHS, CLASSIFIER, HEAD_WEIGHTS):
        assert (elsewhere[0] / name).read_bytes() == (tiny_export / name).read_bytes()


def test_the_heads_matrices_are_those_inside_its_graph(tiny_export: Path) -> None:
    graph = onnx.load(tiny_export / HEAD).graph
    inside = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = read_head(read_export(tiny_export))
    assert found.match is not None
    np.testing.assert_array_equal(found.match, inside["head.match"])
    np.testing.assert_array_equal(found.project, inside["head.project"])


def test_an_export_prints_its_proof(
    elsewhere: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    directory, told = elsewhere
    assert told.returncode == 0, told.stderr
    assert "fp32 against PyTorch, on cpu" in told.stdout
    assert told.stdout.count("full.onnx") == 8
    assert "24 made-up images; same class: 100.00% of all answers" in told.stdout
    assert told.stderr.splitlines()[-1] == f"exported: {directory} (fp32, proven)"
    assert {path.name for path in directory.iterdir()} == FILES
    assert [path.name for path in directory.parent.iterdir()] == ["new"]


def test_the_manifest_tells_what_the_export_is(run: Path, tiny_export: Path) -> None:
    found, checkpoint = read_export(tiny_export), read_checkpoint(run).manifest
    assert set(found.stored["files"]) == FILES - {artifact.MANIFEST}
    manifest = found.manifest
    assert (manifest.precision, manifest.opset, manifest.unadapted) == ("fp32", 20, ())
    assert manifest.parent.checkpoint_sha256 == artifact.sha256_file(run / artifact.MANIFEST)
    assert manifest.parent.backbone_sha256 == checkpoint.backbone.sha256
    assert (manifest.classes, manifest.preprocess) == (checkpoint.classes, checkpoint.preprocess)
    assert manifest.ncut_spec() == checkpoint.ncut_spec()
    assert manifest.templates == checkpoint.texts.templates
    assert Limits.model_validate(found.stored["limits"]) == LIMITS["fp32"]
    assert found.stored["agreement"] == 1


def test_the_class_matrix_is_the_adapted_one(tiny_export: Path, tiny: "Subject") -> None:
    expected = tiny.model.class_matrix().detach().numpy()
    np.testing.assert_array_equal(read_export(tiny_export).classifier, expected)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_tells_what_is_needed_to_use_it(tiny_export: Path, run: Path, name: str) -> None:
    session = onnxruntime.InferenceSession(tiny_export / name, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    checkpoint = read_checkpoint(run).manifest
    assert told["format"] == "microclip.export/1"
    assert json.loads(told["names"]) == {
        "0": "red circle", "1": "green square", "2": "blue stripe"
    }  # fmt: skip
    assert (told["imgsz"], told["channels"], told["precision"]) == ("32", "3", "fp32")
    preprocess = json.loads(told["preprocess"])
    assert preprocess.items() >= checkpoint.preprocess.model_dump(mode="json").items()
    assert (preprocess["crop"], preprocess["interpolation"]) == ("center", "bicubic")
    assert json.loads(told["ncut"]) == checkpoint.ncut_spec().stored()
    assert json.loads(told["ncut"])["fingerprint"] == checkpoint.ncut_spec().fingerprint()
    versions = json.loads(told["versions"])
    assert versions["onnx"] == onnx.__version__
    assert versions.keys() == {"microclip-deploy", "torch", "onnx", "open_clip_torch"}
    assert told["backbone_sha256"] == checkpoint.backbone.sha256
    assert told["checkpoint_sha256"] == artifact.sha256_file(run / artifact.MANIFEST)
    assert len(told["weights_sha256"]) == 64
    assert told["Image.BitmapPixelFormat"] == "Rgb8"
    session_name = session.get_modelmeta()
    assert (session_name.producer_name, session_name.graph_name) == (
        "microclip-deploy", Path(name).stem
    )  # fmt: skip


def test_metadata_names_no_place_on_this_machine(tiny_export: Path, tiny_model_dir: Path) -> None:
    for name in GRAPHS:
        told = {entry.key: entry.value for entry in onnx.load(tiny_export / name).metadata_props}
        assert told["clip_model"] == tiny_model_dir.name
        assert not any(str(tiny_model_dir.parent) in value for value in told.values())


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_reduced_precisions_can_be_served(
    run: Path,
    tmp_path: Path,
    tiny_export: Path,
    precision: Precision,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert export(run, tmp_path / "new", "--dtype", precision) == 0
    written = read_export(tmp_path / "new")
    assert written.manifest.precision == precision
    assert Limits.model_validate(written.stored["limits"]) == LIMITS[precision]
    images = load_file(tiny_export / PROBES)["images"]
    with open_session(tmp_path / "new") as session, open_session(tiny_export) as exact:
        found, expected = (each.predict(images).logits for each in (session, exact))
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    assert np.abs(found - expected).max() > 1e-4
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_bfloat16_is_proven_though_no_cpu_runs_it(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "new", "--dtype", "bf16") == 0
    assert read_export(tmp_path / "new").manifest.precision == "bf16"
    with pytest.raises(CheckpointError):
        open_session(tmp_path / "new")


def test_large_weights_are_part_of_the_export(
    run: Path, tmp_path: Path, tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx, "SINGLE_FILE_LIMIT", 1000)
    assert export(run, tmp_path / "new") == 0
    assert to_onnx.WEIGHTS in read_export(tmp_path / "new").stored["files"]
    images = load_file(tiny_export / PROBES)["images"]
    with open_session(tmp_path / "new") as session, open_session(tiny_export) as exact:
        np.testing.assert_array_equal(session.predict(images).logits, exact.predict(images).logits)
    (tmp_path / "new" / to_onnx.WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights\.data: its bytes"):
        read_export(tmp_path / "new")
