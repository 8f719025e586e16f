"""A TensorRT plan on a device, run on buffers of the caller's.

TensorRT tells of failures by None, False and its logger; here each becomes an error of ours. Only
calls that TensorRT 10 and 11 share are used.
"""

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import cupy

from microclip_deploy.errors import CheckpointError, EnvironmentProblem
from microclip_deploy.serving.cuda_pipeline import cuda_errors
from microclip_deploy.serving.engines import Target
from microclip_deploy.serving.flavour import RTX
from microclip_deploy.serving.tensorrt_library import FLAVOUR, LOG, NAME, trt


class Engine:
    """A deserialised plan; for one thread and one stream at a time.

    The contexts share the memory of activations, because they never run at the same time.
    """

    def __init__(
        self, plan: bytes, stream: cupy.cuda.Stream, name: str, kernels: bytes = b""
    ) -> None:
        """Load a plan whose origin was checked: loading runs what it holds.

        Args:
            plan: bytes that this TensorRT built for this GPU.
            stream: on a device that works; without one TensorRT's runtime would crash.
            name: of the plan, for messages.
            kernels: what `kernels` returned earlier on this GPU, of checked origin.

        Raises:
            CheckpointError: TensorRT refuses the plan.
            EnvironmentProblem: too little memory.
        """
        self.name = name
        self._stream = stream
        with self._on_device():
            self._runtime = trt.Runtime(LOG)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise CheckpointError(
                    f"{name}: expected a plan that {NAME} can load, found: "
                    f"{LOG.last_error()}; rebuild it with export --trt"
                )
            # Not of a pool, so that it goes with the engine; none at all would have no address.
            size = max(self._engine.device_memory_size_v2, 256)
            self._activations = cupy.cuda.Memory(size)
            self._runtime_config = self._configured(kernels) if FLAVOUR == RTX else None
        names = map(self._engine.get_tensor_name, range(self._engine.num_io_tensors))
        self.tensors: tuple[str, ...] = tuple(names)

    def bind(self, profile: int, buffers: Mapping[str, cupy.ndarray]) -> Callable[[], None]:
        """Return what enqueues the plan on static buffers; it does not wait.

        Args:
            profile: number of the optimisation profile that takes their sizes.
            buffers: C-contiguous arrays by tensor name; of inputs the shape decides.

        Raises:
            CheckpointError: the plan has other tensors, or refuses the sizes.
            EnvironmentProblem: too little memory; by a run: the device failed.
        """
        self._require(set(buffers) == set(self.tensors), f"tensors {sorted(buffers)}")
        stream = self._stream
        with self._on_device():
            context = self._context(profile)
            self._set_shapes(context, buffers)
            for name, buffer in buffers.items():
                self._require_fit(context, name, buffer)
                address = buffer.data.ptr
                self._require(context.set_tensor_address(name, address), f"memory of {name}")
        # TensorRT keeps no references: `enqueue` keeps engine and buffers alive.
        held = (self, context, dict(buffers))

        def enqueue() -> None:
            _engine, bound, _buffers = held
            if not bound.execute_async_v3(stream.ptr):
                raise EnvironmentProblem(
                    f"{self.name}: the run failed: {LOG.last_error()}; run `microclip-deploy "
                    "doctor`, or use another device"
                )

        return enqueue

    def _context(self, profile: int) -> Any:
        """Return an execution context of a profile, on the shared memory."""
        how = self._runtime_config or trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(how)
        if context is None:
            raise EnvironmentProblem(
                f"{self.name}: no execution context: {LOG.last_error()}; lower the batch size, or "
                "free memory of the device"
            )
        context.set_device_memory(self._activations.ptr, self._activations.size)
        chosen = context.set_optimization_profile_async(profile, self._stream.ptr)
        self._require(chosen, f"profile {profile}")
        return context

    def _configured(self, kernels: bytes) -> Any:
        """Return how TensorRT for RTX runs a plan, whose kernels it compiles for this GPU."""
        config = self._engine.create_runtime_config()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config.set_execution_context_allocation_strategy(strategy)
        # Compiled before the first run returns, never behind a capture's back; LAZY does that.
        specialization = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # the caller captures
        cache = config.create_runtime_cache()
        if kernels:
            cache.deserialize(kernels)  # refused where another driver compiled them: compiled anew
        self._require(config.set_runtime_cache(cache), "a cache of kernels")
        return config

    def kernels(self) -> bytes:
        """Return the kernels that were compiled for this GPU; TensorRT's are in the plan itself."""
        if self._runtime_config is None:
            return b""
        with self._on_device():
            return bytes(self._runtime_config.get_runtime_cache().serialize())

    def _set_shapes(self, context: Any, buffers: Mapping[str, cupy.ndarray]) -> None:
        for name in self.tensors:
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                shape = tuple(buffers[name].shape)
                self._require(context.set_input_shape(name, shape), f"{name} {shape}")
        unknown = context.infer_shapes()
        self._require(not unknown, f"shapes of {', '.join(unknown)}")

    def layers(self) -> Any:
        """Return what TensorRT's inspector tells of every layer, as JSON.

        Raises:
            CheckpointError: it tells nothing.
        """
        inspector = self._engine.create_engine_inspector()
        told = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        try:
            return json.loads(told)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.name}: expected layers as JSON from TensorRT's inspector, found: {error}; "
                "rebuild it with export --trt"
            ) from error

    def _require_fit(self, context: Any, name: str, buffer: cupy.ndarray) -> None:
        dtype = trt.nptype(self._engine.get_tensor_dtype(name))
        shape = tuple(context.get_tensor_shape(name))
        self._require(
            buffer.dtype == dtype and tuple(buffer.shape) == shape,
            f"{name} {buffer.dtype} {tuple(buffer.shape)} in place of {dtype.__name__} {shape}",
        )

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """TensorRT works on the current device of the thread."""
        device = self._stream.device_id
        with cuda_errors(f"cuda:{device}"), cupy.cuda.Device(device):
            yield

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise CheckpointError(
                f"{self.name}: expected an engine that takes {what}, found that it refuses: "
                f"{LOG.last_error()}; rebuild it with export --trt"
            )


def target(device_id: int) -> Target:
    """Return what plans built on a device are tied to.

    Raises:
        EnvironmentProblem: there is no such device.
    """
    with cuda_errors(f"cuda:{device_id}"):
        facts = cupy.cuda.runtime.getDeviceProperties(device_id)
    return Target(
        flavour=FLAVOUR,
        tensorrt=trt.__version__,
        gpu=facts["name"].decode(),
        compute_capability=f"{facts['major']}.{facts['minor']}",
        system=f"{platform.system()} {platform.machine()}",
    )
