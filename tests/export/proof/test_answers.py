"""Graphs are asked in batches of many sizes; what cannot be asked is bad data."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

from microclip_deploy.errors import CheckpointError
from microclip_deploy.export.proof.answers import Answers, Asked, Graphs, ask, rotating
from microclip_deploy.export.proof.probes import Reference, silent
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.serving.exported import FULL, Precision

ROWS = np.eye(4, 32, dtype=np.float32)
"""A class matrix from outside."""
SIZES = [*range(1, 10), 24]


def graphs(directory: Path, precision: Precision = "fp32") -> Graphs:
    return Graphs(directory, precision, NCutSpec(), ROWS, 0.5)


@pytest.fixture(scope="module")
def asked(tiny_export: Path, reference: Reference) -> Asked:
    return ask(graphs(tiny_export), reference, "cpu", silent)


@pytest.mark.parametrize("count", [24, 88])
def test_every_batch_size_sees_other_images(count: int) -> None:
    *small, everything = rotating((*range(1, 10), count), count)
    assert sorted(everything) == list(range(count))
    assert not any(set(rows) & set(after) for rows, after in pairwise(small))
    assert len({int(rows[0]) for rows in small}) == 9
    assert set(np.concatenate(small)) == set(range(min(count, 45)))


def test_graphs_are_asked_at_every_batch_size(asked: Asked, reference: Reference) -> None:
    sizes = {name: np.unique(each.sizes).tolist() for name, each in asked._asdict().items()}
    few = {"head": [1, 3, 24], "served": [24]}
    assert sizes == {"backbone": SIZES, "full": SIZES, "parts": SIZES, **few}
    for each in asked[:4]:
        for name, value in each.outputs.items():
            np.testing.assert_allclose(value, getattr(reference, name)[each.rows], atol=5e-5)


def test_the_parts_are_given_what_the_graphs_made(
    asked: Asked, tiny_export: Path, reference: Reference
) -> None:
    steps: list[tuple[int, int]] = []
    wrong = reference._replace(mask=~reference.mask, cls=-reference.cls)
    other = ask(graphs(tiny_export), wrong, "cpu", lambda *step: steps.append(step))
    for name in ("fg", "logits"):
        np.testing.assert_array_equal(other.parts.outputs[name], asked.parts.outputs[name])
    assert np.abs(other.head.outputs["fg"] - asked.head.outputs["fg"]).max() > 0.01
    assert steps == [(done, 34) for done in range(1, 35)]


def test_answers_are_found_by_choice_and_by_image() -> None:
    batches = [np.array([1]), np.array([0, 1])]
    outputs = [{"cls": np.array([[5, 5]])}, {"cls": np.array([[6, 6], [7, 7]])}]
    answers = Answers.of("g", batches, outputs)
    assert (answers.rows.tolist(), answers.sizes.tolist()) == ([1, 0, 1], [1, 2, 2])
    assert answers.by_image("cls").tolist() == [[6, 6], [7, 7]]
    some = answers.where(np.array([True, False, True]))
    assert (some.rows.tolist(), some.sizes.tolist()) == ([1, 1], [1, 2])
    assert some.outputs["cls"].tolist() == [[5, 5], [7, 7]]


def test_a_graph_of_another_model_is_bad_data(tiny_export: Path, reference: Reference) -> None:
    other = reference._replace(logits=np.pad(reference.logits, ((0, 0), (0, 2))))
    with pytest.raises(CheckpointError, match=r"logits: expected shape \(1, 5\).*found \(1, 3\)"):
        ask(graphs(tiny_export), other, "cpu", silent)


@pytest.mark.parametrize("damage", ["missing", "garbage", "empty", "truncated", "outside"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_that_cannot_be_loaded_is_bad_data(
    export: Path, tmp_path: Path, reference: Reference, precision: Precision, damage: str
) -> None:
    path = export / FULL
    content = path.read_bytes()
    (tmp_path / "x").write_bytes(bytes(10**6))
    damaged = {
        "garbage": b"no graph" * 99,
        "empty": b"",
        "truncated": content[:-99],
        "outside": with_a_weight_outside(content),
    }
    path.unlink()
    if damage != "missing":
        path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=r"full\.onnx: expected a graph.*export again"):
        ask(graphs(export, precision), reference, "cpu", silent)


def with_a_weight_outside(content: bytes) -> bytes:
    model = onnx.ModelProto()
    model.ParseFromString(content)
    (tensor,) = (each for each in model.graph.initializer if each.name == "head.match")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../x"
    return bytes(model.SerializeToString())
