"""Loading: the device that was asked for really runs it, and a bad graph is bad data."""

import gc
import json
import logging
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from microclip_deploy.errors import CheckpointError, EnvironmentProblem, MicroclipError, UsageError
from microclip_deploy.serving import onnx_graph
from microclip_deploy.serving.onnx_graph import Buffer, OnnxGraph

CPU, CUDA, OPENVINO = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "OpenVINO"))


class FakeSession:
    """Takes what ONNX Runtime takes, and runs on `got` or fails with `error`."""

    got: Sequence[str] = (CPU,)
    error: Exception | None = None
    asked: list[tuple[str, dict[str, str]]]
    settings: onnxruntime.SessionOptions

    def __init__(
        self,
        _path: str,
        settings: onnxruntime.SessionOptions,
        providers: list[tuple[str, dict[str, str]]],
        **options: Any,
    ) -> None:
        assert options == {"enable_fallback": 0}
        FakeSession.asked, FakeSession.settings = providers, settings
        if self.error is not None and providers[0][0] != CPU:
            raise self.error
        self.providers = list(self.got) if providers[0][0] != CPU else [CPU]

    def get_providers(self) -> list[str]:
        return self.providers

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {name: {"device_id": "0", **options} for name, options in self.asked}

    def run(self, _outputs: list[str], _feeds: dict[str, Any]) -> list[Any]:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 4096")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    """Return the session of an onnxruntime with all providers, whose libraries may be missing."""
    monkeypatch.setattr(FakeSession, "got", (CPU,))
    monkeypatch.setattr(FakeSession, "error", None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, OPENVINO, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn.so"))
    return FakeSession


@pytest.fixture
def graph_file(tmp_path: Path, export: Path) -> Path:
    """Return an intact graph."""
    return export / "full.onnx"


def test_an_intact_graph_tells_its_device_inputs_and_outputs(graph_file: Path) -> None:
    graph = OnnxGraph(graph_file, threads=1)
    assert graph.device == "cpu"
    assert graph.inputs()["image"].shape == ("batch", 32, 32, 3)
    assert graph.inputs()["classifier"].dtype == "tensor(float)"
    assert "embedding" in graph.outputs()


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "", "cpu:0"])
def test_unknown_devices_are_refused(graph_file: Path, device: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda, cuda:N or openvino"):
        OnnxGraph(graph_file, device)


@pytest.mark.parametrize(
    ("device", "package"), [("cuda", "onnxruntime-gpu"), ("openvino", "onnxruntime-openvino")]
)
def test_a_provider_that_is_not_installed_comes_with_its_install_line(
    graph_file: Path, device: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(EnvironmentProblem, match=rf"pip install '?{package}"):
        OnnxGraph(graph_file, device)


def test_auto_is_the_cpu_where_there_is_nothing_else(
    graph_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    assert OnnxGraph(graph_file, "auto").device == "cpu"
    assert not caplog.records


@pytest.mark.usefixtures("runtime")
def test_a_silent_fallback_to_the_cpu_is_an_error(
    graph_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EnvironmentProblem, match=r"expected CUDA.*found CPU.*libcudnn") as found:
        OnnxGraph(graph_file, "cuda")
    assert "--device cpu" in str(found.value)
    assert capsys.readouterr().out == ""


def test_a_gpu_that_fails_is_an_environment_problem(
    graph_file: Path, runtime: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = RuntimeError("CUDA failure 100: no CUDA-capable device is detected")
    monkeypatch.setattr(runtime, "error", problem)
    with pytest.raises(EnvironmentProblem, match="no CUDA-capable device"):
        OnnxGraph(graph_file, "cuda")


@pytest.mark.usefixtures("runtime")
def test_auto_says_why_it_is_not_the_gpu(
    graph_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert OnnxGraph(graph_file, "auto").device == "cpu"
    assert "running on the CPU: --device cuda: expected CUDA" in caplog.text


@pytest.mark.parametrize(
    ("device", "number", "asked"),
    [
        ("auto", "0", {}),
        ("cuda", "0", {}),
        ("cuda:0", "0", {}),
        ("cuda:3", "3", {"device_id": "3"}),
    ],
)
def test_the_gpu_computes_in_float32(
    graph_file: Path,
    runtime: type[FakeSession],
    device: str,
    number: str,
    asked: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "got", (CUDA, CPU))
    assert OnnxGraph(graph_file, device).device == f"cuda:{number}"
    assert runtime.asked == [(CUDA, {**asked, "use_tf32": "0"})]


def test_openvino_computes_in_float32(
    graph_file: Path, runtime: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "got", (OPENVINO, CPU))
    assert OnnxGraph(graph_file, "openvino", threads=2).device == "openvino"
    options = runtime.asked[0][1]
    wanted = {"CPU": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}}
    assert json.loads(options["load_config"]) == wanted


@pytest.mark.parametrize(("threads", "allowed", "used"), [(2, 1, 2), (None, 1, 1), (None, None, 0)])
def test_threads_are_those_asked_for_or_allowed(
    graph_file: Path,
    runtime: type[FakeSession],
    monkeypatch: pytest.MonkeyPatch,
    threads: int | None,
    allowed: int | None,
    used: int,
) -> None:
    monkeypatch.setattr(onnx_graph, "limited_cpus", lambda: allowed)
    OnnxGraph(graph_file, threads=threads)
    assert runtime.settings.intra_op_num_threads == used


def test_products_of_int8_do_not_overflow(tmp_path: Path) -> None:
    """Where a processor lacks VNNI, pairs of the largest products would not fit in 16 bits."""
    rows, inner, columns = 4, 64, 32
    value = helper.make_tensor_value_info
    weights = np.full((inner, columns), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [value("x", TensorProto.UINT8, [rows, inner])],
        [value("y", TensorProto.INT32, [rows, columns])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    path = tmp_path / "product.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    found = OnnxGraph(path).run(["y"], {"x": np.full((rows, inner), 255, np.uint8)})[0]
    np.testing.assert_array_equal(found, 255 * 127 * inner)


def external(location: str) -> bytes:
    """Return a graph whose constant lies in another file."""
    value = helper.make_tensor_value_info
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
        [tensor],
    )
    opsets = [helper.make_opsetid("", 20)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def changed(path: Path, **fields: int) -> bytes:
    """Return a graph with other versions."""
    model = onnx.load(path)
    model.ir_version = fields.get("ir_version", model.ir_version)
    model.opset_import[0].version = fields.get("opset", model.opset_import[0].version)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "damage", ["empty", "garbage", "truncated", "opset", "ir_version", "absolute", "outside"]
)
def test_graphs_that_cannot_be_loaded_are_bad_data(graph_file: Path, damage: str) -> None:
    outside = graph_file.parent.parent / "secret"
    outside.write_bytes(b"\0\0\0\0")
    graph_file.write_bytes(
        {
            "empty": b"",
            "garbage": b"no graph" * 99,
            "truncated": graph_file.read_bytes()[:-100],
            "opset": changed(graph_file, opset=999),
            "ir_version": changed(graph_file, ir_version=999),
            "absolute": external(str(outside)),
            "outside": external("../secret"),
        }[damage]
    )
    with pytest.raises(CheckpointError, match=r"expected a graph.*export again"):
        OnnxGraph(graph_file)


def test_a_missing_graph_is_bad_data(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        OnnxGraph(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    "feeds",
    [
        {},
        {"image": np.zeros((1, 8, 8, 3), np.uint8)},
        {"image": np.zeros((1, 32, 32, 3), np.float32)},
        {"other": np.zeros(1, np.float32)},
    ],
)
def test_what_a_graph_cannot_take_is_an_error_of_ours(
    graph_file: Path, feeds: dict[str, Any]
) -> None:
    with pytest.raises(MicroclipError, match=r"full\.onnx"):
        OnnxGraph(graph_file).run(["cls"], feeds)


@pytest.mark.usefixtures("runtime")
def test_too_large_a_batch_is_an_environment_problem(graph_file: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="lower --batch-size"):
        OnnxGraph(graph_file).run(["cls"], {})


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def buffer(array: NDArray[Any]) -> Buffer:
    return Buffer(array.ctypes.data, array.dtype.type, array.shape)


def test_a_bound_graph_reads_and_writes_in_place(
    graph_file: Path, pixels: NDArray[np.uint8]
) -> None:
    graph = OnnxGraph(graph_file)
    cls, mask = np.zeros((3, 3), np.float32), np.zeros((3, 4), np.bool_)
    run = graph.bind({"image": buffer(pixels)}, {"cls": buffer(cls), "mask": buffer(mask)})
    for _ in range(2):
        run()
        wanted = graph.run(["cls", "mask"], {"image": pixels})
        np.testing.assert_array_equal(cls, wanted[0])
        np.testing.assert_array_equal(mask, wanted[1])
        pixels[:] = pixels[::-1].copy()


def test_a_graph_without_the_bound_names_is_an_error_of_ours(
    graph_file: Path, pixels: NDArray[np.uint8]
) -> None:
    graph, cls = OnnxGraph(graph_file), np.zeros((3, 3), np.float32)
    with pytest.raises(CheckpointError, match=r"full\.onnx"):
        graph.bind({"other": buffer(pixels)}, {"cls": buffer(cls)})()
    with pytest.raises(CheckpointError, match=r"full\.onnx"):
        graph.bind({"image": buffer(pixels)}, {"patches": buffer(cls)})()


def test_buffers_of_another_size_are_an_error_of_ours(
    graph_file: Path, pixels: NDArray[np.uint8]
) -> None:
    cls = np.zeros((2, 3), np.float32)
    with pytest.raises(CheckpointError, match=r"full\.onnx"):
        OnnxGraph(graph_file).bind({"image": buffer(pixels)}, {"cls": buffer(cls)})()


def test_the_gpu_works_on_the_stream_it_is_given(
    graph_file: Path, runtime: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "got", (CUDA, CPU))
    OnnxGraph(graph_file, "cuda", stream=4096)
    assert runtime.asked[0][1]["user_compute_stream"] == "4096"


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("most", [0, 1])
def test_a_run_that_fails_on_the_gpu_leaves_nothing_to_free_with_the_session(
    graph_file: Path,
    pixels: NDArray[np.uint8],
    runtime: type[FakeSession],
    monkeypatch: pytest.MonkeyPatch,
    bound: bool,
    most: int,
) -> None:
    """What a failed run leaves goes with the next run; without one the session must stay."""
    ran = []

    def run(
        _session: FakeSession, _outputs: None, feeds: dict[str, NDArray[np.uint8]]
    ) -> list[Any]:
        if len(feeds["image"]) > most:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 4096")
        ran.append(feeds["image"])
        return []

    def run_bound(session: FakeSession, _binding: Any) -> None:
        run(session, None, {"image": pixels})

    monkeypatch.setattr(runtime, "got", (CUDA, CPU))
    monkeypatch.setattr(runtime, "run", run)
    monkeypatch.setattr(runtime, "run_with_iobinding", run_bound, raising=False)
    monkeypatch.setattr(runtime, "io_binding", lambda _session: MagicMock(), raising=False)
    graph = OnnxGraph(graph_file, "cuda")
    session = weakref.ref(graph._session)
    fail = partial(graph.run, ["cls"], {"image": pixels})
    with pytest.raises(EnvironmentProblem, match="lower --batch-size"):
        (graph.bind({"image": buffer(pixels)}, {}) if bound else fail)()
    assert [image.shape for image in ran] == most * [(1, 32, 32, 3)]
    del graph, fail
    gc.collect()
    assert (session() is None) == bool(ran)
