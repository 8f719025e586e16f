"""The proof names exactly the stage that is damaged, and lets nothing but rounding pass."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from microclip_deploy import artifact
from microclip_deploy.export.proof.answers import Graphs
from microclip_deploy.export.proof.judge import Proof, Stage
from microclip_deploy.export.proof.limits import MARGIN, ROUNDOFF, TokenErrors, Tolerance
from microclip_deploy.export.proof.parity import prove
from microclip_deploy.export.proof.probes import Reference, made_up_photos
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import similarities
from microclip_deploy.serving.exported import BACKBONE, FULL, HEAD, Precision, read_export
from microclip_deploy.serving.onnx_graph import OnnxGraph
from tests.export.damage import (
    Change,
    change,
    inverted,
    noisy,
    of_first_row,
    scaled,
    unknown,
    weight,
)

if TYPE_CHECKING:
    from tests.export.conftest import Write

PHOTOS = made_up_photos(32)
INTACT = Stage(graph="preprocess", stage="pixels", difference=0, limit=1 / 255)
OTHER_CLASSES = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 7)))[0].T.astype(np.float32)
STAGES = [
    "preprocess: pixels",
    *(f"backbone.onnx: {stage}" for stage in ("cls", "patches", "edges")),
    *(f"head.onnx: {stage}" for stage in ("attention", "fg", "logits")),
    *(f"full.onnx: {stage}" for stage in ("cut", "mask", "attention", "fg", "logits")),
    *(f"full.onnx: {stage}" for stage in ("parts", "classes", "top1")),
]
REDUCED: tuple[Precision, ...] = ("fp16", "bf16", "int8", "int8-static")


def proof_of(
    directory: Path,
    reference: Reference,
    precision: Precision = "fp32",
    *,
    spec: NCutSpec | None = None,
    pixels: Stage = INTACT,
    classifier: NDArray[np.float32] = OTHER_CLASSES,
    cls_share: float = 0.5,
    atol: float | None = None,
) -> Proof:
    """Prove an export; the limit on logits may be another than the precision's."""
    return prove(
        Graphs(directory, precision, spec or NCutSpec(), classifier, cls_share),
        reference,
        PHOTOS,
        tolerance=tolerance_of(directory).changed(atol, None),
        pixels=pixels,
    )


def tolerance_of(directory: Path) -> Tolerance:
    """Return what an export stores, though its files may be damaged."""
    return Tolerance.model_validate(artifact.read_json(directory / artifact.MANIFEST)["tolerance"])


def departures(proof: Proof) -> list[str]:
    return [str(stage) for stage in proof.stages if stage.departs]


def stage_of(proof: Proof, name: str) -> Stage:
    return proof.stages[STAGES.index(name)]


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
    assert [str(stage) for stage in proof.stages] == STAGES
    assert proof.departure is None
    assert departures(proof) == []
    assert (proof.agreement, proof.flips, proof.undetermined, proof.other_masks) == (1, (), (), ())
    assert list(proof.batches) == [*range(1, 10), 24]
    assert 0 < max(proof.batches.values()) < 5e-5
    assert stage_of(proof, "backbone.onnx: edges").difference == 0
    patches = stage_of(proof, "backbone.onnx: patches")
    assert patches.difference == patches.relative


@pytest.mark.parametrize("precision", REDUCED)
def test_every_precision_is_proven(
    write: "Write", reference: Reference, precision: Precision
) -> None:
    proof = proof_of(write(precision), reference, precision)
    assert proof.departure is None
    smallest = {"fp16": 1e-5, "bf16": 3e-4, "int8": 3e-4, "int8-static": 3e-4}[precision]
    assert smallest < stage_of(proof, "backbone.onnx: cls").difference < 100 * smallest


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        (BACKBONE, weight("backbone.patch", noisy), "cls"),
        (BACKBONE, weight("backbone.position", noisy), "cls"),
        (BACKBONE, weight("backbone.position", unknown), "cls"),
        (BACKBONE, weight("backbone.projection", noisy), "cls"),
        (BACKBONE, of_first_row("cls"), "cls"),
        (BACKBONE, scaled("patches", 1.001), "patches"),
        (BACKBONE, of_first_row("patches"), "patches"),
        (HEAD, weight("head.match", noisy), "attention"),
        (HEAD, weight("head.match", unknown), "attention"),
        (HEAD, weight("head.project", noisy), "fg"),
        (HEAD, weight("classifier", noisy), "logits"),
        (HEAD, of_first_row("logits"), "logits"),
        (FULL, other_tau, "cut"),
        (FULL, inverted("mask"), "cut"),
        (FULL, inverted("complete"), "cut"),
        (FULL, of_first_row("attention"), "attention"),
        (FULL, weight("head.match", noisy), "attention"),
        (FULL, weight("head.project", noisy), "fg"),
        (FULL, weight("classifier", noisy), "logits"),
        (FULL, weight("classifier", unknown), "logits"),
        (FULL, scaled("cls", 1.001), "parts"),
        (FULL, of_first_row("embedding"), "parts"),
        (FULL, scaled("embedding", np.nan), "parts"),
    ],
)
def test_the_damaged_stage_is_named(
    export: Path, reference: Reference, name: str, damage: Change, expected: str
) -> None:
    change(export / name, damage)
    proof = proof_of(export, reference)
    assert proof.departure == f"{name}: {expected}"
    # What departs besides is of the same file, or of what that file makes of it.
    assert {departure.partition(":")[0] for departure in departures(proof)} <= {name, FULL}


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        (HEAD, scaled("attention", 1.001), "attention"),
        (HEAD, scaled("fg", 1.001), "fg"),
        (HEAD, scaled("logits", 1.001), "logits"),
        (FULL, inverted("mask"), "cut"),
        (FULL, of_first_row("attention"), "parts"),
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
    assert proof_of(export, reference, precision).departure == f"{name}: {expected}"


def test_what_only_other_classes_show_departs_there(export: Path, reference: Reference) -> None:
    classes = ["full.onnx: classes"]
    assert departures(proof_of(export, reference, cls_share=0.4)) == classes
    ignored = shutil.copytree(export, export.with_name("ignored"))
    change(ignored / FULL, fixed_classes)
    rows = read_export(export).classifier[[2, 0, 1]]
    assert departures(proof_of(ignored, reference, classifier=rows)) == classes
    for name in (HEAD, FULL):  # wrong alike, so that the parts agree
        change(export / name, scaled("embedding", 1.001))
    assert departures(proof_of(export, reference)) == classes


def test_changed_edges_are_counted(export: Path, reference: Reference) -> None:
    change(export / BACKBONE, scaled("patches", 0.2))
    assert stage_of(proof_of(export, reference), "backbone.onnx: edges").difference > 1e-3


def test_a_batch_taken_for_its_first_image_is_right_alone(
    export: Path, reference: Reference
) -> None:
    change(export / FULL, of_first_row("logits"))
    proof = proof_of(export, reference)
    assert proof.departure == "full.onnx: logits"
    assert proof.batches[1] < 5e-5
    assert min(difference for size, difference in proof.batches.items() if size > 1) > 0.1


@pytest.mark.parametrize("precision", ["fp32", *REDUCED])
def test_what_is_no_number_departs_in_every_precision(
    export: Path, reference: Reference, precision: Precision
) -> None:
    # PyTorch's first class is also what the largest of nothing but NaN is.
    always_first = reference._replace(logits=reference.logits - np.array([0, 99, 99], np.float32))
    change(export / FULL, weight("backbone.position", lambda array: array * np.float32(np.nan)))
    proof = proof_of(export, always_first, precision, atol=1e9)
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


@pytest.mark.parametrize("part", ["scale", "quantized"])
def test_damaged_scales_and_integers_depart(
    write: "Write", reference: Reference, tmp_path: Path, part: str
) -> None:
    export = shutil.copytree(write("int8-static"), tmp_path / "export")
    damage = {"scale": lambda x: x * np.float32(1.1), "quantized": lambda x: np.clip(x, -64, 64)}
    change(export / BACKBONE, weight(f"backbone.patch_{part}", damage[part]))
    first = departures(proof_of(export, reference, "int8-static"))[0]
    assert first.startswith("backbone.onnx: ")


def test_no_limit_of_static_int8_is_larger_than_its_bound() -> None:
    bad = Tolerance(quantised=TokenErrors(cls=1, patches=1)).limits("int8-static")
    assert (bad.cls, bad.patches, bad.top1) == (0.05, 0.5, 0.1)
    good = Tolerance(quantised=TokenErrors(cls=0.003, patches=0.02)).limits("int8-static")
    assert (good.cls, good.patches) == (0.006, 0.04)


def test_a_stage_departs_above_its_limit_only() -> None:
    def departs(difference: float, limit: float | None) -> bool:
        return Stage(graph="g", stage="s", difference=difference, limit=limit).departs

    assert not departs(0.5, 0.5)
    assert departs(0.5000001, 0.5)
    assert not departs(1e9, None)
    assert departs(float("nan"), None)
    assert departs(float("inf"), 0.5)


def test_another_class_is_counted_and_listed(export: Path, reference: Reference) -> None:
    change(export / FULL, weight("classifier", lambda rows: rows[[1, 0, 2]]))
    proof = proof_of(export, reference, "int8")
    assert departures(proof) == ["full.onnx: parts", "full.onnx: top1"]
    assert proof.stages[-1].difference == 1
    assert proof.agreement == 0
    assert len(proof.flips) == sum(range(1, 10)) + 24
    assert {flip.image for flip in proof.flips} == set(PHOTOS.names)
    for flip in proof.flips:
        logits = reference.logits[flip.row]
        assert flip.image == PHOTOS.names[flip.row]
        assert (flip.torch, flip.onnx) == (logits.argmax(), 1 - logits.argmax())
        assert flip.margin == pytest.approx(logits[flip.torch] - logits[flip.onnx])
        assert not flip.other_mask
    assert {flip.batch for flip in proof.flips} == {*range(1, 10), 24}


@pytest.mark.parametrize(("share", "counts"), [(0.8, False), (1.5, True)])
def test_ties_do_not_count(
    tiny_export: Path, reference: Reference, share: float, counts: bool
) -> None:
    logits = reference.logits.copy()
    second, best = np.argsort(logits[5])[1:]
    tie = tolerance_of(tiny_export).tie("fp32")
    logits[5, second] = logits[5, best] + share * tie
    # Whatever the user allows of logits, a tie is what rounding in float32 can turn.
    proof = proof_of(tiny_export, reference._replace(logits=logits), atol=99)
    assert {flip.row for flip in proof.flips} == {5}
    assert (stage_of(proof, "full.onnx: top1").difference > 0) == counts


@pytest.fixture(scope="module")
def with_another_mask(tiny_export: Path, reference: Reference) -> Reference:
    """Return the answers of a PyTorch that draws the mask of image 6 otherwise."""
    mask = reference.mask.copy()
    mask[6, 3] ^= True
    names = ("attention", "fg", "embedding", "logits")
    feeds = {"cls": reference.cls, "patches": reference.patches, "mask": mask}
    made = OnnxGraph(tiny_export / HEAD).run(names, feeds)
    return reference._replace(mask=mask, **dict(zip(names, made, strict=True)))


def test_a_determined_mask_must_be_the_same(
    tiny_export: Path, with_another_mask: Reference
) -> None:
    proof = proof_of(tiny_export, with_another_mask)
    assert departures(proof)[0] == proof.departure == "full.onnx: mask"
    assert stage_of(proof, "full.onnx: mask").difference == pytest.approx(1 / 24)
    assert proof.other_masks == (PHOTOS.names[6],)
    assert proof.undetermined == ()


def test_an_undetermined_mask_is_left_out_and_listed(
    tiny_export: Path, with_another_mask: Reference
) -> None:
    proof = proof_of(tiny_export, with_another_mask._replace(determined=np.arange(24) != 6))
    assert proof.departure is None
    assert proof.other_masks == proof.undetermined == (PHOTOS.names[6],)


@pytest.mark.parametrize("determined", [True, False])
def test_a_class_that_an_undetermined_mask_decides_does_not_count(
    tiny_export: Path, with_another_mask: Reference, determined: bool
) -> None:
    logits = with_another_mask.logits.copy()
    logits[6] = logits[6][[1, 0, 2]]
    posed = (np.arange(24) != 6) | determined
    other = with_another_mask._replace(logits=logits, determined=posed)
    proof = proof_of(tiny_export, other)
    # head.onnx was asked with the other mask, and is right to call that another class.
    expected = ["head.onnx: logits", *["full.onnx: mask", "full.onnx: top1"] * determined]
    assert departures(proof) == expected
    assert {flip.image for flip in proof.flips} == {PHOTOS.names[6]}
    assert all(flip.other_mask for flip in proof.flips)


def test_a_similarity_near_tau_leaves_the_mask_undetermined(
    tiny_export: Path, reference: Reference
) -> None:
    nearest = similarities(reference.patches[4:5], NCutSpec())[0]
    tau = float(np.nextafter(np.sort(nearest, axis=None)[100], np.float32(1)))
    proof = proof_of(tiny_export, reference, spec=NCutSpec(tau=tau))
    assert proof.undetermined == (PHOTOS.names[4],)


def test_reduced_precision_answers_for_masks_whose_edges_it_does_not_move(
    tiny_export: Path, reference: Reference
) -> None:
    patches = reference.patches.copy()
    patches[4, 3] *= -1
    assert proof_of(tiny_export, reference, "fp16").undetermined == ()
    moved = proof_of(tiny_export, reference._replace(patches=patches), "fp16")
    assert moved.undetermined == (PHOTOS.names[4],)


def test_limits_follow_the_rounding_of_the_model(write: "Write", reference: Reference) -> None:
    error = tolerance_of(write("fp16")).error
    exact = MARGIN * error.total.logits
    ours = proof_of(write("fp16"), reference, "fp16")
    assert stage_of(ours, "head.onnx: logits").limit == exact
    half = ROUNDOFF["fp16"] * error.encoder.logits + exact
    assert stage_of(ours, "full.onnx: logits").limit == half
    own = proof_of(write("fp16"), reference, "fp16", atol=0.5)
    assert stage_of(own, "full.onnx: logits").limit == 0.5
    assert stage_of(own, "head.onnx: logits").limit == exact


def test_wrong_pixels_are_the_first_departure(tiny_export: Path, reference: Reference) -> None:
    wrong = INTACT.model_copy(update={"difference": 0.1})
    assert proof_of(tiny_export, reference, pixels=wrong).departure == "preprocess: pixels"
