"""The proof names exactly the stage that is damaged, and lets nothing but rounding pass."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from microclip_deploy.export.proof.limits import LIMITS
from microclip_deploy.export.proof.parity import Proof, Serving, Stage, prove
from microclip_deploy.export.proof.probes import Reference, made_up_photos
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import similarities
from microclip_deploy.serving.exported import BACKBONE, FULL, HEAD, PROBES, Precision, read_export
from microclip_deploy.serving.onnx_graph import OnnxGraph

if TYPE_CHECKING:
    from tests.export.conftest import Write

Change = Callable[[ModelProto], None]

PHOTOS = made_up_photos(32)
INTACT = Stage(graph="preprocess", stage="pixels", difference=0, limit=1 / 255)
STAGES = [
    "preprocess: pixels",
    "backbone.onnx: cls",
    "backbone.onnx: patches",
    "backbone.onnx: edges",
    "head.onnx: attention",
    "head.onnx: fg",
    "head.onnx: logits",
    "full.onnx: cut",
    "full.onnx: mask",
    "full.onnx: attention",
    "full.onnx: fg",
    "full.onnx: logits",
    "full.onnx: parts",
    "full.onnx: classes",
    "full.onnx: top1",
]
ANSWERS = 45 + 24
"""Of the full graph: batches of 1 to 9, and of all images."""


@pytest.fixture
def export(tiny_export: Path, tmp_path: Path) -> Path:
    """Return an export that may be damaged."""
    return shutil.copytree(tiny_export, tmp_path / "export")


@pytest.fixture(scope="module")
def reference(tiny_export: Path) -> Reference:
    return Reference.read(tiny_export / PROBES)


@pytest.fixture(scope="module")
def classifier(tiny_export: Path) -> NDArray[np.float32]:
    return read_export(tiny_export).classifier


def proof_of(
    directory: Path,
    reference: Reference,
    precision: Precision = "fp32",
    *,
    spec: NCutSpec | None = None,
    pixels: Stage = INTACT,
    cls_share: float = 0.5,
    **limits: float | None,
) -> Proof:
    """Prove an export; limits may be others than the precision's."""
    rows = np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
    return prove(
        directory,
        reference,
        spec or NCutSpec(),
        precision,
        limits=LIMITS[precision].model_copy(update=limits),
        serving=Serving(rows / np.linalg.norm(rows, axis=1, keepdims=True), cls_share),
        pixels=pixels,
        names=PHOTOS.names,
        source="probes",
    )


def departures(proof: Proof) -> list[str]:
    return [f"{stage.graph}: {stage.stage}" for stage in proof.stages if stage.departs]


def stage_of(proof: Proof, name: str) -> Stage:
    return proof.stages[STAGES.index(name)]


def change(path: Path, *changes: Change) -> None:
    """Rewrite a graph."""
    model = onnx.load(path)
    for each in changes:
        each(model)
    onnx.save(model, path)


def weight(name: str, to: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    """Return a change of a weight."""

    def changed(model: ModelProto) -> None:
        (tensor,) = (each for each in model.graph.initializer if each.name == name)
        array = np.ascontiguousarray(to(numpy_helper.to_array(tensor).copy()))
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return changed


def output(name: str, *nodes: tuple[str, Sequence[str], dict[str, Any]], **new: Any) -> Change:
    """Return a change of an output alone: a node reads `intact`, the last one writes the output."""

    def changed(model: ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["intact" if each == name else each for each in names]
        for number, (kind, inputs, attributes) in enumerate(nodes):
            made = name if number == len(nodes) - 1 else f"step {number}"
            model.graph.node.append(helper.make_node(kind, inputs, [made], **attributes))
        for constant, value in new.items():
            model.graph.initializer.append(numpy_helper.from_array(np.array(value), constant))

    return changed


def scaled(name: str, factor: float) -> Change:
    return output(name, ("Mul", ["intact", "factor"], {}), factor=np.float32(factor))


def inverted(name: str) -> Change:
    return output(name, ("Not", ["intact"], {}))


def of_first_row(name: str) -> Change:
    """Return what happens when a batch is taken for its first image."""
    return output(
        name,
        ("Gather", ["intact", "first"], {"axis": 0}),
        ("Mul", ["intact", "zero"], {}),
        ("Add", ["step 0", "step 1"], {}),
        first=np.array([0]),
        zero=np.float32(0),
    )


def noisy(array: NDArray[Any]) -> NDArray[Any]:
    rng = np.random.default_rng(0)
    return (array + rng.normal(0, 1e-3, array.shape)).astype(array.dtype)


def unknown(array: NDArray[Any]) -> NDArray[Any]:
    array.flat[0] = np.nan
    return array


def other_tau(model: ModelProto) -> None:
    """Join fewer tokens."""
    (name,) = (
        tensor.name
        for tensor in model.graph.initializer
        if not tensor.dims
        and tensor.data_type == onnx.TensorProto.FLOAT
        and numpy_helper.to_array(tensor) == np.float32(0.2)
    )
    weight(name, lambda tau: tau + np.float32(20))(model)


def fixed_classes(model: ModelProto) -> None:
    """Ignore the class matrix that is given; what was a default becomes a constant."""
    rows = next(each for each in model.graph.initializer if each.name == "classifier")
    constant = model.graph.initializer.add()
    constant.CopyFrom(rows)
    constant.name = "constant"
    for node in model.graph.node:
        node.input[:] = ["constant" if each == "classifier" else each for each in node.input]


def test_an_intact_export_is_proven(tiny_export: Path, reference: Reference) -> None:
    proof = proof_of(tiny_export, reference)
    assert [f"{stage.graph}: {stage.stage}" for stage in proof.stages] == STAGES
    assert proof.departure is None
    assert departures(proof) == []
    assert (proof.agreement, proof.flips, proof.undetermined, proof.other_masks) == (1, (), (), ())
    assert list(proof.batches) == [*range(1, 10), 24]
    assert 0 < max(proof.batches.values()) < 5e-5


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_every_precision_is_proven(
    write: "Write", reference: Reference, precision: Precision
) -> None:
    proof = proof_of(write(precision), reference, precision)
    assert proof.departure is None
    smallest = {"fp16": 1e-5, "bf16": 3e-4, "int8": 3e-4}[precision]
    assert smallest < stage_of(proof, "backbone.onnx: cls").difference < 100 * smallest


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        (BACKBONE, weight("backbone.patch", noisy), "backbone.onnx: cls"),
        (BACKBONE, weight("backbone.position", noisy), "backbone.onnx: cls"),
        (BACKBONE, weight("backbone.position", unknown), "backbone.onnx: cls"),
        (BACKBONE, weight("backbone.projection", noisy), "backbone.onnx: cls"),
        (BACKBONE, of_first_row("cls"), "backbone.onnx: cls"),
        (BACKBONE, scaled("patches", 1.001), "backbone.onnx: patches"),
        (BACKBONE, of_first_row("patches"), "backbone.onnx: patches"),
        (HEAD, weight("head.match", noisy), "head.onnx: attention"),
        (HEAD, weight("head.match", unknown), "head.onnx: attention"),
        (HEAD, weight("head.project", noisy), "head.onnx: fg"),
        (HEAD, weight("classifier", noisy), "head.onnx: logits"),
        (HEAD, of_first_row("logits"), "head.onnx: logits"),
        (FULL, other_tau, "full.onnx: cut"),
        (FULL, inverted("mask"), "full.onnx: cut"),
        (FULL, inverted("complete"), "full.onnx: cut"),
        (FULL, of_first_row("attention"), "full.onnx: attention"),
        (FULL, weight("head.match", noisy), "full.onnx: attention"),
        (FULL, weight("head.project", noisy), "full.onnx: fg"),
        (FULL, weight("classifier", noisy), "full.onnx: logits"),
        (FULL, weight("classifier", unknown), "full.onnx: logits"),
        (FULL, of_first_row("logits"), "full.onnx: logits"),
        (FULL, scaled("cls", 1.001), "full.onnx: parts"),
        (FULL, of_first_row("embedding"), "full.onnx: parts"),
    ],
)
def test_the_damaged_stage_is_named(
    export: Path, reference: Reference, name: str, damage: Change, expected: str
) -> None:
    change(export / name, damage)
    proof = proof_of(export, reference)
    assert proof.departure == expected
    # What departs besides is of the same file, or of what that file makes of it.
    allowed = {name, FULL}
    assert {departure.partition(":")[0] for departure in departures(proof)} <= allowed


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        (HEAD, scaled("attention", 1.001), "head.onnx: attention"),
        (HEAD, scaled("fg", 1.001), "head.onnx: fg"),
        (HEAD, scaled("logits", 1.001), "head.onnx: logits"),
        (FULL, inverted("mask"), "full.onnx: cut"),
        (FULL, of_first_row("attention"), "full.onnx: parts"),
    ],
)
def test_what_is_float32_in_every_precision_is_held_to_it(
    write: "Write",
    tmp_path: Path,
    reference: Reference,
    precision: Precision,
    name: str,
    damage: Change,
    expected: str,
) -> None:
    export = shutil.copytree(write(precision), tmp_path / "export")
    change(export / name, damage)
    assert proof_of(export, reference, precision).departure == expected


def test_parts_that_are_wrong_alike_depart_at_the_classes(
    export: Path, reference: Reference
) -> None:
    for name in (HEAD, FULL):
        change(export / name, scaled("embedding", 1.001))
    assert departures(proof_of(export, reference)) == ["full.onnx: classes"]


def test_another_fusion_departs_at_the_classes(tiny_export: Path, reference: Reference) -> None:
    assert departures(proof_of(tiny_export, reference, cls_share=0.4)) == ["full.onnx: classes"]


def test_a_graph_that_ignores_the_class_matrix_departs(
    export: Path, reference: Reference, classifier: NDArray[np.float32]
) -> None:
    change(export / FULL, fixed_classes)
    proof = prove(
        export,
        reference,
        NCutSpec(),
        "fp32",
        limits=LIMITS["fp32"],
        serving=Serving(classifier[[2, 0, 1]], 0.5),
        pixels=INTACT,
        names=PHOTOS.names,
        source="",
    )
    assert departures(proof) == ["full.onnx: classes"]


def test_edges_are_counted(export: Path, reference: Reference) -> None:
    assert stage_of(proof_of(export, reference), "backbone.onnx: edges").difference == 0
    change(export / BACKBONE, scaled("patches", 0.2))
    assert stage_of(proof_of(export, reference), "backbone.onnx: edges").difference > 1e-3


def test_a_batch_taken_for_its_first_image_is_right_alone(
    export: Path, reference: Reference
) -> None:
    change(export / FULL, of_first_row("logits"))
    batches = proof_of(export, reference).batches
    assert batches[1] < 5e-5
    assert min(difference for size, difference in batches.items() if size > 1) > 0.1


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_what_is_no_number_departs_in_every_precision(
    export: Path, reference: Reference, precision: Precision
) -> None:
    # PyTorch's first class is also what the largest of nothing but NaN is.
    always_first = reference._replace(logits=reference.logits - np.array([0, 99, 99], np.float32))
    change(export / FULL, weight("backbone.position", lambda array: array * np.float32(np.nan)))
    proof = proof_of(export, always_first, precision, logits=None)
    assert stage_of(proof, "full.onnx: logits").departs
    assert stage_of(proof, "full.onnx: parts").departs


def test_evidence_of_what_is_no_number_is_json(export: Path, reference: Reference) -> None:
    change(export / FULL, weight("classifier", unknown))
    proof = proof_of(export, reference)
    for content in (proof.model_dump(), proof.model_dump(mode="json")):
        stored = json.loads(json.dumps(content, allow_nan=False))
        assert stored["departure"] == "full.onnx: logits"
        differences = {each["stage"]: each["difference"] for each in stored["stages"][8:]}
        assert differences["logits"] is None
        assert differences["fg"] < 1e-5


def test_a_stage_departs_above_its_limit_only() -> None:
    def departs(difference: float, limit: float | None) -> bool:
        return Stage(graph="g", stage="s", difference=difference, limit=limit).departs

    assert not departs(0.5, 0.5)
    assert departs(0.5000001, 0.5)
    assert not departs(1e9, None)
    assert departs(float("nan"), 0.5)
    assert departs(float("nan"), None)
    assert departs(float("inf"), 0.5)


def test_another_class_is_counted_and_listed(export: Path, reference: Reference) -> None:
    change(export / FULL, weight("classifier", lambda rows: rows[[1, 0, 2]]))
    proof = proof_of(export, reference, "int8")
    assert departures(proof) == ["full.onnx: parts", "full.onnx: top1"]
    assert proof.stages[-1].difference == 1
    assert proof.agreement == 0
    assert len(proof.flips) == ANSWERS
    assert {flip.image for flip in proof.flips} == set(PHOTOS.names)
    for flip in proof.flips:
        logits = reference.logits[flip.row]
        assert flip.image == PHOTOS.names[flip.row]
        assert (flip.torch, flip.onnx) == (logits.argmax(), 1 - logits.argmax())
        assert flip.margin == pytest.approx(logits[flip.torch] - logits[flip.onnx])
        assert not flip.other_mask
    assert {flip.batch for flip in proof.flips} == {*range(1, 10), 24}


@pytest.mark.parametrize(("margin", "counts"), [(8e-5, False), (3e-4, True)])
def test_ties_do_not_count(
    tiny_export: Path, reference: Reference, margin: float, counts: bool
) -> None:
    logits = reference.logits.copy()
    second, best = np.argsort(logits[5])[1:]
    logits[5, second] = logits[5, best] + margin
    # Whatever the user allows of logits, a tie is what rounding in float32 can turn.
    proof = proof_of(tiny_export, reference._replace(logits=logits), logits=99)
    assert {flip.row for flip in proof.flips} == {5}
    assert (stage_of(proof, "full.onnx: top1").difference > 0) == counts


def with_another_mask(export: Path, reference: Reference, image: int) -> Reference:
    """Return the answers of a PyTorch that draws one mask otherwise."""
    mask = reference.mask.copy()
    mask[image, 3] ^= True
    head = OnnxGraph(export / HEAD)
    names = ("attention", "fg", "embedding", "logits")
    feeds = {"cls": reference.cls, "patches": reference.patches, "mask": mask}
    made = dict(zip(names, head.run(names, feeds), strict=True))
    return reference._replace(mask=mask, **made)


def test_a_determined_mask_must_be_the_same(tiny_export: Path, reference: Reference) -> None:
    other = with_another_mask(tiny_export, reference, 6)
    proof = proof_of(tiny_export, other)
    assert departures(proof)[0] == proof.departure == "full.onnx: mask"
    assert stage_of(proof, "full.onnx: mask").difference == pytest.approx(1 / 24)
    assert proof.other_masks == (PHOTOS.names[6],)
    assert proof.undetermined == ()


def test_an_undetermined_mask_is_left_out_and_listed(
    tiny_export: Path, reference: Reference
) -> None:
    other = with_another_mask(tiny_export, reference, 6)
    proof = proof_of(tiny_export, other._replace(determined=np.arange(24) != 6))
    assert proof.departure is None
    assert proof.other_masks == proof.undetermined == (PHOTOS.names[6],)


@pytest.mark.parametrize("determined", [True, False])
def test_a_class_that_an_undetermined_mask_decides_does_not_count(
    tiny_export: Path, reference: Reference, determined: bool
) -> None:
    other = with_another_mask(tiny_export, reference, 6)
    logits = other.logits.copy()
    logits[6] = logits[6][[1, 0, 2]]
    posed = (np.arange(24) != 6) | determined
    proof = proof_of(tiny_export, other._replace(logits=logits, determined=posed), mask=1)
    # head.onnx was asked with the other mask, and is right to call that another class.
    assert departures(proof) == ["head.onnx: logits", *["full.onnx: top1"] * determined]
    assert {flip.image for flip in proof.flips} == {PHOTOS.names[6]}
    assert all(flip.other_mask for flip in proof.flips)


def test_a_similarity_near_tau_leaves_the_mask_undetermined(
    tiny_export: Path, reference: Reference
) -> None:
    nearest = similarities(reference.patches[4:5], NCutSpec())[0]
    tau = float(np.sort(nearest, axis=None)[100])
    proof = proof_of(tiny_export, reference, spec=NCutSpec(tau=tau))
    assert proof.undetermined == (PHOTOS.names[4],)
    halves = proof_of(tiny_export, reference, "fp16", spec=NCutSpec(tau=tau))
    assert halves.undetermined == ()  # reduced precision is held against all well-posed masks


def test_the_limit_on_logits_grows_with_them(write: "Write", reference: Reference) -> None:
    largest = float(np.abs(reference.logits).max())
    assert largest > 20
    ours = stage_of(proof_of(write("fp16"), reference, "fp16"), "full.onnx: logits")
    assert ours.limit == pytest.approx(1e-3 * largest)
    own = proof_of(write("fp16"), reference, "fp16", logits=0.5)
    assert stage_of(own, "full.onnx: logits").limit == 0.5
    assert stage_of(own, "head.onnx: logits").limit == 5e-5


def test_wrong_pixels_are_the_first_departure(tiny_export: Path, reference: Reference) -> None:
    wrong = INTACT.model_copy(update={"difference": 0.1})
    assert proof_of(tiny_export, reference, pixels=wrong).departure == "preprocess: pixels"
