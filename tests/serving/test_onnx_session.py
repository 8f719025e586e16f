"""An export's session answers what its graph computes, and refuses what it cannot."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from microclip_deploy.errors import CheckpointError, DataError, UsageError
from microclip_deploy.serving import Prediction, Session
from microclip_deploy.serving.onnx_session import OnnxSession
from microclip_deploy.serving.torch_session import TorchSession

SIDE = 32

MakeExport = Callable[..., Path]


def images(count: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result


def expected(pixels: NDArray[np.uint8], classifier: NDArray[np.float32]) -> Prediction:
    """Return in NumPy what the graph made by hand computes."""
    cls = unit(pixels.astype(np.float64).mean(axis=(1, 2)))
    fg = unit(cls**2)
    half = SIDE // 2
    quarters = pixels.reshape(-1, 2, half, 2, half, 3).mean(axis=(2, 4, 5)).reshape(-1, 4)
    weights = np.exp(np.pad(quarters, ((0, 0), (0, 1))))
    return Prediction(
        cls.astype(np.float32),
        fg.astype(np.float32),
        (50 * (cls + fg) @ classifier.T).astype(np.float32),
        quarters > quarters.mean(axis=1, keepdims=True),
        (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32),
        np.zeros(len(pixels), np.bool_),
    )


def assert_equal(found: Prediction, wanted: Prediction) -> None:
    both: Iterable[tuple[str, NDArray[Any], NDArray[Any]]]
    both = zip(Prediction._fields, found, wanted, strict=True)
    for name, one, other in both:
        assert one.dtype == other.dtype, name
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6, err_msg=name)


def test_predictions_are_what_the_graph_computes(export: Path) -> None:
    session: Session
    with OnnxSession.open(export) as session:
        assert (session.device, session.preprocess.size) == ("cpu", SIDE)
        assert session.unadapted == frozenset()
        for count in (1, 5):
            found = session.predict(images(count))
            assert_equal(found, expected(images(count), session.classifier()))


def test_views_into_larger_arrays_are_taken_as_they_look(export: Path) -> None:
    with OnnxSession.open(export) as session:
        mirrored = images()[:, :, ::-1]
        assert_equal(session.predict(mirrored), session.predict(mirrored.copy()))


@pytest.fixture
def other_classes(make_export: MakeExport) -> Path:
    """Return an export whose class matrix differs from the one in its graph."""
    rows = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1], [0.6, 0, 0.8]], np.float32)
    names = ("green", "red", "blue", "violet")
    return make_export(classifier=rows, classes=names, unadapted=("violet",))


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_the_class_matrix_beside_the_graph_counts(other_classes: Path, device: str) -> None:
    with OnnxSession.open(other_classes) as session:
        session.device = device  # OpenVINO ignores the matrix it is fed: logits come without it
        assert session.classes[3] == "violet"
        assert session.unadapted == {"violet"}
        found = session.predict(images())
        assert_equal(found, expected(images(), session.classifier()))
        assert found.logits.shape == (3, 4)


def test_the_class_matrix_cannot_be_written_to(export: Path) -> None:
    with OnnxSession.open(export) as session, pytest.raises(ValueError, match="read-only"):
        session.classifier()[0] = 0


@pytest.mark.parametrize(
    "wrong",
    [
        images().astype(np.float32),
        images().transpose(0, 3, 1, 2),
        images()[:, :16],
        images()[0],
        images()[:0],
        images()[..., :1],
        np.uint8(3),
        [],
    ],
)
def test_other_images_are_refused_before_they_reach_the_graph(
    export: Path, wrong: NDArray[np.uint8]
) -> None:
    with (
        OnnxSession.open(export) as session,
        pytest.raises(DataError, match=r"expected uint8 \(B, 32, 32, 3\).*found.*test_view"),
    ):
        session.predict(wrong)


def wide(_graph: onnx.ModelProto) -> NDArray[np.float32]:
    return np.eye(3, 4, dtype=np.float32)


def more_inputs(graph: onnx.ModelProto) -> None:
    graph.graph.input.add().CopyFrom(graph.graph.input[0])
    graph.graph.input[-1].name = "more"


def fewer_outputs(graph: onnx.ModelProto) -> None:
    del graph.graph.output[2]


@pytest.mark.parametrize(("change", "part"), [
    (wide, r"classifier tensor\(float\) \(4,\)"), (more_inputs, "more"),
    (fewer_outputs, "without cls"),
])  # fmt: skip
def test_a_graph_that_does_not_fit_the_manifest_is_refused(
    make_export: MakeExport,
    colours: Callable[..., onnx.ModelProto],
    change: Callable[[onnx.ModelProto], NDArray[np.float32] | None],
    part: str,
) -> None:
    graph = colours()
    matrix = change(graph)
    export = make_export(graph.SerializeToString(), matrix)
    with pytest.raises(CheckpointError, match=rf"full\.onnx: expected the inputs .*{part}"):
        OnnxSession.open(export)


def test_a_graph_for_other_images_is_refused(
    make_export: MakeExport, colours: Callable[..., onnx.ModelProto]
) -> None:
    export = make_export(colours(side=48).SerializeToString())
    with pytest.raises(CheckpointError, match=r"\(32, 32, 3\).*found .*\(48, 48, 3\)"):
        OnnxSession.open(export)


def test_one_session_serves_several_threads(export: Path) -> None:
    with OnnxSession.open(export, threads=1) as session, ThreadPoolExecutor(4) as pool:
        batches = [images(1 + seed % 3, seed) for seed in range(24)]
        for found, batch in zip(pool.map(session.predict, batches), batches, strict=True):
            assert_equal(found, expected(batch, session.classifier()))


def test_a_closed_session_says_so(export: Path) -> None:
    session = OnnxSession.open(export)
    session.close()
    session.close()
    with pytest.raises(UsageError, match="found it closed"):
        session.predict(images())


def test_a_tampered_export_is_refused(export: Path) -> None:
    with open(export / "full.onnx", "ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=r"full\.onnx: its bytes are not the manifest's"):
        OnnxSession.open(export)


def test_a_session_of_a_run_has_no_unadapted_classes(finished_run: Path) -> None:
    with TorchSession.open(finished_run) as session:
        assert session.unadapted == frozenset()
