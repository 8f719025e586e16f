"""A bfloat16 graph as a float32 graph that rounds where the original would.

ONNX Runtime's CPU has no bfloat16 operators. To prove such a graph on a CPU, every operator
computes in float32 and every result that was bfloat16 is rounded to bfloat16: what a GPU does,
except for the order of additions inside an operator. Nothing that is made here is ever shipped.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BFLOAT16 = TensorProto.BFLOAT16
FLOAT = TensorProto.FLOAT


def in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the equivalent graph; the model itself is not changed.

    Args:
        model: with its weights inside; the types of bfloat16 values are inferred.
    """
    types = _types(model)
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    nodes = [new for node in graph.node for new in _rounded(node, types)]
    del graph.node[:]
    graph.node.extend(nodes)
    for tensor in graph.initializer:
        if tensor.data_type == BFLOAT16:
            weight = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    del graph.value_info[:]
    return wide


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every value."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _rounded(node: onnx.NodeProto, types: dict[str, int]) -> list[onnx.NodeProto]:
    """Return the node, and behind it the rounding of each result that was bfloat16."""
    narrow = [name for name in node.output if types.get(name) == BFLOAT16]
    if not narrow:
        return [node]
    wide = onnx.NodeProto()
    wide.CopyFrom(node)
    for attribute in wide.attribute:
        if attribute.name == "to":  # a Cast to bfloat16 becomes the rounding itself
            attribute.i = FLOAT
    wide.output[:] = [f"{name}/exact" if name in narrow else name for name in node.output]
    roundings = []
    for name in narrow:
        roundings += [
            helper.make_node("Cast", [f"{name}/exact"], [f"{name}/bfloat16"], to=BFLOAT16),
            helper.make_node("Cast", [f"{name}/bfloat16"], [name], to=FLOAT),
        ]
    return [wide, *roundings]
