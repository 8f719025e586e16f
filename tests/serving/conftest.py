"""A small export made by hand: three colours are the embedding, so that NumPy can say it all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from microclip_deploy.serving.exported import FULL
from tests.serving.made_exports import write_export

SIDE = 32
CLASSES = ("red circle", "green square", "blue stripe")

MakeExport = Callable[..., Path]


def colour_graph(opset: int = 20, side: int = SIDE) -> onnx.ModelProto:
    """Return a graph of the contract: cls is the mean colour, fg its square, N = 4 quarters."""
    constants: dict[str, NDArray[Any]] = {
        "rows": np.array([1, 2], np.int64),
        "channels": np.array([1], np.int64),
        "quarters": np.array([0, 4], np.int64),
        "pad": np.array([0, 0, 0, 1], np.int64),
        "scale": np.array(50, np.float32),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        node("ReduceMean", ["x", "rows"], ["colour"], keepdims=0),
        node("LpNormalization", ["colour"], ["cls"], axis=1, p=2),
        node("Mul", ["cls", "cls"], ["squared"]),
        node("LpNormalization", ["squared"], ["fg"], axis=1, p=2),
        node("Add", ["cls", "fg"], ["embedding"]),
        node("Transpose", ["classifier"], ["columns"]),
        node("MatMul", ["embedding", "columns"], ["cosines"]),
        node("Mul", ["cosines", "scale"], ["logits"]),
        node("Transpose", ["x"], ["planes"], perm=[0, 3, 1, 2]),
        node(
            "AveragePool",
            ["planes"],
            ["pooled"],
            kernel_shape=[side // 2] * 2,
            strides=[side // 2] * 2,
        ),
        node("ReduceMean", ["pooled", "channels"], ["grey"], keepdims=0),
        node("Reshape", ["grey", "quarters"], ["tokens"]),
        node("ReduceMean", ["tokens", "channels"], ["mean"]),
        node("Greater", ["tokens", "mean"], ["mask"]),
        node("Pad", ["tokens", "pad"], ["padded"]),
        node("Softmax", ["padded"], ["attention"], axis=1),
        node("ReduceMean", ["mean", "channels"], ["brightness"], keepdims=0),
        node("Equal", ["brightness", "scale"], ["complete"]),
    ]
    outputs: dict[str, tuple[int, list[str | int | None]]] = {
        "logits": (TensorProto.FLOAT, ["batch", "classes"]),
        "embedding": (TensorProto.FLOAT, ["batch", 3]),
        "cls": (TensorProto.FLOAT, ["batch", 3]),
        "fg": (TensorProto.FLOAT, ["batch", 3]),
        "mask": (TensorProto.BOOL, ["batch", 4]),
        "attention": (TensorProto.FLOAT, ["batch", 5]),
        "complete": (TensorProto.BOOL, ["batch"]),
    }
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "colours",
        [
            value("image", TensorProto.UINT8, ["batch", side, side, 3]),
            value("classifier", TensorProto.FLOAT, ["classes", 3]),
        ],
        [value(name, dtype, shape) for name, (dtype, shape) in outputs.items()],
        [
            numpy_helper.from_array(array, name)
            for name, array in {**constants, "classifier": np.eye(3, dtype=np.float32)}.items()
        ],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=min(opset, 10)
    )


@pytest.fixture
def colours() -> Callable[..., onnx.ModelProto]:
    """Return what makes the graph."""
    return colour_graph


@pytest.fixture
def make_export(tmp_path: Path) -> MakeExport:
    """Return a function that writes an export of a graph's bytes, by default an intact one."""

    def make(
        graph: bytes | None = None,
        classifier: NDArray[np.float32] | None = None,
        classes: tuple[str, ...] = CLASSES,
        unadapted: tuple[str, ...] = (),
    ) -> Path:
        matrix = np.eye(3, dtype=np.float32) if classifier is None else classifier
        content = colour_graph().SerializeToString() if graph is None else graph
        fields: dict[str, Any] = {"classes": classes, "unadapted": unadapted, "precision": "fp32"}
        return write_export(tmp_path / "export", {FULL: content}, matrix, **fields)

    return make


@pytest.fixture
def export(make_export: MakeExport) -> Path:
    """Return an intact export of three classes, which it tells apart by colour."""
    return make_export()
