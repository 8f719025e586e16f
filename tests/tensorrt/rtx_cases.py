"""What TensorRT for RTX wants otherwise when a plan runs, on fakes over its own bindings.

No plan of it was ever loaded: this shows that the calls exist, are well formed and in order.
"""

import pytest

from microclip_deploy.errors import CheckpointError
from microclip_deploy.serving import tensorrt_engine
from microclip_deploy.serving.tensorrt_library import trt
from tests.tensorrt import engine_cases
from tests.tensorrt.engine_cases import PLAN, Stream, buffers, calls, engine_answers, names
from tests.tensorrt.fake import HostMemory, install

_without_a_device = engine_cases._without_a_device

COMPILED = {"IRuntimeCache.serialize": HostMemory(b"compiled")}


def test_kernels_are_compiled_before_a_capture_and_the_caller_captures() -> None:
    _, log = install(engine_answers(**COMPILED))
    engine = tensorrt_engine.Engine(PLAN, Stream(log), "backbone.plan")
    for _ in range(2):
        engine.bind(1, buffers())()
    managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    allocated = "IRuntimeConfig.set_execution_context_allocation_strategy"
    assert calls(log, allocated) == [(managed,)]
    eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    specialised = "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy="
    assert calls(log, specialised) == [(eager,)]
    disabled = trt.CudaGraphStrategy.DISABLED
    assert calls(log, "IRuntimeConfig.cuda_graph_strategy=") == [(disabled,)]
    made = calls(log, "ICudaEngine.create_execution_context")
    assert [type(how) for how, *_ in made] == [type(made[0][0])] * 2
    assert isinstance(made[0][0], trt.IRuntimeConfig)
    order = names(log)
    cached = order.index("IRuntimeConfig.set_runtime_cache")
    assert cached < order.index("ICudaEngine.create_execution_context")
    assert order.count("IRuntimeConfig.create_runtime_cache") == 1  # one for every batch size
    assert "IRuntimeCache.deserialize" not in order
    assert engine.kernels() == b"compiled"


@pytest.mark.parametrize("fits", [True, False])
def test_kernels_of_an_earlier_proof_are_used_where_they_fit(fits: bool) -> None:
    _, log = install(engine_answers(**COMPILED, **{"IRuntimeCache.deserialize": fits}))
    engine = tensorrt_engine.Engine(PLAN, Stream(log), "backbone.plan", b"earlier")
    assert calls(log, "IRuntimeCache.deserialize") == [(b"earlier",)]
    engine.bind(1, buffers())()


def test_a_cache_that_is_refused_is_told() -> None:
    install(engine_answers(**{"IRuntimeConfig.set_runtime_cache": False}))
    with pytest.raises(CheckpointError, match="takes a cache of kernels"):
        tensorrt_engine.Engine(PLAN, Stream([]), "backbone.plan")
