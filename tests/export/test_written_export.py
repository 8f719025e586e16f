"""What an export holds: the same bytes for the same run, and all that is needed to use it."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import onnx
import onnxruntime
import pytest

from microclip_deploy import artifact
from microclip_deploy.errors import CheckpointError
from microclip_deploy.export.proof.limits import Tolerance
from microclip_deploy.export.proof.probes import Reference
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
    from tests.export.conftest import Graph, Subject, Write

GRAPHS = (FULL, BACKBONE, HEAD)
FILES = {*GRAPHS, CLASSIFIER, HEAD_WEIGHTS, PROBES, PARITY, artifact.MANIFEST}


def test_another_process_writes_the_same_bytes_and_prints_its_proof(
    finished_run: Path, tiny_export: Path, tmp_path: Path
) -> None:
    command = ["-m", "microclip_deploy.cli", "export", str(finished_run), "-o", "new"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    new = tmp_path / "new"
    assert done.returncode == 0, done.stderr
    assert "fp32 against PyTorch, on cpu" in done.stdout
    assert done.stdout.count("full.onnx") == 8
    assert "24 made-up images; same class: 100.00% of all answers" in done.stdout
    assert f"exported: {new} (fp32, proven)" in done.stderr.splitlines()
    assert {path.name for path in new.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    for name in (*GRAPHS, CLASSIFIER, HEAD_WEIGHTS):
        assert (new / name).read_bytes() == (tiny_export / name).read_bytes(), name


def test_the_heads_matrices_are_those_inside_its_graph(tiny_export: Path) -> None:
    graph = onnx.load(tiny_export / HEAD).graph
    inside = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = read_head(read_export(tiny_export))
    assert found.match is not None
    np.testing.assert_array_equal(found.match, inside["head.match"])
    np.testing.assert_array_equal(found.project, inside["head.project"])


def test_the_manifest_tells_what_the_export_is(
    finished_run: Path, tiny_export: Path, tiny: "Subject"
) -> None:
    found, checkpoint = read_export(tiny_export), read_checkpoint(finished_run).manifest
    assert set(found.stored["files"]) == FILES - {artifact.MANIFEST}
    manifest = found.manifest
    assert (manifest.precision, manifest.opset, manifest.unadapted) == ("fp32", 20, ())
    assert manifest.parent.checkpoint_sha256 == artifact.sha256_file(
        finished_run / artifact.MANIFEST
    )
    assert manifest.parent.backbone_sha256 == checkpoint.backbone.sha256
    assert (manifest.classes, manifest.preprocess) == (checkpoint.classes, checkpoint.preprocess)
    assert manifest.ncut_spec() == checkpoint.ncut_spec()
    assert manifest.templates == checkpoint.texts.templates
    tolerance = Tolerance.model_validate(found.stored["tolerance"])
    assert (tolerance.atol, tolerance.min_agreement) == (None, None)
    assert 0 < tolerance.error.encoder.logits < 1.5 * tolerance.error.total.logits < 1e-4
    assert found.stored["agreement"] == 1
    expected = tiny.model.class_matrix().detach().numpy()
    np.testing.assert_array_equal(found.classifier, expected)


def test_a_graph_tells_what_is_needed_to_use_it(
    graph: "Graph", finished_run: Path, tiny_model_dir: Path
) -> None:
    told, checkpoint = graph.properties(), read_checkpoint(finished_run).manifest
    assert told["format"] == "microclip.export/1"
    assert json.loads(told["names"]) == {str(i): name for i, name in enumerate(checkpoint.classes)}
    assert (told["imgsz"], told["channels"]) == ("32", "3")
    assert told["precision"] in get_args(Precision)
    preprocess = json.loads(told["preprocess"])
    assert preprocess.items() >= checkpoint.preprocess.model_dump(mode="json").items()
    assert (preprocess["crop"], preprocess["interpolation"]) == ("center", "bicubic")
    assert json.loads(told["ncut"]) == checkpoint.ncut_spec().stored()
    versions = json.loads(told["versions"])
    assert versions["onnx"] == onnx.__version__
    assert versions.keys() == {"microclip-deploy", "torch", "onnx", "open_clip_torch"}
    assert told["backbone_sha256"] == checkpoint.backbone.sha256
    assert told["checkpoint_sha256"] == artifact.sha256_file(finished_run / artifact.MANIFEST)
    assert told["Image.BitmapPixelFormat"] == "Rgb8"
    assert told["clip_model"] == tiny_model_dir.name
    assert graph.model.producer_name == "microclip-deploy"
    assert f"{graph.model.graph.name}.onnx" in GRAPHS


def test_onnx_runtime_shows_what_a_graph_tells(tiny_export: Path) -> None:
    session = onnxruntime.InferenceSession(tiny_export / FULL, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta()
    assert told.graph_name == "full"
    assert json.loads(told.custom_metadata_map["names"])["0"] == "red circle"


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_reduced_precisions_can_be_served(
    write: "Write",
    tiny_export: Path,
    reference: Reference,
    precision: Precision,
    caplog: pytest.LogCaptureFixture,
) -> None:
    export = read_export(write(precision))
    assert export.manifest.precision == precision
    with open_session(export.directory) as session, open_session(tiny_export) as exact:
        found, expected = (each.predict(reference.images).logits for each in (session, exact))
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    assert np.abs(found - expected).max() > 1e-4
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_bfloat16_is_proven_though_no_cpu_runs_it(write: "Write") -> None:
    assert read_export(write("bf16")).manifest.precision == "bf16"
    with pytest.raises(CheckpointError):
        open_session(write("bf16"))
