"""The operators of the written files: what TensorRT can read, and no more work than needed."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from microclip_deploy.export.proof.answers import Graphs
from microclip_deploy.export.proof.forward_error import forward_error
from microclip_deploy.export.proof.limits import Tolerance
from microclip_deploy.export.proof.parity import compare_pixels, prove
from microclip_deploy.export.proof.probes import Reference, made_up_photos
from microclip_deploy.export.to_onnx import write_graphs
from microclip_deploy.serving.exported import BACKBONE, FULL, HEAD, Precision

if TYPE_CHECKING:
    from tests.export.conftest import Graph, Read, Subject

FILES = (FULL, BACKBONE, HEAD)
FLOATS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
TYPED: tuple[Precision, ...] = (*FLOATS, "int8-static")

F32, F16, BF16 = int(TensorProto.FLOAT), int(TensorProto.FLOAT16), int(TensorProto.BFLOAT16)
I32, I64 = int(TensorProto.INT32), int(TensorProto.INT64)
U8, I8, BOOL = int(TensorProto.UINT8), int(TensorProto.INT8), int(TensorProto.BOOL)
REALS = {F32, F16, BF16}
NUMBERS = {*REALS, I32, I64}
ANYTHING = {*NUMBERS, BOOL}

# onnx-tensorrt docs/operators.md, TensorRT 10.15.
TENSORRT: dict[str, set[int]] = {
    "And": {BOOL},
    "Cast": {*ANYTHING, U8},
    "DequantizeLinear": {I8},
    "Not": {BOOL},
    "Or": {BOOL},
    "QuantizeLinear": REALS,
    **dict.fromkeys(
        ("Clip", "Conv", "Gemm", "LayerNormalization", "MatMul", "Sigmoid", "Softmax", "Sqrt"),
        REALS,
    ),
    **dict.fromkeys(
        ("Abs", "Add", "Div", "Equal", "Gelu", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
         "Max", "Mul", "Neg", "Pad", "Pow", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum",
         "Sub"),
        NUMBERS,
    ),
    **dict.fromkeys(
        ("Concat", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
         "Where"),
        ANYTHING,
    ),
}  # fmt: skip
"""Operators that TensorRT's parser knows, with the element types of what they work on."""

CONSTANT_BEHIND_THE_FIRST = (
    "Clip", "Pad", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Reshape", "Slice", "Split",
    "Squeeze", "Unsqueeze", "Conv", "LayerNormalization",
)  # fmt: skip
"""Operators whose further inputs must be known when the engine is built."""

UNKNOWN_AT_BUILD_TIME = {
    "ConstantOfShape", "Expand", "If", "Loop", "NonZero", "Range", "Scan", "Shape", "Size", "Tile",
}  # fmt: skip


@pytest.fixture(params=[(precision, name) for precision in TYPED for name in FILES], ids=str)
def typed(request: pytest.FixtureRequest, read: "Read") -> "Graph":
    """Return a graph for TensorRT, which has no operators for int8's scales at run time."""
    return read(*request.param)


def test_no_node_depends_on_shapes_or_branches(graph: "Graph") -> None:
    assert not graph.kinds().keys() & UNKNOWN_AT_BUILD_TIME
    attributes = chain(*(node.attribute for node in graph.nodes))
    assert onnx.AttributeProto.GRAPH not in {attribute.type for attribute in attributes}


def test_tensorrt_knows_every_operator(typed: "Graph") -> None:
    for node in typed.nodes:
        # Positions, axes and conditions have types of their own.
        subject = node.input[1] if node.op_type == "Where" else node.input[0]
        assert typed.types[subject] in TENSORRT[node.op_type], node


def test_tensorrt_knows_sizes_and_axes_beforehand(typed: "Graph") -> None:
    for node in typed.of(*CONSTANT_BEHIND_THE_FIRST):
        assert {each for each in node.input[1:] if each} <= typed.weights.keys(), node
    assert all(len(node.output) == 1 for node in typed.of("LayerNormalization"))


def test_bytes_are_turned_into_numbers_at_once(typed: "Graph") -> None:
    images = [name for name in typed.inputs if name == "image"]
    assert [name for name, kind in typed.types.items() if kind == U8] == images
    assert {node.op_type for name in images for node in typed.users(name)} <= {"Cast"}


def test_nothing_is_float64(graph: "Graph") -> None:
    casts = {attribute.i for node in graph.of("Cast") for attribute in node.attribute}
    assert TensorProto.DOUBLE not in {*graph.types.values(), *casts}


@pytest.mark.parametrize("precision", FLOATS)
def test_attention_is_two_products_and_a_softmax(read: "Read", precision: Precision) -> None:
    found = read(precision, BACKBONE)
    softmaxes = found.of("Softmax")
    assert len(softmaxes) == 2
    narrow = {"fp32": F32, "fp16": F16, "bf16": BF16}[precision]
    for node in softmaxes:
        assert found.types[node.input[0]] == narrow
        assert found.makers[node.input[0]].op_type == "MatMul"
        (user,) = found.users(node.output[0])
        if user.op_type == "Unsqueeze":
            (user,) = found.users(user.output[0])
        assert user.op_type == "MatMul"
        # Back to the projections nothing is multiplied or converted.
        assert set(_before(found, node.input[0])) <= {
            "MatMul", "Transpose", "Reshape", "Split", "Gather", "Slice",
        }  # fmt: skip


def test_attention_between_int8_products_is_fp16_and_not_quantised(read: "Read") -> None:
    found = read("int8-static", BACKBONE)
    products = [node for node in found.of("MatMul") if F16 in map(found.types.get, node.input)]
    assert len(products) == 2 * (2 - 1)  # of all blocks but the last, where one row attends
    assert [found.types[node.input[0]] for node in found.of("Softmax")] == [F16, F32]


def _before(found: "Graph", name: str) -> Iterator[str]:
    """Go back from a value to the biases and norms."""
    node = found.makers.get(name)
    if node is None or node.op_type in ("Add", "LayerNormalization"):
        return
    if node.op_type == "Cast" and found.makers[node.input[0]].op_type == "LayerNormalization":
        return
    yield node.op_type
    for each in node.input:
        yield from _before(found, each)


def test_queries_are_scaled_in_their_weights(read: "Read", tiny: "Subject") -> None:
    found = read("fp32", BACKBONE)
    block, last = tiny.model.backbone.weights().blocks
    (packed,) = (name for name in found.weights if found.weights[name].dims == [64, 192])
    weight = block.qkv[0].T.numpy()
    scaled = np.concatenate([weight[:, :64] * 32**-0.5, weight[:, 64:]], axis=1)
    np.testing.assert_allclose(found.array(packed), scaled, rtol=1e-6)
    query = last.qkv[0][:64].T.numpy() * np.float32(32**-0.5)
    squares = [found.array(name) for name in found.weights if found.weights[name].dims == [64, 64]]
    assert any(np.allclose(square, query, rtol=1e-6) for square in squares)


def test_a_norm_is_one_operator_in_float32(graph: "Graph") -> None:
    norms = graph.of("LayerNormalization")
    assert len(norms) == (6 if "image" in graph.inputs else 0)  # in front, two a block, at the end
    assert {graph.types[each] for node in norms for each in (*node.input, *node.output)} <= {F32}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_residual_stream_is_float32(read: "Read", precision: Precision) -> None:
    found = read(precision, BACKBONE)
    before = [found.makers[node.input[0]] for node in found.of("LayerNormalization")]
    sums = [node for node in before if node.op_type == "Add"]
    assert len(sums) == 5
    assert {found.types[each] for node in sums for each in node.input} == {F32}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_only_the_encoder_is_in_reduced_precision(read: "Read", precision: Precision) -> None:
    narrow = F16 if precision == "fp16" else BF16
    full, backbone, head = (read(precision, name) for name in FILES)
    assert narrow not in head.types.values()
    after = [node for node in full.nodes if not set(node.output) & backbone.makers.keys()]
    assert sum(node.op_type == "MatMul" for node in after) > 25  # cut and head
    values = {each for node in after for each in (*node.input, *node.output) if each}
    assert narrow not in {full.types[each] for each in values}
    products = [full.types[node.input[0]] for node in backbone.of("MatMul")]
    assert Counter(products) == {narrow: 15, F32: 1}  # the projection to the joint space


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_decides_is_not_rounded(read: "Read", precision: Precision) -> None:
    found, exact = (read(each, FULL) for each in (precision, "fp32"))
    names = ("backbone.position", "backbone.projection", "head.match", "head.project", "classifier")
    for name in (*names, "backbone.ln_pre.weight"):
        np.testing.assert_array_equal(found.array(name), exact.array(name))


def test_the_last_block_makes_no_keys(read: "Read") -> None:
    found = read("fp32", BACKBONE)
    weights = [
        tuple(found.weights[node.input[1]].dims)
        for node in found.of("MatMul")
        if node.input[1] in found.weights
    ]
    assert Counter(weights) == {
        (192, 64): 1,  # patches
        (64, 192): 1,  # block 1: queries, keys and values
        (64, 64): 4,  # its way out; query, value and way out of the last
        (64, 256): 2,
        (256, 64): 2,
        (2, 32, 64): 1,  # the last block's key map, applied to its one query a head
        (64, 32): 1,
    }
    (key,) = (node for node in found.of("MatMul") if node.input[1] == "backbone.last.key")
    assert found.shapes[key.input[0]] == ("batch", 2, 1, 32)


@pytest.mark.parametrize("odd", ["mean"], indirect=True)
def test_unusual_models_need_no_other_operators(odd: "Subject", tmp_path: Path) -> None:
    model, preprocess = odd
    write_graphs(model, preprocess, "fp32", tmp_path, {})
    for name in FILES:
        kinds = {node.op_type for node in onnx.load(tmp_path / name).graph.node}
        assert kinds <= TENSORRT.keys()
        assert ("Sigmoid" in kinds) == (name != HEAD)
        assert "Gelu" not in kinds
    photos = made_up_photos(preprocess.size)
    views, matrix = photos.views(preprocess), model.class_matrix().detach().numpy()
    reference = Reference.of(model, preprocess, views)
    proof = prove(
        Graphs(tmp_path, "fp32", model.ncut, matrix, model.cls_share),
        reference,
        photos,
        tolerance=Tolerance(error=forward_error(model, preprocess, reference)),
        pixels=compare_pixels(photos.read(), views, preprocess),
    )
    assert proof.departure is None
    assert 0 < len(proof.undetermined) < 12


@pytest.mark.parametrize("odd", ["soap"], indirect=True)
def test_a_side_that_rounding_may_choose_is_undetermined_in_half_precision(
    odd: "Subject", tmp_path: Path
) -> None:
    model, preprocess = odd
    write_graphs(model, preprocess, "fp16", tmp_path, {})
    photos = made_up_photos(preprocess.size)
    views, matrix = photos.views(preprocess), model.class_matrix().detach().numpy()
    right = Reference.of(model, preprocess, views)
    image = int(np.flatnonzero(right.determined & ~right.mask.all(axis=1))[0])
    mask = right.mask.copy()
    mask[image] ^= True

    def undetermined(reference: Reference) -> tuple[str, ...]:
        return prove(
            Graphs(tmp_path, "fp16", model.ncut, matrix, model.cls_share),
            reference,
            photos,
            tolerance=Tolerance(error=forward_error(model, preprocess, reference)),
            pixels=compare_pixels(photos.read(), views, preprocess),
        ).undetermined

    assert {*undetermined(right._replace(mask=mask))} - {*undetermined(right)} == {
        photos.names[image]
    }
