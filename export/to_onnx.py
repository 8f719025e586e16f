"""A checkpoint's model -> full.onnx, backbone.onnx and head.onnx.

The model is traced once, with the patch tokens among its outputs, and cut into the three files, so
that the split path runs the very nodes of the full graph. Two exports give the same bytes.
"""

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.utils import Extractor
from torch import nn

from microclip_deploy import artifact
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import require
from microclip_deploy.export.graphs import BackboneGraph, Everything, FullGraph, HeadGraph
from microclip_deploy.export.proof.probes import made_up_photos
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.serving.exported import BACKBONE, FULL, HEAD, GraphSpec, Precision, TensorSpec

WEIGHTS = "weights.data"
"""File that all three graphs share where one file each would be too large."""

SINGLE_FILE_LIMIT = 1_900_000_000
"""Bytes of weights; a protobuf file ends at 2 GiB."""

OPSET = 20
"""The first with Gelu as one operator."""

_IR_VERSION = 9  # the one that came with the operator set, so that older runtimes read the files

_TRACED_DTYPE: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,  # quantised after the trace
    "int8-static": torch.float32,
}

_ATTENTION_DTYPE: Mapping[Precision, torch.dtype] = {"int8-static": torch.float16}
"""Where it is another one: TensorRT has no fused kernel for attention in float32."""

_CALIBRATION_BATCH = 8

_KEPT_FROM_INT8 = {"backbone.projection"}
"""The projection to the joint space stays float32: the cosines that decide come next."""

_INPUTS = {
    FULL: ("image", "classifier"),
    BACKBONE: ("image",),
    HEAD: ("cls", "patches", "mask", "classifier"),
}
"""Of each file."""


def write_graphs(
    model: MicroCLIP,
    preprocess: Preprocess,
    precision: Precision,
    directory: Path,
    properties: Mapping[str, str],
    images: NDArray[np.uint8] | None = None,
) -> dict[str, GraphSpec]:
    """Write the three graphs.

    Args:
        model: on the CPU; is not changed.
        preprocess: what it was adapted with; normalisation is folded in.
        precision: of the encoder's matrices; the cut and the heads are float32.
        directory: existing; files of the same names are replaced.
        properties: further entries of each file's metadata.
        images: (P, S, S, 3); int8-static takes the ranges of activations from them. None for
            made-up ones.

    Returns:
        Inputs and outputs by file name.

    Raises:
        EnvironmentProblem: the disk is full or the directory cannot be written; onnxruntime, whose
            tool quantises, is not installed.
    """
    try:
        traced = _trace(model, preprocess, precision, directory)
        if precision == "int8":
            traced = _quantized(traced, directory, _dynamic)
        elif precision == "int8-static":
            if images is None:
                images = made_up_photos(preprocess.size).views(preprocess)
            classifier = model.class_matrix().detach().numpy()
            traced = _quantized(traced, directory, partial(_static, _Batches(images, classifier)))
        return _cut_apart(model, traced, directory, properties)
    except OSError as error:  # of the libraries that write files by themselves
        raise artifact.write_problem(directory, error) from error


def _cut_apart(
    model: MicroCLIP, traced: onnx.ModelProto, directory: Path, properties: Mapping[str, str]
) -> dict[str, GraphSpec]:
    """Write each file's part of the traced graph."""
    classifier = model.class_matrix().detach().numpy()
    extractor = Extractor(traced)
    specs = {}
    for name, outputs in _outputs(model.ncut).items():
        graph = extractor.extract_model(list(_INPUTS[name]), outputs)
        _finish(graph, name, classifier)
        onnx.helper.set_model_props(
            graph, {**properties, "weights_sha256": _weights_sha256(graph, directory)}
        )
        artifact.write_bytes(directory / name, graph.SerializeToString(deterministic=True))
        onnx.checker.check_model(directory / name, full_check=True)
        specs[name] = GraphSpec(
            inputs=tuple(_tensor_spec(value) for value in graph.graph.input),
            outputs=tuple(_tensor_spec(value) for value in graph.graph.output),
        )
    return specs


def _outputs(ncut: NCutSpec) -> dict[str, list[str]]:
    """Return what each file gives."""
    *answers, patches, agreement = Everything._fields
    return {
        FULL: answers,
        BACKBONE: ["cls", patches, agreement] if ncut.asks_cls else ["cls", patches],
        HEAD: ["logits", "embedding", "fg", "attention"],
    }


def _trace(
    model: MicroCLIP, preprocess: Preprocess, precision: Precision, directory: Path
) -> onnx.ModelProto:
    """Trace the model with a batch of two: a batch of one would be taken for a constant."""
    tower = model.backbone.weights()
    dtype, attention = _TRACED_DTYPE[precision], _ATTENTION_DTYPE.get(precision)
    backbone = BackboneGraph(tower, preprocess, dtype, attention)
    graph = FullGraph(backbone, HeadGraph(model), model.ncut).eval()
    size = preprocess.size
    given = _outputs(model.ncut)
    example = (torch.zeros(2, size, size, 3, dtype=torch.uint8), model.class_matrix().detach())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's exporter
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=["image", "classifier"],
            output_names=[*given[FULL], *given[BACKBONE][1:]],
            dynamic_shapes=(
                {0: torch.export.Dim("batch", min=1, max=4096)},
                {0: torch.export.Dim("classes", min=2, max=2**20)},
            ),
            external_data=False,
            optimize=True,
            verbose=False,
        )
    assert program is not None, "torch.onnx.export returns a program unless it writes a file"
    return _in_memory(program, graph, directory)


def _in_memory(
    program: torch.onnx.ONNXProgram, graph: nn.Module, directory: Path
) -> onnx.ModelProto:
    """Return the program as a protobuf; too large weights go to a file that it refers to."""
    if sum(p.numel() * p.element_size() for p in graph.parameters()) <= SINGLE_FILE_LIMIT:
        return program.model_proto
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        onnx_ir.save(program.model, Path(folder) / FULL, external_data=WEIGHTS)
        (Path(folder) / WEIGHTS).replace(directory / WEIGHTS)
        return onnx.load(Path(folder) / FULL, load_external_data=False)


def _quantized(
    model: onnx.ModelProto, directory: Path, quantise: Callable[[Path, Path, list[str]], None]
) -> onnx.ModelProto:
    """Quantise the encoder's matrices to int8, a scale a column.

    Args:
        model: in float32.
        directory: for files that are taken away again.
        quantise: writes the second file from the first; is told the products to quantise.
    """
    require("onnxruntime", "cpu")
    encoder = {t.name for t in model.graph.initializer if len(t.dims) == 2} - _KEPT_FROM_INT8
    products = [n.name for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in encoder]
    del model.graph.value_info[:]  # stale types would contradict the quantised ones
    # Its advice to prepare the graph first is for graphs that were not optimised when traced.
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        weights = directory / WEIGHTS
        if weights.is_file():
            weights.replace(source.with_name(WEIGHTS))
        onnx.save(model, source)
        quantise(source, target, products)
        return onnx.load(target)


def _dynamic(source: Path, target: Path, products: list[str]) -> None:
    """Find the scales of activations at run time: a whole batch shares one."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=products,
        per_channel=True,
        weight_type=QuantType.QInt8,
    )


def _static(batches: "_Batches", source: Path, target: Path, products: list[str]) -> None:
    """Take the scales of activations from images; symmetric, as TensorRT demands."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        source,
        target,
        batches,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=products,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=source.with_name(WEIGHTS).is_file(),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
            "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
        },
    )


class _Batches:
    """Feeds images to onnxruntime's quantiser, which asks for the next batch until None."""

    def __init__(self, images: NDArray[np.uint8], classifier: NDArray[np.float32]) -> None:
        starts = range(0, len(images), _CALIBRATION_BATCH)
        self._feeds: Iterator[dict[str, NDArray[Any]]] = (
            {"image": images[start : start + _CALIBRATION_BATCH], "classifier": classifier}
            for start in starts
        )

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the next inputs of the graph."""
        return next(self._feeds, None)


def _finish(model: onnx.ModelProto, name: str, classifier: NDArray[np.float32]) -> None:
    """Take out where the graph came from, and give the class matrix its default."""
    for node in model.graph.node:
        del node.metadata_props[:]  # source lines with paths of this machine
        node.doc_string = ""
    values = (model.graph.initializer, model.graph.value_info, model.graph.input)
    for value in [value for part in (*values, model.graph.output) for value in part]:
        del value.metadata_props[:]
        value.doc_string = ""
    model.ir_version = _IR_VERSION
    model.producer_name = "microclip-deploy"
    model.graph.name = name.removesuffix(".onnx")
    if any(value.name == "classifier" for value in model.graph.input):
        model.graph.initializer.append(numpy_helper.from_array(classifier, "classifier"))


def _weights_sha256(model: onnx.ModelProto, directory: Path) -> str:
    """Hash all weights: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for tensor in sorted(model.graph.initializer, key=lambda tensor: tensor.name):
        array = numpy_helper.to_array(tensor, base_dir=str(directory))
        digest.update(f"{tensor.name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    return TensorSpec(
        name=value.name,
        dtype=str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)),
        shape=tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim),
    )
