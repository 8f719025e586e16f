"""The stages of an export as ONNX graphs that run alone, and how much work each of them is.

    backbone.onnx            image -> cls, patches
    full.onnx, a part of it  patches -> edges                   K1
    full.onnx, a part of it  edges, patches -> mask, complete   K2
    head.onnx                cls, patches, mask, classifier -> logits and the rest of an answer

One after the other they compute what full.onnx does, by the same nodes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import load_external_data_for_model
from onnx.utils import Extractor

from microclip_deploy.bench.latency.report import BACKBONE, K1, K2, K3_HEAD, SALIENCY
from microclip_deploy.errors import CheckpointError
from microclip_deploy.serving.exported import BACKBONE as BACKBONE_FILE
from microclip_deploy.serving.exported import FULL, HEAD
from microclip_deploy.serving.onnx_graph import OnnxGraph

PATCHES, CUT = "patches", ("mask", "complete")
"""Values of full.onnx: what the saliency reads, and what it answers to a request."""

ANSWERS = ("logits", "fg", "attention")
"""What a session asks the head for."""

TOWARDS_EDGES = ("MatMul", "Greater", "Or")
"""Operators on the way from the patches to the edges: all similarities, the threshold, and the
lower triangle joined with its transpose."""

SMALL_BYTES = 256
"""Constants up to this size may be shapes, which shape inference must read; larger ones are
weights, or lie in another file."""

Values = Mapping[str, NDArray[Any]]


class Work(NamedTuple):
    """What a graph does at least."""

    flop: int | None
    """Floating-point operations of matrix products and convolutions, 2 a multiply-add. None where
    integer products are among them: no ceiling is measured for those."""
    bytes: int
    """Weights read once, inputs read once, outputs written once."""


class Part(NamedTuple):
    """A stage that runs alone."""

    stage: str
    graph: OnnxGraph
    model: onnx.ModelProto
    """The same graph, for counting."""
    outputs: tuple[str, ...]

    def run(self, values: Values) -> dict[str, NDArray[Any]]:
        """Compute the outputs from those of the values that are inputs."""
        feeds = {each.name: values[each.name] for each in self.model.graph.input}
        return dict(zip(self.outputs, self.graph.run(self.outputs, feeds), strict=True))

    def work(self, batch: int, classifier: Sequence[int]) -> Work:
        """Count the work on a batch.

        Args:
            batch: images.
            classifier: shape of the class matrix, (C, E).
        """
        shapes = {each.name: self.shape(each.name, batch) for each in self.model.graph.input}
        if "classifier" in shapes:
            shapes["classifier"] = tuple(classifier)
        return work_of(self.model, shapes, self.outputs)

    def shape(self, name: str, batch: int) -> tuple[int, ...]:
        """Return the shape of an input or output at a batch size."""
        values = (*self.model.graph.input, *self.model.graph.output)
        found = next(each for each in values if each.name == name)
        return tuple(batch if each.dim_param else each.dim_value for each in _dims(found))


def open_parts(export: Path, folder: Path, threads: int | None) -> list[Part]:
    """Load all stages of an export on the CPU, in the order of a request.

    Args:
        export: directory that `export` wrote.
        folder: where the parts of full.onnx are written.
        threads: of one operator; None for one a core.

    Returns:
        `BACKBONE`, `K1`, `K2`, `K3_HEAD`; `SALIENCY` in place of K1 and K2 where the edges are not
        found in the graph.

    Raises:
        CheckpointError: a graph is missing or cannot be taken apart.
    """

    def part(stage: str, path: Path, model: onnx.ModelProto, outputs: Sequence[str]) -> Part:
        return Part(stage, OnnxGraph(path, "cpu", threads=threads), model, tuple(outputs))

    backbone, head = (read_model(export / name) for name in (BACKBONE_FILE, HEAD))
    parts = [part(BACKBONE, export / BACKBONE_FILE, backbone, ("cls", PATCHES))]
    cut = saliency_models(read_model(export / FULL), _value_info(backbone, PATCHES))
    for number, (stage, model) in enumerate(cut.items()):
        path = folder / f"saliency-{number}.onnx"
        load_external_data_for_model(model, str(export))
        onnx.save(model, path)
        parts.append(part(stage, path, model, [each.name for each in model.graph.output]))
    return [*parts, part(K3_HEAD, export / HEAD, head, ANSWERS)]


def read_model(path: Path) -> onnx.ModelProto:
    """Read a graph without the weights that lie in another file.

    Raises:
        CheckpointError: missing, or no graph.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors share no public base class
        raise CheckpointError(
            f"{path}: expected an ONNX graph, found: {error}; export again"
        ) from error


def saliency_models(
    full: onnx.ModelProto, patches: onnx.ValueInfoProto
) -> dict[str, onnx.ModelProto]:
    """Take what lies between patches and mask out of the full graph.

    Args:
        full: full.onnx; the types of two of its values are added.
        patches: type of the patches, (batch, N, D).

    Returns:
        Graphs of `K1` and `K2`, or of `SALIENCY` where no edges are found.

    Raises:
        CheckpointError: the graph holds no patches, or no mask that is made of them.
    """
    edges = edges_name(full.graph)
    full.graph.value_info.append(patches)
    if edges is not None:
        batch, count, _ = (each.dim_param or each.dim_value for each in _dims(patches))
        shape, kind = (batch, count, count), onnx.TensorProto.BOOL
        full.graph.value_info.append(onnx.helper.make_tensor_value_info(edges, kind, shape))
    cut = Extractor(full).extract_model
    try:
        if edges is None:
            return {SALIENCY: cut([PATCHES], [*CUT])}
        return {K1: cut([PATCHES], [edges]), K2: cut([edges, PATCHES], [*CUT])}
    except ValueError as error:
        raise CheckpointError(
            f"{FULL}: expected the values {PATCHES}, {', '.join(CUT)}, found: {error}; export again"
        ) from error


def edges_name(graph: onnx.GraphProto) -> str | None:
    """Return the name of the symmetric adjacency, bool (B, N, N); None if it is not to be found."""
    name = PATCHES
    for operator in TOWARDS_EDGES:
        after = (node for node in _dependents(graph, name) if node.op_type == operator)
        found = next(after, None)
        if found is None:
            return None
        name = found.output[0]
    return name


def _dependents(graph: onnx.GraphProto, name: str) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that need a value, directly or not; nodes of a graph are in order."""
    reached = {name}
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
            yield node


def work_of(
    model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]], outputs: Sequence[str]
) -> Work:
    """Count a graph's work on inputs of given shapes.

    Args:
        model: weights may lie in another file.
        inputs: name -> shape of every input.
        outputs: names of those that are asked for.
    """
    graph = _sized(model, inputs).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    shapes = {each.name: tuple(dim.dim_value for dim in _dims(each)) for each in values}
    shapes.update({each.name: tuple(each.dims) for each in graph.initializer})
    sizes = {each.name: math.prod(shapes[each.name]) * _item_bytes(each) for each in values}
    weights = [each for each in model.graph.initializer if each.name not in inputs]
    moved = [_tensor_bytes(each) for each in weights]
    moved += [sizes[name] for name in (*inputs, *outputs)]
    integer = any(node.op_type in _INTEGER for node in graph.node)
    flop = None if integer else sum(_flop(node, shapes) for node in graph.node)
    return Work(flop, sum(moved))


def _sized(model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """Return a graph with the shapes of all its values, and weights turned into inputs."""
    sized = onnx.ModelProto()
    sized.ir_version = model.ir_version
    sized.opset_import.extend(model.opset_import)
    sized.graph.name = model.graph.name
    sized.graph.node.extend(model.graph.node)
    make = onnx.helper.make_tensor_value_info
    for each in model.graph.input:
        kind = each.type.tensor_type.elem_type
        sized.graph.input.append(make(each.name, kind, inputs[each.name]))
    for each in model.graph.output:
        sized.graph.output.append(make(each.name, each.type.tensor_type.elem_type, None))
    for tensor in model.graph.initializer:
        if tensor.name in inputs:  # a default that is not used
            continue
        if _tensor_bytes(tensor) <= SMALL_BYTES:
            sized.graph.initializer.append(tensor)
        else:
            sized.graph.input.append(make(tensor.name, tensor.data_type, tensor.dims))
    return onnx.shape_inference.infer_shapes(sized, strict_mode=True, data_prop=True)


def _flop(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the operations of one node: 2 a multiply-add, 0 of what is no product."""
    terms = _TERMS.get(node.op_type)
    return 2 * math.prod(shapes[node.output[0]]) * terms(node, shapes) if terms else 0


def _terms_of_matmul(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]]) -> int:
    return shapes[node.input[0]][-1]


def _terms_of_gemm(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]]) -> int:
    transposed = any(each.name == "transA" and each.i for each in node.attribute)
    return shapes[node.input[0]][0 if transposed else 1]


def _terms_of_conv(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]]) -> int:
    return math.prod(shapes[node.input[1]][1:])  # channels of a group and the kernel


_TERMS: Mapping[str, Callable[[onnx.NodeProto, Mapping[str, Sequence[int]]], int]] = {
    "MatMul": _terms_of_matmul,
    "Gemm": _terms_of_gemm,
    "Conv": _terms_of_conv,
}
"""Operator -> how many products are added up to one number of its output."""

_INTEGER = ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")


def _value_info(model: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    """Return the type of an output.

    Raises:
        CheckpointError: there is none of this name with three axes.
    """
    for each in model.graph.output:
        if each.name == name and len(_dims(each)) == 3:
            found: onnx.ValueInfoProto = each
            return found
    raise CheckpointError(
        f"{BACKBONE_FILE}: expected the output {name} (batch, N, D), found none; export again"
    )


def _dims(value: onnx.ValueInfoProto) -> Any:
    return value.type.tensor_type.shape.dim


def _item_bytes(value: onnx.ValueInfoProto) -> int:
    return _bytes_of(value.type.tensor_type.elem_type)


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    size: int = math.prod(tensor.dims) * _bytes_of(tensor.data_type)
    return size


def _bytes_of(kind: int) -> int:
    return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize)
