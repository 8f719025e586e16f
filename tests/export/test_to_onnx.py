"""The written files: valid, dynamic where they must be, without a trace of their origin."""

import copy
import hashlib
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from microclip_deploy.export import to_onnx
from microclip_deploy.export.proof.probes import Reference
from microclip_deploy.export.to_onnx import WEIGHTS, write_graphs
from microclip_deploy.serving import open_session
from microclip_deploy.serving.exported import BACKBONE, FULL, HEAD, Precision, read_export
from microclip_deploy.serving.onnx_graph import OnnxGraph

if TYPE_CHECKING:
    from tests.export.conftest import Graph, Read, Subject, Write

FILES = (FULL, BACKBONE, HEAD)

SHAPES: dict[str, dict[str, tuple[int | str, ...]]] = {
    FULL: {
        "image": ("batch", 32, 32, 3),
        "classifier": ("classes", 32),
        "logits": ("batch", "classes"),
        "embedding": ("batch", 32),
        "cls": ("batch", 32),
        "fg": ("batch", 32),
        "mask": ("batch", 16),
        "attention": ("batch", 17),
        "complete": ("batch",),
        "residual": ("batch",),
    },
    BACKBONE: {"image": ("batch", 32, 32, 3), "cls": ("batch", 32), "patches": ("batch", 16, 64)},
    HEAD: {
        "cls": ("batch", 32),
        "patches": ("batch", 16, 64),
        "mask": ("batch", 16),
        "classifier": ("classes", 32),
        "logits": ("batch", "classes"),
        "embedding": ("batch", 32),
        "fg": ("batch", 32),
        "attention": ("batch", 17),
    },
}
DTYPES = {"image": "uint8", "mask": "bool", "complete": "bool"}
"""All others are float32."""


def test_only_batch_and_classes_vary(graph: "Graph") -> None:
    assert set(chain(*(node.output for node in graph.nodes))) <= graph.types.keys()
    ends = [value.name for value in (*graph.model.graph.input, *graph.model.graph.output)]
    assert {end: graph.shapes[end] for end in ends} == SHAPES[f"{graph.model.graph.name}.onnx"]
    for end in ends:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(graph.types[end])
        assert dtype == DTYPES.get(end, "float32")


def test_old_runtimes_can_read_the_format(graph: "Graph") -> None:
    model = graph.model
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    assert model.ir_version == 9
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}


def test_a_file_does_not_tell_where_it_was_made(graph: "Graph") -> None:
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # could spell anything
    content = model.SerializeToString()
    root = Path(to_onnx.__file__).parents[2]
    traces = (str(root), str(Path.home()), tempfile.gettempdir(), "site-packages", ".py", "pkg.")
    assert [trace for trace in traces if trace.encode() in content] == []
    assert len(content) < 100_000


def test_the_hash_covers_every_weight(graph: "Graph") -> None:
    digest = hashlib.sha256()
    for name in sorted(graph.weights):
        array = graph.array(name)
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    assert graph.properties()["weights_sha256"] == digest.hexdigest()


def test_other_weights_have_another_hash(read: "Read", tiny: "Subject", tmp_path: Path) -> None:
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        model.classifier[0, 0] += 0.1
    write_graphs(model, tiny.preprocess, "fp32", tmp_path, {})
    hashes = {
        name: {entry.value for entry in onnx.load(tmp_path / name).metadata_props} for name in FILES
    }
    same = {
        name
        for name in FILES
        if hashes[name] == {read("fp32", name).properties()["weights_sha256"]}
    }
    assert same == {BACKBONE}


@pytest.mark.parametrize("classes", [2, 1000])
def test_another_class_matrix_can_be_given(
    tiny_export: Path, reference: Reference, classes: int
) -> None:
    rows = np.random.default_rng(0).normal(size=(classes, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    session = onnxruntime.InferenceSession(tiny_export / FULL, providers=["CPUExecutionProvider"])
    feeds: dict[str, NDArray[Any]] = {"image": reference.images[:5], "classifier": rows}
    logits, cls, fg = session.run(["logits", "cls", "fg"], feeds)
    np.testing.assert_allclose(logits, 50 * (cls + fg) @ rows.T, atol=5e-5)


def test_the_manifest_tells_inputs_and_outputs(tiny_export: Path) -> None:
    for name, spec in read_export(tiny_export).manifest.graphs.items():
        found = {value.name: value.shape for value in (*spec.inputs, *spec.outputs)}
        assert found == SHAPES[name]
        kinds = {value.name: value.dtype for value in (*spec.inputs, *spec.outputs)}
        assert kinds == {value: DTYPES.get(value, "float32") for value in SHAPES[name]}


def test_large_weights_are_one_file_that_all_graphs_share(
    write_large: "Write", read: "Read", reference: Reference, tiny_export: Path
) -> None:
    assert 2**30 < to_onnx.SINGLE_FILE_LIMIT < 2**31 - 10**8  # a protobuf file ends at 2 GiB
    folder = write_large("fp32")
    assert WEIGHTS in read_export(folder).stored["files"]
    for name in FILES:
        model = onnx.load(folder / name, load_external_data=False)
        stored = [tensor for tensor in model.graph.initializer if tensor.external_data]
        assert {entry.value for each in stored for entry in each.external_data[:1]} == {WEIGHTS}
        # The hash is the same as of one file.
        assert model.metadata_props == read("fp32", name).model.metadata_props
    assert (folder / FULL).stat().st_size < (folder / WEIGHTS).stat().st_size
    with open_session(folder) as session, open_session(tiny_export) as exact:
        found, expected = (each.predict(reference.images) for each in (session, exact))
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.mask, expected.mask)


def test_large_weights_can_be_quantised(write_large: "Write", read: "Read") -> None:
    assert not (write_large("int8") / WEIGHTS).exists()
    for name in FILES:
        model, expected = onnx.load(write_large("int8") / name), read("int8", name).model
        assert model.graph.node == expected.graph.node
        assert model.metadata_props == expected.metadata_props


def test_only_the_encoders_products_are_quantised(read: "Read") -> None:
    full, backbone, head = (read("int8", name) for name in FILES)
    # Patches; four in a block, but the last one's query and value are apart and its key map stays.
    shapes = {(192, 64): 1, (64, 192): 1, (64, 64): 4, (64, 256): 2, (256, 64): 2}
    for found in (full, backbone):
        weights = [tuple(found.weights[node.input[1]].dims) for node in found.of("MatMulInteger")]
        assert Counter(weights) == shapes
        assert found.types["backbone.projection"] == TensorProto.FLOAT
    after = [node for node in full.nodes if not set(node.output) & backbone.makers.keys()]
    used = {full.types[each] for node in after for each in node.input if each}
    for types in (used, head.types.values()):
        assert set(types) <= {TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL}


def test_a_column_has_a_scale_of_its_own(read: "Read") -> None:
    found = read("int8", BACKBONE)
    for node in found.of("MatMulInteger"):
        columns = found.weights[node.input[1]].dims[1]
        scale = found.array(node.input[1].replace("_quantized", "_scale"))
        assert scale.shape == (columns,)
        assert len(np.unique(scale)) > columns // 2


def test_static_scales_are_in_the_file_and_symmetric(read: "Read") -> None:
    found, dynamic = read("int8-static", BACKBONE), read("int8", BACKBONE)
    products = [
        node
        for node in found.of("MatMul")
        if all(found.makers[each].op_type == "DequantizeLinear" for each in node.input[:1])
    ]
    assert len(products) == len(dynamic.of("MatMulInteger"))
    for node in products:
        activation, weight = (found.makers[each] for each in node.input)
        values, scale, zero = map(found.array, weight.input)
        assert values.dtype == zero.dtype == np.int8
        assert (scale.shape, zero.shape) == (values.shape[1:],) * 2
        assert [attribute.i for attribute in weight.attribute if attribute.name == "axis"] == [1]
        rounding = found.makers[activation.input[0]]
        assert rounding.op_type == "QuantizeLinear"
        assert rounding.input[1:] == activation.input[1:]
        held, middle = map(found.array, rounding.input[1:])
        assert held.shape == ()
        assert middle.dtype == np.int8
        assert not middle.any()
        assert not zero.any()


def test_static_scales_follow_the_images(tiny: "Subject", tmp_path: Path) -> None:
    def scales(name: str, images: NDArray[np.uint8]) -> list[float]:
        (tmp_path / name).mkdir()
        write_graphs(*tiny, "int8-static", tmp_path / name, {}, images)
        model = onnx.load(tmp_path / name / BACKBONE)
        arrays = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
        rounded = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        return [float(arrays[node.input[1]]) for node in rounded]

    light = np.full((9, 32, 32, 3), 128 + 32, np.uint8)  # pixels enter as (x - 128) / 64
    found, other = scales("light", light), scales("lighter", light + 32)
    assert (found[0], other[0]) == pytest.approx((0.5 / 127, 1 / 127))


def test_static_answers_do_not_depend_on_the_batch(write: "Write", reference: Reference) -> None:
    images = reference.images
    beside = {"image": images[:5]}, {"image": images[[9, 10, 2, 11, 12]]}
    full = OnnxGraph(write("int8-static") / FULL)
    logits, others = (full.run(["logits"], feed)[0] for feed in beside)
    np.testing.assert_array_equal(logits[2], others[2])
    backbone = OnnxGraph(write("int8-static") / BACKBONE)
    (tokens,), (alone,) = (
        backbone.run(["patches"], {"image": images[rows]}) for rows in (slice(0, 5), slice(2, 3))
    )
    np.testing.assert_array_equal(tokens[2], alone[0])
    dynamic = OnnxGraph(write("int8") / FULL)
    logits, others = (dynamic.run(["logits"], feed)[0] for feed in beside)
    assert (logits[2] != others[2]).any()


def test_quantised_weights_are_smaller(write: "Write") -> None:
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int8-static")
    sizes = [(write(each) / BACKBONE).stat().st_size for each in precisions]
    assert sizes[0] > 1.8 * sizes[1]
    assert sizes[0] > 2 * max(sizes[2:])
