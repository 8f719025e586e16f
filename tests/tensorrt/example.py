"""A build and a run as the product would write them: what the harness has to let pass."""

from collections.abc import Callable
from typing import Any

import tensorrt as trt


class Log(trt.ILogger):  # type: ignore[misc]  # the bindings have no types
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        self.lines.append(f"{severity.name}: {msg}")


class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the bindings have no types
    def __init__(self, told: Callable[[str, int], None]) -> None:
        trt.IProgressMonitor.__init__(self)
        self._told = told

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._told(phase_name, num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        self._told(phase_name, step)
        return True

    def phase_finish(self, phase_name: str) -> None:
        self._told(phase_name, -1)


LOG = Log()


def build(graph: bytes, monitor: Monitor) -> bytes | None:
    builder = trt.Builder(LOG)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOG)
    if not parser.parse(graph):
        raise ValueError([parser.get_error(index).desc() for index in range(parser.num_errors)])
    _make_decomposable(network)
    config = builder.create_builder_config()
    _configure(config, monitor)
    profile = builder.create_optimization_profile()
    image = network.get_input(0)
    for sizes in ((1, 1, 1), (1, 8, 64)):
        shapes = [(size, *tuple(image.shape)[1:]) for size in sizes]
        profile.set_shape(image.name, *shapes)
    assert config.add_optimization_profile(profile) >= 0
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan)


def _configure(config: Any, monitor: Monitor) -> None:
    config.clear_flag(trt.BuilderFlag.TF32)
    config.builder_optimization_level = 3
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    config.progress_monitor = monitor
    cache = config.create_timing_cache(b"")
    assert config.set_timing_cache(cache, ignore_mismatch=False)


def _make_decomposable(network: Any) -> None:
    if hasattr(trt, "IAttentionInputLayer"):
        for layer in network:
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True


class Engine:
    def __init__(self, plan: bytes) -> None:
        self._runtime = trt.Runtime(LOG)
        self._engine = self._runtime.deserialize_cuda_engine(plan)

    @property
    def tensors(self) -> list[str]:
        return list(map(self._engine.get_tensor_name, range(self._engine.num_io_tensors)))

    def run(self, stream: int, shape: tuple[int, ...], addresses: dict[str, int]) -> None:
        context = self._engine.create_execution_context()
        for name, address in addresses.items():
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                context.set_input_shape(name, shape)
            assert context.set_tensor_address(name, address)
        assert not context.infer_shapes()
        assert context.execute_async_v3(stream)
