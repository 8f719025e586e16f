"""The float32 graph that stands for a bfloat16 one rounds where that one would."""

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator

from microclip_deploy.export.proof.bfloat16 import in_float32
from microclip_deploy.export.proof.probes import made_up_photos
from microclip_deploy.serving.exported import BACKBONE

if TYPE_CHECKING:
    from tests.export.conftest import Read, Subject

ULP = 2.0**-8
"""Of a bfloat16, as a share: seven bits are stored."""

# 16 is bfloat16, 1 float32.
HEADER = '<ir_version: 10, opset_import: ["" : 22]> g (float[n] x) => (float[m] y)'
PRODUCT = "{ narrow = Cast<to=16>(x)  z = Mul(narrow, w)  y = Cast<to=1>(z) }"
DIFFERENCE = """{
    third = Constant<value_float=0.3333333432674408>()  wide = Mul(x, third)
    narrow = Cast<to=16>(wide)  again = Cast<to=1>(narrow)  y = Sub(wide, again)
}"""
HALVES = """{
    narrow = Cast<to=16>(x)  square = Mul(narrow, narrow)
    a, b = Split<axis=0, num_outputs=2>(square)  sum = Add(a, b)  y = Cast<to=1>(sum)
}"""


def graph_of(nodes: str) -> onnx.ModelProto:
    """Return x -> y, with a weight w of 1.0078125 in bfloat16."""
    model = parse_model(f"{HEADER} {nodes}")
    bits = np.array([0x3F81], np.uint16).tobytes()
    model.graph.initializer.append(
        helper.make_tensor("w", TensorProto.BFLOAT16, [1], bits, raw=True)
    )
    return model


def run(model: onnx.ModelProto, wanted: list[str], **feeds: NDArray[Any]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(wanted, feeds))


def rounded(nodes: str, *x: float) -> NDArray[Any]:
    """Return what the float32 graph makes of x."""
    return run(in_float32(graph_of(nodes)), ["y"], x=np.array(x, np.float32))[0]


def is_bfloat16(values: NDArray[np.float32]) -> bool:
    return not (values.view(np.uint32) & 0xFFFF).any()


def test_operators_and_conversions_round_to_nearest_even() -> None:
    # 1/3 -> 171/512. 129/128 squared is 1.01568..., between 130/128 and 131/128. 1 + 1/256 is half
    # way between 1 and 129/128: even is 1. 1 + 3/256 is half way between 129/128 and 130/128.
    found = rounded(PRODUCT, 1 / 3, 1.0078125, 1.00390625, 1.01171875)
    assert found.tolist() == [172 / 512, 130 / 128, 129 / 128, 131 / 128]


def test_the_runtime_needs_no_bfloat16_operator_and_the_model_stays() -> None:
    model = graph_of(PRODUCT)
    before = model.SerializeToString()
    graph = onnx.shape_inference.infer_shapes(in_float32(model), strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    narrow = {name for name, kind in kinds.items() if kind == TensorProto.BFLOAT16}
    users = {node.op_type for node in graph.node if narrow & {*node.input, *node.output}}
    assert len(narrow) == 2
    assert users == {"Cast"}
    assert {tensor.data_type for tensor in graph.initializer} == {TensorProto.FLOAT}
    assert model.SerializeToString() == before


def test_what_was_float32_is_not_rounded() -> None:
    assert rounded(DIFFERENCE, 1.0) == np.float32(1 / 3) - np.float32(171 / 512)


def test_an_operator_with_several_results_rounds_all_of_them() -> None:
    x = np.array([1.1, 2.3, 3.7, 0.3], np.float32)
    expected: Any = ReferenceEvaluator(graph_of(HALVES)).run(None, {"x": x})
    np.testing.assert_array_equal(rounded(HALVES, *x), expected[0])


@pytest.fixture(scope="module")
def emulated(read: "Read", tiny: "Subject") -> dict[str, NDArray[Any]]:
    """Return all values of the tiny encoder that were bfloat16, and its outputs."""
    encoder = read("bf16", BACKBONE)
    model = in_float32(encoder.model)
    narrow = {name for name, kind in encoder.types.items() if kind == TensorProto.BFLOAT16}
    shown = sorted(narrow - encoder.weights.keys())
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in shown
    )
    wanted = [*shown, "cls", "patches"]
    images = made_up_photos(32, 2).views(tiny.preprocess)
    return dict(zip(wanted, run(model, wanted, image=images), strict=True))


def test_every_value_of_the_encoder_is_rounded(emulated: dict[str, NDArray[Any]]) -> None:
    assert len(emulated) > 50
    wide = {name for name, value in emulated.items() if not is_bfloat16(value)}
    assert wide == {"cls", "patches"}


def test_the_encoder_equals_the_reference_evaluator(
    emulated: dict[str, NDArray[Any]], read: "Read", tiny: "Subject"
) -> None:
    images = made_up_photos(32, 2).views(tiny.preprocess)
    evaluator = ReferenceEvaluator(read("bf16", BACKBONE).model)
    expected: Any = evaluator.run(["cls", "patches"], {"image": images})
    for name, value in zip(("cls", "patches"), expected, strict=True):
        assert np.abs(emulated[name] - value).max() < 2 * ULP * np.abs(value).max()
