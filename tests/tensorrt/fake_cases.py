"""Fakes take what TensorRT takes, and nothing else; test_harness.py runs this for every version."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt as trt

from tests.tensorrt.fake import install

REAL_BUILDER = trt.Builder
LOG = trt.Logger()


def test_answers_for_what_does_not_exist_are_refused() -> None:
    with pytest.raises(AttributeError, match=r"ICudaEngine\.num_bindings does not exist"):
        install({"ICudaEngine.num_bindings": 2})


def test_results_have_their_declared_type() -> None:
    install()
    builder = trt.Builder(LOG)
    network, config = builder.create_network(), builder.create_builder_config()
    plan = builder.build_serialized_network(network, config)
    engine = trt.Runtime(LOG).deserialize_cuda_engine(plan)
    assert isinstance(builder, trt.Builder)
    assert isinstance(network, trt.INetworkDefinition)
    assert isinstance(engine.get_tensor_dtype("x"), trt.DataType)
    assert isinstance(engine.get_tensor_shape("x"), trt.Dims)
    assert engine.name == ""
    assert memoryview(plan).nbytes == plan.nbytes
    assert not network, "an empty network is false, as every object with a length"


def test_properties_keep_what_they_are_set_to() -> None:
    install()
    config = trt.Builder(LOG).create_builder_config()
    config.builder_optimization_level = 5
    assert config.builder_optimization_level == 5


class Objects:
    """One of each of what mistakes are made with."""

    def __init__(self) -> None:
        self.builder = trt.Builder(LOG)
        self.network = self.builder.create_network()
        self.config = self.builder.create_builder_config()
        self.parser = trt.OnnxParser(self.network, LOG)
        self.profile = self.builder.create_optimization_profile()
        self.engine = trt.Runtime(LOG).deserialize_cuda_engine(b"plan")
        self.context = self.engine.create_execution_context()
        self.plan = self.builder.build_serialized_network(self.network, self.config)


WRONG_ATTRIBUTES: dict[str, Callable[[Objects], Any]] = {
    "unknown attribute": lambda o: o.engine.num_bindings,
    "unknown method": lambda o: o.context.execute_async_v2(1),
    "unknown enum member": lambda o: trt.BuilderFlag.FP61,
    "unknown class": lambda o: trt.Bulider,
    "attribute of the class": lambda o: trt.Builder.create_net,
    "attribute of a plan": lambda o: o.plan.size,
    "writing a method": lambda o: setattr(o.config, "set_flag", 1),
    "writing an unknown attribute": lambda o: setattr(o.config, "max_workspace_size", 1),
    "writing a read-only property": lambda o: setattr(o.network, "num_layers", 1),
}
WRONG_ARGUMENTS: dict[str, Callable[[Objects], Any]] = {
    "too many": lambda o: o.builder.create_network(0, 1),
    "too few": lambda o: o.config.set_timing_cache(o.config.create_timing_cache(b"")),
    "unknown keyword": lambda o: o.builder.create_network(flag=0),
    "keyword of a positional argument": lambda o: o.builder.create_network(0, flags=0),
    "float for int": lambda o: o.config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1e9),
    "float for an int property": lambda o: setattr(o.config, "max_aux_streams", 1.0),
    "number for an enum": lambda o: o.config.set_flag(int(trt.BuilderFlag.TF32)),
    "number for bool": lambda o: o.config.set_timing_cache(o.config.get_timing_cache(), 0),
    "path for str": lambda o: o.parser.parse_from_file(Path("x.onnx")),
    "str for a buffer": lambda o: o.parser.parse("x.onnx"),
    "floats in a shape": lambda o: o.profile.set_shape("x", (1.0, 3), (1, 3), (1, 3)),
    "number for a shape": lambda o: o.profile.set_shape("x", 1, 8, 64),
    "object of another class": lambda o: o.builder.build_serialized_network(o.config, o.network),
    "unchecked None": lambda o: o.builder.build_serialized_network(None, o.config),
    "no logger": lambda o: trt.Runtime(),
    "another logger": lambda o: trt.Runtime(print),
    "length of a plan": lambda o: len(o.plan),
    "length of an engine": lambda o: len(o.engine),
    "slice of a plan": lambda o: o.plan[:4],
}


@pytest.mark.parametrize("mistake", WRONG_ATTRIBUTES.values(), ids=WRONG_ATTRIBUTES)
def test_wrong_attributes_are_refused(mistake: Callable[[Objects], Any]) -> None:
    install()
    objects = Objects()
    with pytest.raises(AttributeError):
        mistake(objects)


@pytest.mark.parametrize("mistake", WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments_are_refused_and_not_logged(mistake: Callable[[Objects], Any]) -> None:
    _, log = install()
    objects = Objects()
    before = len(log)
    with pytest.raises(TypeError):
        mistake(objects)
    assert not [call for call in log[before:] if "create_timing" not in call.name][1:]


def test_what_converts_is_taken() -> None:
    install()
    objects = Objects()
    shape = np.array([4, 3, 224, 224])
    for same in (tuple(shape), shape.tolist(), trt.Dims(shape.tolist()), shape):
        assert objects.context.set_input_shape("x", same)
    assert objects.context.set_tensor_address("x", np.int64(4096))
    assert objects.parser.parse(memoryview(b"onnx"), path=None)
    objects.network.add_concatenation([objects.network.get_input(0)] * 2)


def test_without_fakes_there_is_no_builder() -> None:
    with pytest.raises(TypeError, match="nullptr"):
        REAL_BUILDER(LOG)
