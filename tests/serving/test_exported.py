"""An export is read whole or refused, without the training stack."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from microclip_deploy import artifact
from microclip_deploy.errors import CheckpointError
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.serving.exported import (
    CLASSIFIER,
    FULL,
    HEAD_WEIGHTS,
    SCHEMA,
    Export,
    read_export,
    read_head,
)
from tests.serving.made_exports import MANIFEST, write_export

CLASSES = ("robin", "wren", "owl")
MATRIX = np.eye(3, 8, dtype=np.float32)
IMAGE = {"name": "image", "dtype": "uint8", "shape": ["batch", 32, 32, 3]}
CONTENT = {
    **MANIFEST,
    "ncut": NCutSpec(tau=0.3).stored(),
    "unadapted": ["owl"],
    "graphs": {FULL: {"inputs": [IMAGE], "outputs": []}},
    "made_by": "a test",
}


def export_with(directory: Path, matrix: Any = MATRIX, **fields: Any) -> Path:
    """Write an export; its graph is a few bytes, which nothing here parses."""
    return write_export(directory, {FULL: b"a graph"}, matrix, **{**CONTENT, **fields})


def read_with(directory: Path, **fields: Any) -> Export:
    return read_export(export_with(directory, **fields))


def test_an_export_is_read(tmp_path: Path) -> None:
    found = read_with(tmp_path)
    assert found.directory == tmp_path
    assert (found.manifest.classes, found.manifest.unadapted) == (CLASSES, ("owl",))
    assert found.manifest.ncut_spec() == NCutSpec(tau=0.3)
    assert found.manifest.preprocess.size == 32
    assert found.manifest.graphs[FULL].inputs[0].shape == ("batch", 32, 32, 3)
    assert found.stored["made_by"] == "a test"
    np.testing.assert_array_equal(found.classifier, MATRIX)


def test_the_class_matrix_is_float32_however_it_is_stored(tmp_path: Path) -> None:
    assert read_with(tmp_path, matrix=MATRIX.astype(np.float16)).classifier.dtype == np.float32


def test_the_class_matrix_may_have_another_name(tmp_path: Path) -> None:
    name = "classifier-2.safetensors"
    found = read_with(tmp_path, matrix_file=name, classifier=name)
    assert found.manifest.classifier == name
    assert found.classifier.shape == (3, 8)


def test_exports_need_not_say_that_all_classes_are_adapted(tmp_path: Path) -> None:
    assert read_with(tmp_path, unadapted=None).manifest.unadapted == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classes", ["robin"]),
        ("classes", ["robin", "wren", "robin"]),
        ("classes", None),
        ("unadapted", ["eagle"]),
        ("precision", "fp8"),
        ("precision", None),
        ("ncut", {**NCutSpec().stored(), "tau": 0.5}),
        ("ncut", NCutSpec().model_dump()),
        ("preprocess", {"size": 0, "mean": [0.5] * 3, "std": [0.25] * 3}),
        ("preprocess", None),
        ("parent", {}),
        ("graphs", {FULL: {"inputs": 3, "outputs": []}}),
        ("cls_share", "half"),
        ("templates", []),
        ("opset", None),
    ],
)
def test_manifests_that_make_no_sense_are_bad_data(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s)manifest\.json.*{field}.*export again"):
        read_with(tmp_path, **{field: value})


def test_constants_of_the_cut_that_this_version_does_not_know_are_bad_data(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unknown.*export again"):
        read_with(tmp_path, ncut={**NCutSpec().stored(), "unknown": 1})


@pytest.mark.parametrize(
    "matrix",
    [
        MATRIX[:2],
        MATRIX[0],
        np.full_like(MATRIX, np.nan),
        np.where(MATRIX > 0, np.inf, MATRIX).astype(np.float32),
    ],
)
def test_a_class_matrix_that_does_not_fit_is_bad_data(tmp_path: Path, matrix: Any) -> None:
    with pytest.raises(CheckpointError, match=r"finite numbers in 3 rows.*export again"):
        read_with(tmp_path, matrix=matrix)


@pytest.mark.parametrize("content", [b"", b"no tensors" * 99])
def test_a_class_matrix_that_is_none_is_bad_data(tmp_path: Path, content: bytes) -> None:
    export_with(tmp_path)
    (tmp_path / CLASSIFIER).write_bytes(content)
    artifact.write_manifest(tmp_path, SCHEMA, CONTENT, [FULL, CLASSIFIER])
    with pytest.raises(CheckpointError, match="expected a tensor 'classifier'"):
        read_export(tmp_path)


def test_a_class_matrix_of_another_name_is_bad_data(tmp_path: Path) -> None:
    export_with(tmp_path)
    save_file({"matrix": MATRIX}, tmp_path / CLASSIFIER)
    artifact.write_manifest(tmp_path, SCHEMA, CONTENT, [FULL, CLASSIFIER])
    with pytest.raises(CheckpointError, match="expected a tensor 'classifier'"):
        read_export(tmp_path)


@pytest.mark.parametrize("listed", [[FULL], [CLASSIFIER], []])
def test_files_that_are_not_listed_are_not_trusted(tmp_path: Path, listed: list[str]) -> None:
    export_with(tmp_path)
    artifact.write_manifest(tmp_path, SCHEMA, CONTENT, listed)
    with pytest.raises(CheckpointError, match="does not list"):
        read_export(tmp_path)


@pytest.mark.parametrize("name", [FULL, CLASSIFIER])
def test_changed_files_are_refused(tmp_path: Path, name: str) -> None:
    export_with(tmp_path)
    with open(tmp_path / name, "ab") as file:
        file.write(b"!")
    with pytest.raises(CheckpointError, match="bytes are not the manifest's"):
        read_export(tmp_path)


def test_other_artifacts_are_no_exports(tmp_path: Path) -> None:
    export_with(tmp_path)
    artifact.write_manifest(tmp_path, "microclip.checkpoint/1", CONTENT, [FULL])
    with pytest.raises(CheckpointError, match=r"expected schema microclip\.export/1"):
        read_export(tmp_path)
    with pytest.raises(CheckpointError, match="expected a finished artifact"):
        read_export(tmp_path / "none")


def test_reading_needs_neither_torch_nor_onnx(tmp_path: Path) -> None:
    export_with(tmp_path)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnxruntime')))\n"
        "from pathlib import Path\n"
        "from microclip_deploy.serving.exported import read_export\n"
        "print(read_export(Path(sys.argv[1])).manifest.model_dump_json())"
    )
    call = [sys.executable, "-c", code, str(tmp_path)]
    told = subprocess.run(call, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["classes"] == list(CLASSES)


def with_head(directory: Path, **tensors: NDArray[Any]) -> Export:
    """Return an export with matrices of the head, C = 3, E = 8."""
    export_with(directory)
    save_file(tensors, directory / HEAD_WEIGHTS)
    artifact.write_manifest(directory, SCHEMA, CONTENT, [FULL, CLASSIFIER, HEAD_WEIGHTS])
    return read_export(directory)


def test_the_heads_matrices_are_read(tmp_path: Path) -> None:
    match, project = np.eye(5, dtype=np.float32), np.ones((8, 5), np.float32)
    found = read_head(with_head(tmp_path, match=match, project=project))
    assert found.match is not None
    np.testing.assert_array_equal(found.match, match)
    np.testing.assert_array_equal(found.project, project)


def test_a_head_that_pools_all_tokens_alike_has_one_matrix(tmp_path: Path) -> None:
    assert read_head(with_head(tmp_path, project=np.ones((8, 5), np.float32))).match is None


def test_an_export_from_before_the_matrices_opens_and_says_export_again(tmp_path: Path) -> None:
    export = read_with(tmp_path)
    with pytest.raises(CheckpointError, match=r"older export.*export again, or use --device cpu"):
        read_head(export)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"match": np.eye(5, dtype=np.float32)},
        {"project": np.ones((7, 5), np.float32)},
        {"project": np.ones((8, 5), np.float64)},
        {"project": np.ones((8, 5), np.float32), "match": np.eye(8, dtype=np.float32)},
        {"project": np.ones((8, 5), np.float32), "more": np.eye(5, dtype=np.float32)},
        {"project": np.ones(8, np.float32)},
        {"project": np.full((8, 5), np.nan, np.float32)},
    ],
)
def test_matrices_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, NDArray[Any]]
) -> None:
    export = with_head(tmp_path, **tensors)
    with pytest.raises(CheckpointError, match=r"head\.safetensors: expected .*; export again"):
        read_head(export)
