"""The product's own build and run, on fakes of TensorRT; test_engines.py runs this per version.

Every line that speaks to TensorRT runs, with arguments that this version takes, in the right order,
and each failure that TensorRT tells by a value becomes an error of ours.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from microclip_deploy.errors import CheckpointError, EnvironmentProblem
from microclip_deploy.export import to_tensorrt
from microclip_deploy.serving import (
    cuda_pipeline,
    tensorrt_encoder,
    tensorrt_engine,
    tensorrt_library,
)
from microclip_deploy.serving.engines import (
    BACKBONE_PLAN,
    BuildOptions,
    EngineManifest,
    PlanSpec,
    Span,
    Target,
)
from microclip_deploy.serving.exported import GraphSpec, TensorSpec
from microclip_deploy.serving.tensorrt_library import trt
from tests.tensorrt.fake import Call, Fake, HostMemory, Scenario, install

PLAN = b"a plan"
CLASSES = Span(least=2, opt=5, most=4096)
OPTIONS = BuildOptions(batch=Span(least=2, opt=4, most=16))


# ---- building


def tensor(name: str, shape: tuple[int, ...], log: list[Call]) -> Fake:
    """Return an input of the network."""
    answers = {"ITensor.name": name, "ITensor.shape": trt.Dims(shape)}
    return Fake(trt.ITensor, Scenario(answers, log))


def network_answers(**changed: Any) -> dict[str, Any]:
    """Return a parsed network of full.onnx: two inputs, three layers."""
    inputs = [tensor("image", (-1, 32, 32, 3), []), tensor("classifier", (-1, 24), [])]
    kinds = [trt.LayerType.CAST, trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.MATRIX_MULTIPLY]
    layers = [Fake(trt.ILayer, Scenario({"ILayer.type": kind}, [])) for kind in kinds]
    for layer, dtype in zip(layers[1:], (trt.DataType.HALF, trt.DataType.FLOAT), strict=True):
        vars(layer)["_scenario"].answers["ITensor.dtype"] = dtype
    return {
        "INetworkDefinition.num_inputs": len(inputs),
        "INetworkDefinition.get_input": lambda index: inputs[index],
        "INetworkDefinition.num_layers": len(layers),
        "INetworkDefinition.get_layer": lambda index: layers[index],
        "Builder.build_serialized_network": HostMemory(PLAN),
        **changed,
    }


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Return an ONNX file whose class matrix has a default."""
    value = helper.make_tensor_value_info
    matrix = numpy_helper.from_array(np.zeros((3, 24), np.float32), "classifier")
    weight = numpy_helper.from_array(np.ones((24, 24), np.float32), "weight")
    made = helper.make_graph(
        [helper.make_node("MatMul", ["classifier", "weight"], ["logits"])],
        "full",
        [value("classifier", TensorProto.FLOAT, ["classes", 24])],
        [value("logits", TensorProto.FLOAT, ["classes", 24])],
        [matrix, weight],
    )
    path = tmp_path / "full.onnx"
    onnx.save(helper.make_model(made), path)
    return path


def build(graph: Path, options: BuildOptions = OPTIONS, **changed: Any) -> to_tensorrt.Built:
    return to_tensorrt.build_plan(
        graph, options, CLASSES, timing_cache=graph.with_name("cache"), **changed
    )


def names(log: list[Call]) -> list[str]:
    return [call.name for call in log]


def calls(log: list[Call], name: str) -> list[tuple[object, ...]]:
    return [call.args for call in log if call.name == name]


def test_a_build_is_typed_exact_and_in_order(graph: Path) -> None:
    _, log = install(network_answers())
    built = build(graph)
    assert built.plan == PLAN
    assert built.products == Counter(HALF=1, FLOAT=1)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert calls(log, "Builder.create_network") == [(flag,)]
    assert calls(log, "IBuilderConfig.clear_flag") == [(trt.BuilderFlag.TF32,)]
    assert calls(log, "IBuilderConfig.set_flag") == []
    detailed = trt.ProfilingVerbosity.DETAILED
    assert calls(log, "IBuilderConfig.profiling_verbosity=") == [(detailed,)]
    assert calls(log, "IBuilderConfig.max_aux_streams=") == [(0,)]
    assert calls(log, "IBuilderConfig.builder_optimization_level=") == [(3,)]
    level = trt.HardwareCompatibilityLevel.NONE
    assert calls(log, "IBuilderConfig.hardware_compatibility_level=") == [(level,)]
    order = names(log)
    parsed, added = (
        order.index("OnnxParser.parse"),
        order.index("IBuilderConfig.add_optimization_profile"),
    )
    assert parsed < added < order.index("Builder.build_serialized_network")
    watched = order.index("IBuilderConfig.progress_monitor=")
    assert watched < order.index("Builder.build_serialized_network")


def test_profiles_are_one_image_and_the_users_batch(graph: Path) -> None:
    _, log = install(network_answers())
    build(graph)
    image, classes = (32, 32, 3), ((2, 24), (5, 24), (4096, 24))
    assert calls(log, "IOptimizationProfile.set_shape") == [
        ("image", (1, *image), (1, *image), (1, *image)),
        ("classifier", *classes),
        ("image", (2, *image), (4, *image), (16, *image)),
        ("classifier", *classes),
    ]
    assert names(log).count("IBuilderConfig.add_optimization_profile") == 2


def test_the_parser_reads_the_class_matrix_as_an_input(graph: Path) -> None:
    _, log = install(network_answers())
    build(graph)
    ((source, path),) = calls(log, "OnnxParser.parse")
    assert path == str(graph)
    assert isinstance(source, bytes)
    model = onnx.load_from_string(source)
    assert [each.name for each in model.graph.input] == ["classifier"]
    assert [each.name for each in model.graph.initializer] == ["weight"]


def test_what_the_user_decides_reaches_tensorrt(graph: Path) -> None:
    _, log = install(network_answers())
    options = BuildOptions(
        batch=OPTIONS.batch,
        workspace_gib=2,
        opt_level=5,
        version_compatible=True,
        hardware="ampere+",
    )
    build(graph, options)
    limit = (trt.MemoryPoolType.WORKSPACE, 2 << 30)
    assert calls(log, "IBuilderConfig.set_memory_pool_limit") == [limit]
    assert calls(log, "IBuilderConfig.builder_optimization_level=") == [(5,)]
    level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert calls(log, "IBuilderConfig.hardware_compatibility_level=") == [(level,)]
    # Without the second a plan would hold code for the host.
    flags = [trt.BuilderFlag.VERSION_COMPATIBLE, trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME]
    assert [flag for (flag,) in calls(log, "IBuilderConfig.set_flag")] == flags


@pytest.mark.parametrize("hardware", ["none", "ampere+", "same-cc"])
def test_every_level_of_hardware_compatibility_exists(graph: Path, hardware: Any) -> None:
    _, log = install(network_answers())
    build(graph, BuildOptions(hardware=hardware))
    assert len(calls(log, "IBuilderConfig.hardware_compatibility_level=")) == 1


def test_a_timing_cache_is_read_and_written(graph: Path) -> None:
    cache = graph.with_name("cache")
    cache.write_bytes(b"earlier")
    _, log = install(network_answers(**{"ITimingCache.serialize": HostMemory(b"later")}))
    build(graph)
    assert calls(log, "IBuilderConfig.create_timing_cache") == [(b"earlier",)]
    ((_, ignore_mismatch),) = calls(log, "IBuilderConfig.set_timing_cache")
    assert ignore_mismatch is False
    assert cache.read_bytes() == b"later"


def test_a_foreign_timing_cache_is_left_aside(graph: Path) -> None:
    graph.with_name("cache").write_bytes(b"of another GPU")
    taken = iter([False, True])
    _, log = install(network_answers(**{"IBuilderConfig.set_timing_cache": lambda *_: next(taken)}))
    assert build(graph).plan == PLAN
    found = calls(log, "IBuilderConfig.create_timing_cache")
    assert found == [(b"of another GPU",), (b"",)]


@pytest.mark.parametrize(
    ("answers", "error", "told"),
    [
        ({"OnnxParser.parse": False, "OnnxParser.num_errors": 1, "ParserError.desc": "no Foo",
          "ParserError.node_name": "n7", "ParserError.node_operator": "Foo"},
         CheckpointError, r"n7 \(Foo\): no Foo"),
        ({"OnnxParser.parse": False}, CheckpointError, "gives no reason"),
        ({"Builder.build_serialized_network": None}, EnvironmentProblem, "built no engine"),
        ({"IBuilderConfig.add_optimization_profile": -1}, EnvironmentProblem, "refuses it"),
        ({"IBuilderConfig.set_timing_cache": False}, EnvironmentProblem, "no timing cache"),
        ({"IBuilderConfig.create_timing_cache": None}, EnvironmentProblem, "no timing cache"),
    ],
)  # fmt: skip
def test_failures_of_a_build_are_ours(
    graph: Path, answers: dict[str, Any], error: type[Exception], told: str
) -> None:
    install(network_answers(**answers))
    with pytest.raises(error, match=told):
        build(graph)
    assert not graph.with_name("cache").exists()


def test_a_failure_tells_what_tensorrt_said_last(graph: Path) -> None:
    def fail(*_: Any) -> None:
        tensorrt_library.LOG.log(trt.ILogger.Severity.ERROR, "out of\nworkspace")

    install(network_answers(**{"Builder.build_serialized_network": fail}))
    with pytest.raises(EnvironmentProblem, match="out of workspace"):
        build(graph)
    assert tensorrt_library.LOG.taken() == ["ERROR: out of\nworkspace"]
    assert tensorrt_library.LOG.taken() == []


def test_what_is_verbose_is_not_kept() -> None:
    tensorrt_library.LOG.log(trt.ILogger.Severity.VERBOSE, "chatter")
    tensorrt_library.LOG.log(trt.ILogger.Severity.INFO, "news")
    assert tensorrt_library.LOG.taken() == ["INFO: news"]


# ---- progress and cancel


def building(work: Callable[[Any], Any]) -> dict[str, Any]:
    """Return answers of a build that drives its monitor, as TensorRT does from another thread."""
    watched: dict[str, Any] = {}

    def run(_network: Any, config: Any) -> Any:
        watched["monitor"] = config.progress_monitor
        return work(config.progress_monitor)

    return network_answers(**{"Builder.build_serialized_network": run})


def test_progress_is_that_of_the_outermost_phase(graph: Path) -> None:
    def work(monitor: Any) -> HostMemory:
        assert isinstance(monitor, trt.IProgressMonitor)
        assert monitor.phase_start("Building", None, 4) is None
        monitor.phase_start("Tactics", "Building", 100)
        assert monitor.step_complete("Tactics", 50) is True
        assert monitor.step_complete("Building", 0) is True
        monitor.phase_finish("Tactics")
        assert monitor.step_complete("Building", 3) is True
        monitor.phase_finish("Building")
        return HostMemory(PLAN)

    install(building(work))
    told: list[tuple[int, int, str]] = []
    build(graph, progress=lambda *step: told.append(step))
    assert told == [(1, 4, "Building"), (4, 4, "Building")]


def test_an_error_of_the_display_stops_the_build_and_is_raised(graph: Path) -> None:
    def work(monitor: Any) -> None:
        monitor.phase_start("Building", "", 4)
        with suppress(ValueError):  # TensorRT swallows what a monitor raises
            assert monitor.step_complete("Building", 0) is False
            assert monitor.step_complete("Building", 1) is False

    def broken(*_: Any) -> None:
        raise ValueError("the terminal is gone")

    install(building(work))
    with pytest.raises(ValueError, match="the terminal is gone"):
        build(graph, progress=broken)


def test_a_signal_cancels_the_build(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, ended = threading.Event(), []

    def work(monitor: Any) -> HostMemory | None:
        started.set()
        for _ in range(100):
            if not monitor.step_complete("Building", 0):
                ended.append("cancelled")
                return None
            time.sleep(0.01)
        return HostMemory(PLAN)

    def interrupted(*_: Any, **__: Any) -> Any:
        started.wait(5)
        raise KeyboardInterrupt

    install(building(work))
    monkeypatch.setattr(to_tensorrt, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(graph)
    assert ended == ["cancelled"]
    assert not graph.with_name("cache").exists()


# ---- running


class Array(np.ndarray[Any, Any]):
    """What stands in for a CuPy array."""

    data = SimpleNamespace(ptr=4096)  # type: ignore[assignment]


def array(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    return np.zeros(shape, dtype).view(Array)


class Stream:
    """A stream that says what happens on it."""

    device_id = 0
    ptr = 7

    def __init__(self, log: list[Call]) -> None:
        self._log = log

    def synchronize(self) -> None:
        self._log.append(Call("synchronize"))

    def begin_capture(self, mode: int) -> None:
        self._log.append(Call("begin_capture", (mode,)))

    def end_capture(self) -> Any:
        self._log.append(Call("end_capture"))
        return SimpleNamespace(launch=lambda stream: self._log.append(Call("launch")))


SHAPES = {"image": (4, 32, 32, 3), "cls": (4, 24), "patches": (4, 16, 64)}
TYPES = {"image": trt.DataType.UINT8, "cls": trt.DataType.FLOAT, "patches": trt.DataType.FLOAT}


def engine_answers(**changed: Any) -> dict[str, Any]:
    inputs, outputs = trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT
    return {
        "ICudaEngine.num_io_tensors": 3,
        "ICudaEngine.get_tensor_name": lambda index: list(SHAPES)[index],
        "ICudaEngine.get_tensor_mode": lambda name: inputs if name == "image" else outputs,
        "ICudaEngine.get_tensor_dtype": lambda name: TYPES[name],
        "ICudaEngine.device_memory_size_v2": 1 << 20,
        "IExecutionContext.get_tensor_shape": lambda name: trt.Dims(SHAPES[name]),
        "IExecutionContext.infer_shapes": [],
        "EngineInspector.get_engine_information": '{"Layers": []}',
        **changed,
    }


def buffers(**changed: Any) -> dict[str, Array]:
    made = {name: array(shape) for name, shape in SHAPES.items()}
    return {**made, "image": array(SHAPES["image"], np.uint8), **changed}


@pytest.fixture(autouse=True)
def _without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for what the engine asks of CuPy."""

    @contextmanager
    def no_errors(_device: str) -> Iterator[None]:
        yield

    memory = lambda size: SimpleNamespace(ptr=1 << 20, size=size)  # noqa: E731
    cuda = SimpleNamespace(Device=lambda _number: nullcontext(), Memory=memory)
    monkeypatch.setattr(tensorrt_engine, "cupy", SimpleNamespace(cuda=cuda, ndarray=Array))
    monkeypatch.setattr(tensorrt_engine, "cuda_errors", no_errors)


def engine(log: list[Call]) -> tensorrt_engine.Engine:
    return tensorrt_engine.Engine(PLAN, Stream(log), "backbone.plan")


def test_a_plan_runs_on_the_callers_buffers() -> None:
    _, log = install(engine_answers())
    enqueue = engine(log).bind(1, buffers())
    assert calls(log, "Runtime.deserialize_cuda_engine") == [(PLAN,)]
    managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert calls(log, "ICudaEngine.create_execution_context") == [(managed,)]
    assert calls(log, "IExecutionContext.set_device_memory") == [(1 << 20, 1 << 20)]
    assert calls(log, "IExecutionContext.set_optimization_profile_async") == [(1, 7)]
    assert calls(log, "IExecutionContext.set_input_shape") == [("image", SHAPES["image"])]
    addresses = calls(log, "IExecutionContext.set_tensor_address")
    assert sorted(addresses) == [(name, 4096) for name in sorted(SHAPES)]
    assert "IExecutionContext.execute_async_v3" not in names(log)
    enqueue()
    assert log[-1] == Call("IExecutionContext.execute_async_v3", (7,))
    order = names(log)
    steps = [
        "set_device_memory",
        "set_optimization_profile_async",
        "set_input_shape",
        "infer_shapes",
    ]
    places = [order.index(f"IExecutionContext.{step}") for step in steps]
    assert places == sorted(places)


def test_an_engine_without_activations_still_has_an_address() -> None:
    _, log = install(engine_answers(**{"ICudaEngine.device_memory_size_v2": 0}))
    engine(log).bind(0, buffers())
    assert calls(log, "IExecutionContext.set_device_memory") == [(1 << 20, 256)]


@pytest.mark.parametrize(
    ("answers", "error", "told"),
    [
        ({"Runtime.deserialize_cuda_engine": None}, CheckpointError, "can load, found"),
        ({"ICudaEngine.create_execution_context": None}, EnvironmentProblem, "no execution"),
        ({"IExecutionContext.set_optimization_profile_async": False}, CheckpointError, "profile 1"),
        ({"IExecutionContext.set_input_shape": False}, CheckpointError, r"image \(4, 32, 32, 3\)"),
        ({"IExecutionContext.infer_shapes": ["cls"]}, CheckpointError, "shapes of cls"),
        ({"IExecutionContext.set_tensor_address": False}, CheckpointError, "memory of image"),
        ({"IExecutionContext.execute_async_v3": False}, EnvironmentProblem, "the run failed"),
    ],
)  # fmt: skip
def test_failures_of_a_run_are_ours(
    answers: dict[str, Any], error: type[Exception], told: str
) -> None:
    _, log = install(engine_answers(**answers))
    with pytest.raises(error, match=told):
        engine(log).bind(1, buffers())()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"cls": array((4, 24), np.float16)}, "cls float16"),
        ({"cls": array((3, 24))}, r"cls float32 \(3, 24\) in place of float32 \(4, 24\)"),
        ({"fg": array((4, 24))}, "tensors"),
    ],
)
def test_buffers_that_do_not_fit_never_reach_tensorrt(changed: dict[str, Any], told: str) -> None:
    _, log = install(engine_answers())
    with pytest.raises(CheckpointError, match=told):
        engine(log).bind(1, buffers(**changed))
    assert ("cls", 4096) not in calls(log, "IExecutionContext.set_tensor_address")


def test_layers_are_the_inspectors_json() -> None:
    _, log = install(engine_answers())
    assert engine(log).layers() == {"Layers": []}
    wanted = trt.LayerInformationFormat.JSON
    assert calls(log, "EngineInspector.get_engine_information") == [(wanted,)]
    install(engine_answers(**{"EngineInspector.get_engine_information": "nothing"}))
    with pytest.raises(CheckpointError, match="layers as JSON"):
        engine(log).layers()


MANIFEST = EngineManifest(
    target=Target(tensorrt="11", gpu="X", compute_capability="9.0", system="Linux x86_64"),
    precision="fp32",
    options=OPTIONS,
    classes=CLASSES,
    plans={
        BACKBONE_PLAN: PlanSpec(
            graph="backbone.onnx",
            graph_sha256="0",
            tensors=GraphSpec(
                inputs=(TensorSpec(name="image", dtype="uint8", shape=("batch", 32, 32, 3)),),
                outputs=(TensorSpec(name="patches", dtype="float32", shape=("batch", 16, 64)),),
            ),
        )
    },
)


def test_the_encoder_is_captured_with_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(streamCaptureModeThreadLocal=1)
    fake_cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(cuda_pipeline, "cupy", fake_cupy)
    _, log = install(engine_answers())
    stream: Any = Stream(log)
    encoder = tensorrt_encoder.TensorRTEncoder(
        tensorrt_engine.Engine(PLAN, stream, BACKBONE_PLAN), MANIFEST, stream
    )
    assert encoder.tokens == 16
    made = buffers()
    tokens = {name: made[name] for name in ("cls", "patches")}
    launches = encoder.capture(made["image"], tokens, lambda: log.append(Call("rest")))
    # Once before the capture: TensorRT settles shapes in the first run, which may wait.
    assert names(log)[-7:] == [
        "IExecutionContext.execute_async_v3", "rest", "synchronize", "begin_capture",
        "IExecutionContext.execute_async_v3", "rest", "end_capture",
    ]  # fmt: skip
    assert calls(log, "IExecutionContext.set_optimization_profile_async") == [(1, 7)]
    launches.replay()
    assert names(log)[-1] == "launch"
    launches.eager()
    assert names(log)[-2:] == ["IExecutionContext.execute_async_v3", "rest"]
    encoder.capture(made["image"], tokens, lambda: None)
    assert names(log).count("ICudaEngine.create_execution_context") == 2  # one a captured bucket
    encoder.close()
    with pytest.raises(AssertionError, match="closed"):
        encoder.capture(made["image"], tokens, lambda: None)


def test_the_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"name": b"NVIDIA H200", "major": 9, "minor": 0}
    runtime = SimpleNamespace(getDeviceProperties=lambda _number: facts)
    device = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(tensorrt_engine, "cupy", device)
    found = tensorrt_engine.target(0)
    assert (found.tensorrt, found.gpu, found.compute_capability) == (
        trt.__version__, "NVIDIA H200", "9.0"
    )  # fmt: skip
