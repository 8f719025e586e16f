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
from microclip_deploy.export.proof.probes import made_up_photos
from microclip_deploy.export.to_onnx import SINGLE_FILE_LIMIT, WEIGHTS, write_graphs
from microclip_deploy.serving.exported import BACKBONE, FULL, HEAD, Precision, read_export

if TYPE_CHECKING:
    from tests.export.conftest import Read, Remember, Subject, Write

FILES = (FULL, BACKBONE, HEAD)
FLOATS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
PRECISIONS: tuple[Precision, ...] = (*FLOATS, "int8")

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


@pytest.fixture(scope="session")
def images(tiny: "Subject") -> NDArray[np.uint8]:
    return made_up_photos(32).views(tiny.preprocess)


def answer(path: Path, wanted: tuple[str, ...], **feeds: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return tuple(session.run(list(wanted), feeds))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_checker_accepts_every_file(
    read: "Read", write: "Write", precision: Precision, name: str
) -> None:
    onnx.checker.check_model(write(precision) / name, full_check=True)
    found = read(precision, name)
    assert set(chain(*(node.output for node in found.nodes))) <= found.types.keys()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_batch_and_classes_vary(read: "Read", precision: Precision, name: str) -> None:
    found = read(precision, name)
    ends = [value.name for value in (*found.model.graph.input, *found.model.graph.output)]
    assert {end: found.shapes[end] for end in ends} == SHAPES[name]
    for end in ends:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(found.types[end])
        assert dtype == DTYPES.get(end, "float32")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_old_runtimes_can_read_the_format(read: "Read", precision: Precision, name: str) -> None:
    model = read(precision, name).model
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    assert model.ir_version == 9
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_file_does_not_tell_where_it_was_made(
    read: "Read", precision: Precision, name: str
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(read(precision, name).model)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # could spell anything
    content = model.SerializeToString()
    root = Path(to_onnx.__file__).parents[2]
    traces = (str(root), str(Path.home()), tempfile.gettempdir(), "site-packages", ".py", "pkg.")
    assert [trace for trace in traces if trace.encode() in content] == []
    assert len(content) < 100_000


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_hash_covers_every_weight(read: "Read", precision: Precision, name: str) -> None:
    found = read(precision, name)
    stored = {entry.key: entry.value for entry in found.model.metadata_props}
    digest = hashlib.sha256()
    for weight in sorted(found.weights):
        array = found.array(weight)
        digest.update(f"{weight} {array.dtype} {array.shape}".encode() + array.tobytes())
    assert stored == {"precision": precision, "weights_sha256": digest.hexdigest()}


def test_other_weights_have_another_hash(
    read: "Read", tiny: "Subject", remember: "Remember", tmp_path: Path
) -> None:
    model = copy.deepcopy(tiny.model)
    with torch.no_grad(), remember():
        model.classifier[0, 0] += 0.1
        write_graphs(model, tiny.preprocess, "fp32", tmp_path, {"precision": "fp32"})
    changed = {
        name
        for name in FILES
        if onnx.load(tmp_path / name).metadata_props != read("fp32", name).model.metadata_props
    }
    assert changed == {FULL, HEAD}


def test_the_default_class_matrix_is_the_models(
    write: "Write", tiny: "Subject", images: NDArray[np.uint8]
) -> None:
    with torch.inference_mode():
        expected = tiny.model(tiny.preprocess.normalize(torch.from_numpy(images))).logits
    (found,) = answer(write("fp32") / FULL, ("logits",), image=images)
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("classes", [2, 5, 1000])
def test_another_class_matrix_can_be_given(
    write: "Write", images: NDArray[np.uint8], classes: int
) -> None:
    rows = np.random.default_rng(0).normal(size=(classes, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    logits, cls, fg = answer(
        write("fp32") / FULL, ("logits", "cls", "fg"), image=images[:5], classifier=rows
    )
    np.testing.assert_allclose(logits, 50 * (cls + fg) @ rows.T, atol=5e-5)


def test_head_and_backbone_are_the_full_graph(write: "Write", images: NDArray[np.uint8]) -> None:
    folder = write("fp32")
    cls, patches = answer(folder / BACKBONE, ("cls", "patches"), image=images)
    *expected, mask = answer(folder / FULL, ("logits", "embedding", "fg", "mask"), image=images)
    found = answer(
        folder / HEAD, ("logits", "embedding", "fg"), cls=cls, patches=patches, mask=mask
    )
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=0)


def test_the_manifest_tells_inputs_and_outputs(tiny_export: Path) -> None:
    for name, spec in read_export(tiny_export).manifest.graphs.items():
        found = {value.name: value.shape for value in (*spec.inputs, *spec.outputs)}
        assert found == SHAPES[name]
        kinds = {value.name: value.dtype for value in (*spec.inputs, *spec.outputs)}
        assert kinds == {value: DTYPES.get(value, "float32") for value in SHAPES[name]}


@pytest.fixture(scope="module")
def large(
    tiny: "Subject", remember: "Remember", tmp_path_factory: pytest.TempPathFactory
) -> dict[Precision, Path]:
    """Return graphs that were too large for one file each."""
    folders: dict[Precision, Path] = {}
    with pytest.MonkeyPatch.context() as patch, remember():
        patch.setattr(to_onnx, "SINGLE_FILE_LIMIT", 1000)
        for precision in ("fp32", "int8"):
            folders[precision] = tmp_path_factory.mktemp(f"large-{precision}")
            write_graphs(*tiny, precision, folders[precision], {"precision": precision})
    return folders


def test_a_protobuf_file_can_hold_what_stays_in_one_file() -> None:
    assert 2**30 < SINGLE_FILE_LIMIT < 2**31 - 10**8


def test_large_weights_are_one_file_that_all_graphs_share(
    large: dict[Precision, Path], read: "Read", write: "Write", images: NDArray[np.uint8]
) -> None:
    folder = large["fp32"]
    assert {path.name for path in folder.iterdir()} == {*FILES, WEIGHTS}
    for name in FILES:
        model = onnx.load(folder / name, load_external_data=False)
        stored = [tensor for tensor in model.graph.initializer if tensor.external_data]
        locations = {entry.value for tensor in stored for entry in tensor.external_data[:1]}
        assert locations == {WEIGHTS}
        onnx.checker.check_model(folder / name, full_check=True)
        same = read("fp32", name).model.metadata_props
        assert model.metadata_props == same  # the hash is the same as of one file
    assert (folder / FULL).stat().st_size < (folder / WEIGHTS).stat().st_size
    found, expected = (
        answer(each / FULL, ("logits", "mask"), image=images) for each in (folder, write("fp32"))
    )
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_large_weights_can_be_quantised(large: dict[Precision, Path], read: "Read") -> None:
    assert {path.name for path in large["int8"].iterdir()} == set(FILES)
    for name in FILES:
        found, expected = onnx.load(large["int8"] / name), read("int8", name).model
        assert found.graph.node == expected.graph.node
        assert found.metadata_props == expected.metadata_props


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


def test_quantised_weights_are_smaller(write: "Write") -> None:
    sizes = [(write(each) / BACKBONE).stat().st_size for each in ("fp32", "fp16", "int8")]
    assert sizes[0] > 1.8 * sizes[1]
    assert sizes[0] > 2 * sizes[2]
