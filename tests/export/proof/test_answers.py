"""Graphs are asked in batches of many sizes; what cannot be asked is bad data."""

import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from microclip_deploy.errors import CheckpointError, EnvironmentProblem
from microclip_deploy.export.proof.answers import Answers, Asked, ask, windows
from microclip_deploy.export.proof.probes import Reference
from microclip_deploy.serving.exported import FULL, PROBES, Precision

if TYPE_CHECKING:
    from tests.export.conftest import Write


@pytest.fixture(scope="module")
def reference(tiny_export: Path) -> Reference:
    return Reference.read(tiny_export / PROBES)


ROWS = np.eye(4, 32, dtype=np.float32)
"""A class matrix from outside."""


def answers(directory: Path, reference: Reference, precision: Precision = "fp32") -> Asked:
    return ask(directory, reference, precision, "cpu", ROWS, lambda *_: None)


def test_every_batch_size_sees_other_images() -> None:
    for count in (24, 88):
        *small, everything = windows(count)
        assert [len(rows) for rows in small] == [*range(1, 10)]
        assert sorted(everything) == list(range(count))
        assert not any(set(rows) & set(after) for rows, after in pairwise(small))
        assert len({int(rows[0]) for rows in small}) == 9
        assert all(len(set(rows)) == len(rows) for rows in small)
    assert set(np.concatenate(list(windows(24))[:-1])) == set(range(24))


def test_graphs_are_asked_at_every_batch_size(tiny_export: Path, reference: Reference) -> None:
    found = answers(tiny_export, reference)
    sizes = {name: np.unique(each.sizes).tolist() for name, each in found._asdict().items()}
    every = [*range(1, 10), 24]
    assert sizes == {
        "backbone": every,
        "head": [1, 3, 24],
        "full": every,
        "parts": every,
        "served": [24],
    }
    for each in found[:4]:
        for name, value in each.outputs.items():
            expected = getattr(reference, name)[each.rows]
            np.testing.assert_allclose(value, expected, atol=5e-5)


def test_progress_ends_with_the_last_batch(tiny_export: Path, reference: Reference) -> None:
    shown: list[tuple[int, int]] = []
    ask(tiny_export, reference, "fp32", "cpu", ROWS, lambda *step: shown.append(step))
    assert shown == [(done, 34) for done in range(1, 35)]


def test_the_class_matrix_from_outside_is_served(tiny_export: Path, reference: Reference) -> None:
    served = answers(tiny_export, reference).served
    fused = 50 * (served.outputs["cls"] + served.outputs["fg"])
    np.testing.assert_allclose(served.outputs["logits"], fused @ ROWS.T, atol=5e-5)


def test_the_parts_are_given_what_the_graphs_made(
    tiny_export: Path, tmp_path: Path, reference: Reference
) -> None:
    other = reference._replace(mask=~reference.mask, cls=-reference.cls)
    found, expected = answers(tiny_export, other), answers(tiny_export, reference)
    np.testing.assert_array_equal(found.parts.outputs["fg"], expected.parts.outputs["fg"])
    np.testing.assert_array_equal(found.parts.outputs["logits"], expected.parts.outputs["logits"])
    assert np.abs(found.head.outputs["fg"] - expected.head.outputs["fg"]).max() > 0.01


def test_some_of_the_answers_keep_their_rows_and_sizes() -> None:
    outputs = {"cls": np.arange(6).reshape(3, 2)}
    three = Answers("g", np.array([4, 5, 6]), np.array([1, 2, 2]), outputs)
    some = three.where(np.array([True, False, True]))
    assert some.rows.tolist() == [4, 6]
    assert some.sizes.tolist() == [1, 2]
    assert some.outputs["cls"].tolist() == [[0, 1], [4, 5]]


def test_a_graph_of_another_model_is_bad_data(tiny_export: Path, reference: Reference) -> None:
    other = reference._replace(logits=np.pad(reference.logits, ((0, 0), (0, 2))))
    with pytest.raises(CheckpointError, match=r"logits: expected shape \(1, 5\).*found \(1, 3\)"):
        answers(tiny_export, other)


@pytest.mark.parametrize("damage", ["missing", "garbage", "empty", "truncated", "outside"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_that_cannot_be_loaded_is_bad_data(
    tiny_export: Path, tmp_path: Path, reference: Reference, precision: Precision, damage: str
) -> None:
    export = shutil.copytree(tiny_export, tmp_path / "export")
    path = export / FULL
    content = path.read_bytes()
    (tmp_path / "x").write_bytes(bytes(10**6))
    if damage == "missing":
        path.unlink()
    else:
        damaged = {
            "garbage": b"no graph" * 99,
            "empty": b"",
            "truncated": content[:-99],
            "outside": with_a_weight_outside(content),
        }
        path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=r"full\.onnx: expected a graph.*export again"):
        answers(export, reference, precision)


def with_a_weight_outside(content: bytes) -> bytes:
    model = onnx.ModelProto()
    model.ParseFromString(content)
    (tensor,) = (each for each in model.graph.initializer if each.name == "head.match")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../x"
    return bytes(model.SerializeToString())


def test_asking_bfloat16_on_a_cpu_needs_onnx(
    write: "Write", reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write("bf16")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EnvironmentProblem, match=r"microclip-deploy\[export\]"):
        answers(directory, reference, "bf16")
