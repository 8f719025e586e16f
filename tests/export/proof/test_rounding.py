"""The float32 graph that stands for a bfloat16 one rounds where that one would."""

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from microclip_deploy.export.proof.probes import made_up_photos
from microclip_deploy.export.proof.rounding import in_float32
from microclip_deploy.serving.exported import BACKBONE

if TYPE_CHECKING:
    from tests.export.conftest import Read, Subject

FLOAT, BFLOAT16 = TensorProto.FLOAT, TensorProto.BFLOAT16

ULP = 2.0**-8
"""Of a bfloat16, as a share: seven bits are stored."""


def bfloat16(name: str, values: NDArray[np.float32]) -> TensorProto:
    """Return a weight; the values must be bfloat16 already."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return helper.make_tensor(
        name, BFLOAT16, values.shape, (bits >> 16).astype(np.uint16).tobytes(), raw=True
    )


def graph_of(
    nodes: list[onnx.NodeProto], weights: list[TensorProto], inputs: list[int | str]
) -> onnx.ModelProto:
    """Return x float32 -> y float32 in opset 22."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", FLOAT, inputs)], [value("y", FLOAT, None)], weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def run(model: onnx.ModelProto, wanted: list[str], **feeds: NDArray[Any]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(wanted, feeds))


def evaluated(model: onnx.ModelProto, **feeds: NDArray[Any]) -> list[NDArray[Any]]:
    """Return all outputs as ONNX's own evaluator computes them."""
    found: Any = ReferenceEvaluator(model).run(None, feeds)
    return list(found)


def is_bfloat16(values: NDArray[np.float32]) -> bool:
    return not (values.view(np.uint32) & 0xFFFF).any()


@pytest.fixture
def product() -> onnx.ModelProto:
    """Return y = bfloat16(bfloat16(x) * 1.0078125)."""
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=BFLOAT16),
        helper.make_node("Mul", ["narrow", "w"], ["z"]),
        helper.make_node("Cast", ["z"], ["y"], to=FLOAT),
    ]
    return graph_of(nodes, [bfloat16("w", np.array([1.0078125], np.float32))], ["n"])


def test_operators_and_conversions_round_to_nearest_even(product: onnx.ModelProto) -> None:
    x = np.array([1 / 3, 1.0078125, 1.00390625, 1.01171875], np.float32)
    # 1/3 -> 171/512. 129/128 squared is 1.01568..., between 130/128 and 131/128. 1 + 1/256 is half
    # way between 1 and 129/128: even is 1. 1 + 3/256 is half way between 129/128 and 130/128.
    narrow = np.array([171 / 512, 129 / 128, 1, 130 / 128], np.float32)
    exact = narrow * 1.0078125
    expected = np.array([172 / 512, 130 / 128, 129 / 128, 131 / 128], np.float32)
    assert np.abs(exact - expected).max() < expected.max() * ULP / 2
    (found,) = run(in_float32(product), ["y"], x=x)
    np.testing.assert_array_equal(found, expected)


def test_the_model_itself_is_not_changed(product: onnx.ModelProto) -> None:
    before = product.SerializeToString()
    in_float32(product)
    assert product.SerializeToString() == before


def test_the_runtime_needs_no_bfloat16_operator(product: onnx.ModelProto) -> None:
    found = onnx.shape_inference.infer_shapes(in_float32(product), strict_mode=True).graph
    narrow = {
        value.name for value in found.value_info if value.type.tensor_type.elem_type == BFLOAT16
    }
    users = {node.op_type for node in found.node if narrow & {*node.input, *node.output}}
    assert len(narrow) == 2
    assert users == {"Cast"}
    assert {tensor.data_type for tensor in found.initializer} == {FLOAT}


def test_what_was_float32_is_not_rounded() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "third"], ["wide"]),
        helper.make_node("Cast", ["wide"], ["narrow"], to=BFLOAT16),
        helper.make_node("Cast", ["narrow"], ["again"], to=FLOAT),
        helper.make_node("Sub", ["wide", "again"], ["y"]),
    ]
    third = numpy_helper.from_array(np.array([1 / 3], np.float32), "third")
    x = np.array([1.0], np.float32)
    (found,) = run(in_float32(graph_of(nodes, [third], ["n"])), ["y"], x=x)
    np.testing.assert_array_equal(found, np.float32(1 / 3) - np.float32(171 / 512))


def test_an_operator_with_several_results_rounds_all_of_them() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=BFLOAT16),
        helper.make_node("Mul", ["narrow", "narrow"], ["square"]),
        helper.make_node("Split", ["square"], ["a", "b"], axis=0, num_outputs=2),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=FLOAT),
    ]
    model = graph_of(nodes, [], [4])
    x = np.array([1.1, 2.3, 3.7, 0.3], np.float32)
    (found,) = run(in_float32(model), ["y"], x=x)
    expected = evaluated(model, x=x)[0]
    np.testing.assert_array_equal(found, expected)


def test_a_small_network_equals_the_reference_evaluator() -> None:
    rng = np.random.default_rng(0)
    weights = (rng.integers(-128, 128, (8, 8)) / 128).astype(np.float32)
    node = helper.make_node
    nodes = [
        node("Cast", ["x"], ["narrow"], to=BFLOAT16),
        node("MatMul", ["narrow", "w"], ["mixed"]),
        node("Add", ["mixed", "b"], ["shifted"]),
        node("Softmax", ["shifted"], ["shares"], axis=-1),
        node("MatMul", ["shares", "w"], ["out"]),
        node("Cast", ["out"], ["y"], to=FLOAT),
    ]
    model = graph_of(nodes, [bfloat16("w", weights), bfloat16("b", weights[0])], ["n", 8])
    x = rng.normal(size=(16, 8)).astype(np.float32)
    (found,) = run(in_float32(model), ["y"], x=x)
    expected = evaluated(model, x=x)[0]
    assert is_bfloat16(found)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 * ULP)


@pytest.fixture(scope="module")
def emulated(read: "Read", tiny: "Subject") -> dict[str, NDArray[Any]]:
    """Return all values of the tiny encoder that were bfloat16, and its outputs."""
    model = read("bf16", BACKBONE).model
    found = in_float32(model)
    narrow = [name for name, kind in read("bf16", BACKBONE).types.items() if kind == BFLOAT16]
    weights = {tensor.name for tensor in model.graph.initializer}
    shown = [name for name in narrow if name not in weights]
    found.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in shown)
    wanted = [*shown, "cls", "patches"]
    images = made_up_photos(32, 2).views(tiny.preprocess)
    return dict(zip(wanted, run(found, wanted, image=images), strict=True))


def test_every_value_of_the_encoder_is_rounded(emulated: dict[str, NDArray[Any]]) -> None:
    narrow = {name: value for name, value in emulated.items() if name not in ("cls", "patches")}
    assert len(narrow) > 50
    assert [name for name, value in narrow.items() if not is_bfloat16(value)] == []
    assert not is_bfloat16(emulated["cls"])
    assert not is_bfloat16(emulated["patches"])


def test_the_encoder_equals_the_reference_evaluator(
    emulated: dict[str, NDArray[Any]], read: "Read", tiny: "Subject"
) -> None:
    images = made_up_photos(32, 2).views(tiny.preprocess)
    expected = evaluated(read("bf16", BACKBONE).model, image=images)
    for name, value in zip(("cls", "patches"), expected, strict=True):
        spread = np.abs(value).max()
        assert np.abs(emulated[name] - value).max() < 2 * ULP * spread
