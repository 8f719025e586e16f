"""The stages of an export as ONNX graphs that run alone, and how much work each of them is.

    backbone.onnx            image -> cls, patches
    full.onnx, a part of it  patches -> edges                   K1
    full.onnx, a part of it  edges, patches -> mask, complete   K2
    head.onnx                cls, patches, mask, classifier -> logits and the rest of an answer

One after the other they compute what full.onnx does, by the same nodes. ONNX Runtime's profiler
would time them inside full.onnx, but takes several times as long over small operators as they take
without it, and K2 is a hundred of those.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import load_external_data_for_model
from onnx.utils import Extractor

from microclip_deploy.bench.latency.report import Stage
from microclip_deploy.errors import CheckpointError
from microclip_deploy.serving.exported import BACKBONE as BACKBONE_FILE
from microclip_deploy.serving.exported import FULL, HEAD
from microclip_deploy.serving.onnx_graph import OnnxGraph

_PATCHES, _CUT = "patches", ["mask", "complete"]
"""Values of full.onnx: what the saliency reads, and what it answers to a request."""

_PRODUCTS = ("MatMul", "Gemm")
_INTEGER = ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")


class Work(NamedTuple):
    """What a graph does at least."""

    flop: int | None
    """Floating-point operations of matrix products, 2 a multiply-add. None where integer products
    are among them: no ceiling is measured for those."""
    bytes: int
    """Weights read once, inputs read once, outputs written once."""


class Part(NamedTuple):
    """A stage that runs alone."""

    stage: Stage
    graph: OnnxGraph
    model: onnx.ModelProto
    """The same graph, for counting; it holds the shapes of all its values."""

    def run(self, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute the outputs from those of the values that are inputs."""
        feeds = {each.name: values[each.name] for each in self.model.graph.input}
        outputs = self.graph.outputs()
        return dict(zip(outputs, self.graph.run(outputs, feeds), strict=True))

    def work(self, batch: int, classes: int) -> Work:
        """Count the work on a batch of images with so many classes."""
        graph, sizes = self.model.graph, {"batch": batch, "classes": classes}
        shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            kind = value.type.tensor_type
            kinds[value.name] = kind.elem_type
            shapes[value.name] = [sizes.get(d.dim_param, d.dim_value) for d in kind.shape.dim]
        moved = {tensor.name for tensor in (*graph.initializer, *graph.input, *graph.output)}
        items = {n: onnx.helper.tensor_dtype_to_np_dtype(kinds[n]).itemsize for n in moved}
        flop = None
        if not any(node.op_type in _INTEGER for node in graph.node):
            flop = sum(_flop(node, shapes) for node in graph.node if node.op_type in _PRODUCTS)
        return Work(flop, sum(math.prod(shapes[name]) * item for name, item in items.items()))


def open_parts(export: Path, folder: Path, threads: int | None) -> list[Part]:
    """Load all stages of an export on the CPU, in the order of a request.

    Args:
        export: directory that `export` wrote.
        folder: where the parts of full.onnx are written.
        threads: of one operator; None for one a core.

    Returns:
        Backbone, K1, K2 and head; `SALIENCY` in place of K1 and K2 where the edges are not found in
        the graph.

    Raises:
        CheckpointError: a graph is missing or cannot be taken apart.
    """
    paths = {Stage.BACKBONE: export / BACKBONE_FILE, Stage.HEAD: export / HEAD}
    try:
        full = onnx.load(export / FULL, load_external_data=False)
        models = {s: onnx.load(path, load_external_data=False) for s, path in paths.items()}
        saliency = _saliency(full)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{export}: expected graphs with the values {_PATCHES} and {', '.join(_CUT)}, found: "
            f"{error}; export again"
        ) from error
    for stage, model in saliency.items():
        paths[stage] = folder / f"{stage}.onnx"
        load_external_data_for_model(model, str(export))
        onnx.save(model, paths[stage])
    models |= saliency
    return [
        Part(stage, OnnxGraph(paths[stage], "cpu", threads=threads), models[stage])
        for stage in Stage
        if stage in models
    ]


def _saliency(full: onnx.ModelProto) -> dict[Stage, onnx.ModelProto]:
    """Take what lies between patches and mask out of the full graph."""
    cut = Extractor(full).extract_model
    # The edges are the lower triangle joined with its transpose; what joins later needs them.
    join = next((node for node in full.graph.node if node.op_type == "Or"), None)
    if join is None:
        return {Stage.SALIENCY: cut([_PATCHES], _CUT)}
    (edges,) = join.output
    return {Stage.K1: cut([_PATCHES], [edges]), Stage.K2: cut([edges, _PATCHES], _CUT)}


def _flop(product: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> int:
    """Return 2 a multiply-add; one factor may be the same for a whole batch, or transposed."""
    left, right = (math.prod(shapes[name]) for name in product.input[:2])
    *_, rows, columns = shapes[product.output[0]]
    return 2 * max(left * columns, right * rows)
