"""The proof of engines asks every size of every profile, and names the first stage that is wrong.

In the place of TensorRT the graphs themselves answer, on the CPU; then some damage is done.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from microclip_deploy.export.proof.answers import open_graph
from microclip_deploy.export.proof.judge import Proof
from microclip_deploy.export.proof.limits import ForwardError, StageErrors, Tolerance
from microclip_deploy.export.proof.probes import Reference, made_up_photos
from microclip_deploy.export.proof.verify import stored_tolerance
from microclip_deploy.serving.engines import (
    BACKBONE_PLAN,
    FULL_PLAN,
    PLAN_OF,
    BuildOptions,
    EngineManifest,
    PlanSpec,
    Span,
    Target,
)
from microclip_deploy.serving.exported import FULL, PROBES, Export, Precision, read_export
from microclip_deploy.serving.onnx_graph import OnnxGraph
from microclip_deploy.serving.onnx_session import OnnxSession
from microclip_deploy.serving.session import Prediction

if TYPE_CHECKING:
    from tests.export.conftest import Write

pytest.importorskip("cupy", reason="needs CuPy, though no device: pip install cupy-cuda13x")
engine_parity = pytest.importorskip("microclip_deploy.export.proof.engine_parity")

KERNELS = "backbone.plan + CUDA kernels"
PHOTOS = made_up_photos(32)
COUNT = len(PHOTOS.names)
TARGET = Target(
    tensorrt="11.4.0.106", gpu="NVIDIA H200", compute_capability="9.0", system="Linux x86_64"
)
SMALL = (2, 4, 6)
"""Least, best and largest batch."""
LARGEST = 6
BUCKETS = (1, 2, 4, 6)
TYPES: Mapping[Precision, str] = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16"}
"""As the inspector names them."""

Array = NDArray[Any]


class Run(NamedTuple):
    """One run of an engine or of the session, for damage to be done to it."""

    profile: int
    """-1 of the session."""
    size: int
    outputs: dict[str, Array]


Damage = Callable[[Run], None]

HOW: Mapping[str, Callable[[Array], Array]] = {
    "exchanged": lambda rows: rows[::-1],
    "first everywhere": lambda rows: np.repeat(rows[:1], len(rows), axis=0),
    "last as first": lambda rows: np.concatenate([rows[:-1], rows[:1]]),
    "wrapped": lambda rows: rows[np.arange(len(rows)) % LARGEST],
    "zero": np.zeros_like,
    "unknown": lambda rows: rows * np.nan if rows.dtype == np.float32 else rows,
    "enlarged": lambda rows: rows * np.float32(1.001),
    "higher": lambda rows: rows + np.float32(1),
    "a bit higher": lambda rows: rows + np.float32(0.01),
    "other classes": lambda rows: np.roll(rows, 1, axis=1),
    "inverted": np.logical_not,
    "one token off": lambda rows: rows ^ (np.arange(rows.size).reshape(rows.shape) == 3),
}
"""What may be wrong with the rows of an output."""

WHEN: Mapping[str, Callable[[Run], bool]] = {
    "always": lambda run: True,
    "in batches": lambda run: run.size > 1,
    "padded": lambda run: run.size < LARGEST and run.size not in BUCKETS,
    "split": lambda run: run.size > LARGEST,
    "profile 0": lambda run: run.profile == 0,
    "profile 1": lambda run: run.profile == 1,
    "size 1": lambda run: run.size == 1,
    "size 2": lambda run: run.size == 2,
    "size 4": lambda run: run.size == 4,
    "size 6": lambda run: run.size == 6,
}


def intact(_run: Run) -> None:
    """Do no damage."""


def damage(names: str, how: str, when: str = "always") -> Damage:
    """Return what changes some outputs; "all" changes all of them."""

    def do(run: Run) -> None:
        if WHEN[when](run):
            for name in run.outputs if names == "all" else names.split():
                run.outputs[name] = HOW[how](run.outputs[name])

    return do


class Stream:
    """What plans run on; knows whether it is CuPy's current one."""

    device_id = 3
    is_current = False

    def __enter__(self) -> Self:
        self.is_current = True
        return self

    def __exit__(self, *_: object) -> None:
        self.is_current = False


class Buffer(np.ndarray[Any, np.dtype[Any]]):
    """Memory of a device, which takes what CuPy's takes."""

    def set(self, array: Array) -> None:
        assert (array.dtype, array.shape) == (self.dtype, self.shape)
        assert array.flags.c_contiguous
        self[...] = array

    def get(self) -> Array:
        return np.array(self)


def device(number: int) -> AbstractContextManager[None]:
    assert number == Stream.device_id
    return nullcontext()


@pytest.fixture(autouse=True)
def _device_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(shape: tuple[int, ...], dtype: str) -> Buffer:
        return np.zeros(shape, dtype).view(Buffer)

    stand_in = SimpleNamespace(zeros=zeros, cuda=SimpleNamespace(Device=device))
    monkeypatch.setattr(engine_parity, "cupy", stand_in)


class Plan:
    """What a plan is asked and answers: a graph on the CPU, with the damage."""

    def __init__(self, graph: OnnxGraph, stream: Stream, damage: Damage) -> None:
        self.asked: list[tuple[int, int]] = []
        """Profile and size of each batch."""
        self.graph = graph
        self.stream = stream
        self.damage = damage

    def bind(self, profile: int, buffers: Mapping[str, Buffer]) -> Callable[[], None]:
        inputs, outputs = tuple(self.graph.inputs()), self.graph.outputs()
        assert set(buffers) == {*inputs, *outputs}
        size = len(buffers["image"])

        def enqueue() -> None:
            # Uploads and downloads are in order with the run only on the same stream.
            assert self.stream.is_current
            feeds = self.fed({name: buffers[name].get() for name in inputs})
            run = Run(
                profile, size, dict(zip(outputs, self.graph.run(outputs, feeds), strict=True))
            )
            self.damage(run)
            for name, output in run.outputs.items():
                buffers[name].set(np.ascontiguousarray(output))
            self.asked.append((profile, size))

        return enqueue

    def fed(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Return what the graph gets to see."""
        return feeds


class PlanOfConstantClasses(Plan):
    """Answers for the class matrix that it was given first."""

    first: Array | None = None

    def fed(self, feeds: dict[str, Array]) -> dict[str, Array]:
        given = feeds["classifier"]
        if self.first is None:
            self.first = given
        return {**feeds, "classifier": self.first[np.arange(len(given)) % len(self.first)]}


class WatchedSession(OnnxSession):
    """A session with damage, that remembers the sizes of its batches."""

    def __init__(self, graph: OnnxGraph, export: Export, damage: Damage) -> None:
        super().__init__(graph, export.facts(), export.manifest.cls_share)
        self.asked: list[int] = []
        self.damage = damage

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        run = Run(-1, len(images), super().predict(images)._asdict())
        self.damage(run)
        self.asked.append(len(images))
        return Prediction(**run.outputs)


class Rig(NamedTuple):
    """An export with its graphs loaded, and what ONNX Runtime answers."""

    export: Export
    graphs: Mapping[str, OnnxGraph]
    reference: Reference


class Proven(NamedTuple):
    """A proof, and those that were asked."""

    proof: Proof
    plans: Mapping[str, Plan]
    session: WatchedSession


def rig_of(directory: Path) -> Rig:
    """Load an export."""
    export = read_export(directory)
    graphs = {}
    for name in PLAN_OF:
        with open_graph(directory / name, export.manifest.precision, "cpu") as graph:
            graphs[name] = graph
    images = Reference.read(directory / PROBES).images
    return Rig(export, graphs, engine_parity.onnx_reference(export, images))


@pytest.fixture(scope="module")
def rig(tiny_export: Path) -> Rig:
    return rig_of(tiny_export)


def layers(*kinds: str, tactic: str = "sm90_gemm", version: int = 11) -> dict[str, Any]:
    """Return what the inspector tells of a plan: a layer a type, and those that every plan has."""

    def tensor(kind: str) -> dict[str, Any]:
        place = {"Name": "tensor", "Location": "Device", "Dimensions": [8, 32]}
        if version == 10:
            return {**place, "Format/Datatype": kind}
        return {**place, "DataType": kind, "Format": "Row major linear"}

    listed = [("UInt8", "Float"), *((kind, kind) for kind in kinds), ("Float", "Bool")]
    return {
        "Layers": [
            {"Name": "layer", "Inputs": [tensor(read)], "Outputs": [tensor(written)],
             "TacticName": tactic}
            for read, written in listed
        ],
        "Bindings": ["image", "logits"],
    }  # fmt: skip


def options_of(batch: tuple[int, int, int]) -> BuildOptions:
    return BuildOptions(batch=Span(**dict(zip(Span.model_fields, batch, strict=True))))


def manifest_of(export: Export, batch: tuple[int, int, int] = SMALL) -> EngineManifest:
    plans = {
        plan: PlanSpec(
            graph=graph,
            graph_sha256=export.stored["files"][graph]["sha256"],
            tensors=export.manifest.graphs[graph],
        )
        for graph, plan in PLAN_OF.items()
    }
    classes, precision = Span(least=2, opt=3, most=4096), export.manifest.precision
    return EngineManifest(
        target=TARGET, precision=precision, options=options_of(batch), classes=classes, plans=plans
    )


def prove(
    rig: Rig,
    harm: Mapping[str, Damage] = MappingProxyType({}),
    *,
    full_plan: type[Plan] = Plan,
    told: Mapping[str, Any] | None = None,
    tolerance: Tolerance | None = None,
    batch: tuple[int, int, int] = SMALL,
) -> Proven:
    """Prove engines of a rig, with damage to the plans and the session; layers may be others."""
    manifest, stream = manifest_of(rig.export, batch), Stream()
    kinds: dict[str, type[Plan]] = {BACKBONE_PLAN: Plan, FULL_PLAN: full_plan}
    plans = {
        plan: kinds[plan](rig.graphs[graph], stream, harm.get(plan, intact))
        for graph, plan in PLAN_OF.items()
    }
    session = WatchedSession(rig.graphs[FULL], rig.export, harm.get(KERNELS, intact))
    inspected = {**dict.fromkeys(plans, layers(TYPES[manifest.precision])), **(told or {})}
    subject = engine_parity.Subject(manifest, plans, session, None, inspected, stream)
    tolerance = tolerance or stored_tolerance(rig.export)
    proof = engine_parity.prove_engines(rig.export, subject, rig.reference, PHOTOS, tolerance)
    return Proven(proof, plans, session)


def departures(proof: Proof) -> list[str]:
    return [str(stage) for stage in proof.stages if stage.departs]


@pytest.mark.parametrize("rows", [slice(None), slice(1), slice(10, None, -1)])
def test_onnx_runtime_answers_as_pytorch_did(rig: Rig, reference: Reference, rows: slice) -> None:
    expected = Reference._make(part[rows] for part in reference)
    found = engine_parity.onnx_reference(rig.export, expected.images)
    limits = stored_tolerance(rig.export).exact()
    for name, one in found._asdict().items():
        other, limit = getattr(expected, name), getattr(limits, name, 1e-5)
        largest = np.abs(other).max() if name == "patches" else 1
        atol = 0 if one.dtype == bool else limit * largest
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=name)


def test_intact_engines_are_proven(rig: Rig) -> None:
    proof = prove(rig).proof
    assert departures(proof) == []
    assert proof.departure is None
    assert (proof.agreement, proof.flips, proof.undetermined, proof.other_masks) == (1, (), (), ())
    assert (proof.precision, proof.reference) == ("fp32", "ONNX Runtime")
    assert (proof.images, proof.source) == (COUNT, PHOTOS.source)
    assert proof.device == str(TARGET)
    assert list(proof.batches) == [1, 2, 3, 4, 5, 6, 7]
    answers = ["cls", "mask", "attention", "fg", "logits", "top1"]
    assert [str(stage) for stage in proof.stages] == [
        *(f"{BACKBONE_PLAN}: {stage}" for stage in ("precision", "cls", "patches", "edges")),
        *(f"{KERNELS}: {stage}" for stage in answers),
        *(f"{FULL_PLAN}: {stage}" for stage in ("precision", *answers, "classes")),
    ]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_intact_engines_in_half_precision_are_proven(write: "Write", precision: Precision) -> None:
    rig = rig_of(write(precision))
    assert prove(rig).proof.departure is None
    in_float32 = {BACKBONE_PLAN: layers("Float")}
    assert prove(rig, told=in_float32).proof.departure == "backbone.plan: precision"
    broken = {BACKBONE_PLAN: damage("cls", "exchanged", "in batches")}
    assert prove(rig, broken).proof.departure == "backbone.plan: cls"


def test_every_size_of_every_profile_and_bucket_is_asked(rig: Rig) -> None:
    _, plans, session = prove(rig)
    for plan in plans.values():
        assert set(plan.asked) == {(0, 1), (1, 2), (1, 4), (1, 6)}
    assert session.asked == [1, 2, 3, 4, 5, 6, 7]  # to pad and to split, too
    for plan in prove(rig, batch=(1, 1, 1)).plans.values():
        assert set(plan.asked) == {(0, 1)}


@pytest.mark.parametrize("images", [5, COUNT, 88])
@pytest.mark.parametrize(
    "batch",
    [(1, 1, 1), (1, 8, 64), (4, 8, 24), (2, 2, 2), (10, 12, 16), (7, 8, 9), (32, 48, 64)],
)
def test_every_batch_holds_different_images_and_fits_its_profile(
    rig: Rig, batch: tuple[int, int, int], images: int
) -> None:
    manifest = manifest_of(rig.export, batch)
    spans, jobs = manifest.options.batches(), list(engine_parity.jobs(manifest, images))
    for job in jobs:
        assert len(job.rows) in spans[job.profile]
        assert len(set(job.rows.tolist())) == min(len(job.rows), images)
    asked = {(job.profile, len(job.rows)) for job in jobs}
    for profile, span in enumerate(spans):
        assert {(profile, size) for size in (span.least, span.opt, span.most)} <= asked
    assert set(np.concatenate([job.rows for job in jobs]).tolist()) == set(range(images))
    sizes, buckets = engine_parity.session_sizes(manifest), manifest.buckets()
    padded = {bucket - 1 for bucket in buckets if bucket > 2}
    assert {*buckets, *padded, buckets[-1] + 1} == set(sizes)


@pytest.mark.parametrize("batch", [(1, 1, 1), (10, 12, 16), (32, 48, 64), (1, 8, 64)])
def test_engines_are_proven_whatever_their_batches(rig: Rig, batch: tuple[int, int, int]) -> None:
    assert prove(rig, batch=batch).proof.departure is None
    wrong = {BACKBONE_PLAN: damage("patches", "enlarged")}
    assert prove(rig, wrong, batch=batch).proof.departure == "backbone.plan: patches"


DEPARTURES = {
    BACKBONE_PLAN: [
        ("cls", "cls", "enlarged", ["always", "in batches", "profile 0", "profile 1"]),
        ("cls", "cls", "last as first", ["size 4"]),
        ("cls", "cls", "zero", ["always"]),
        ("cls", "cls", "unknown", ["always"]),
        ("cls", "all", "exchanged", ["in batches"]),
        ("cls", "all", "first everywhere", ["in batches"]),
        ("cls", "all", "unknown", ["always"]),
        ("patches", "patches", "enlarged", ["always", "profile 0", "size 2"]),
        ("patches", "patches", "exchanged", ["in batches"]),
        ("patches", "patches", "first everywhere", ["in batches"]),
        ("patches", "patches", "zero", ["always"]),
        ("patches", "patches", "unknown", ["profile 1"]),
    ],
    FULL_PLAN: [
        ("mask", "mask", "inverted", ["always", "profile 0", "profile 1"]),
        ("mask", "mask", "one token off", ["size 4"]),
        ("mask", "complete", "inverted", ["profile 0"]),
        ("mask", "mask", "exchanged", ["in batches"]),
        ("mask", "mask", "first everywhere", ["size 2"]),
        ("cls", "all", "exchanged", ["in batches"]),
        ("cls", "all", "first everywhere", ["in batches"]),
        ("cls", "all", "unknown", ["always"]),
        ("cls", "cls", "enlarged", ["always"]),
        ("cls", "cls", "last as first", ["size 4"]),
        ("attention", "attention", "exchanged", ["in batches"]),
        ("attention", "attention", "zero", ["always"]),
        ("fg", "fg", "exchanged", ["size 2"]),
        ("fg", "fg", "unknown", ["profile 0"]),
        ("logits", "logits", "higher", ["always", "in batches", "profile 0"]),
        ("logits", "logits", "exchanged", ["size 4"]),
        ("logits", "logits", "unknown", ["always"]),
        ("logits", "logits", "other classes", ["always"]),
        ("classes", "embedding", "enlarged", ["always", "profile 0"]),
        ("classes", "embedding", "exchanged", ["size 4"]),
        ("classes", "embedding", "unknown", ["always"]),
    ],
    KERNELS: [
        ("cls", "all", "last as first", ["padded"]),
        ("cls", "all", "wrapped", ["split"]),
        ("cls", "all", "unknown", ["always"]),
        ("cls", "cls", "last as first", ["padded"]),
        ("cls", "cls", "first everywhere", ["always"]),
        ("mask", "mask", "last as first", ["padded"]),
        ("mask", "mask", "wrapped", ["split"]),
        ("mask", "mask", "inverted", ["always"]),
        ("mask", "complete", "inverted", ["always"]),
        ("mask", "mask", "one token off", ["size 1"]),
        ("attention", "attention", "first everywhere", ["always"]),
        ("fg", "fg", "exchanged", ["split"]),
        ("logits", "logits", "last as first", ["padded"]),
        ("logits", "logits", "wrapped", ["split"]),
        ("logits", "logits", "other classes", ["size 6"]),
        ("logits", "logits", "unknown", ["split"]),
    ],
}
"""By graph: the stage that must depart, the outputs, how they are wrong, and when."""


@pytest.mark.parametrize(
    ("graph", "stage", "names", "how", "when"),
    [
        (graph, *row, when)
        for graph, rows in DEPARTURES.items()
        for *row, moments in rows
        for when in moments
    ],
)
def test_the_damaged_stage_is_named(
    rig: Rig, graph: str, stage: str, names: str, how: str, when: str
) -> None:
    found = departures(prove(rig, {graph: damage(names, how, when)}).proof)
    assert found[0] == f"{graph}: {stage}"
    assert all(departure.startswith(f"{graph}: ") for departure in found)


def test_a_plan_with_constant_classes_departs(rig: Rig) -> None:
    found = departures(prove(rig, full_plan=PlanOfConstantClasses).proof)
    assert found == ["full.plan: classes"]


def test_the_first_of_several_departures_is_named(rig: Rig) -> None:
    wrong = damage("logits", "higher")
    proof = prove(rig, {FULL_PLAN: wrong, KERNELS: wrong}).proof
    assert departures(proof)[0] == proof.departure == f"{KERNELS}: logits"
    assert "full.plan: logits" in departures(proof)


@pytest.mark.parametrize("graph", [KERNELS, FULL_PLAN])
def test_other_classes_depart_whatever_the_limit_on_logits(rig: Rig, graph: str) -> None:
    swapped = damage("logits", "other classes")
    loose = stored_tolerance(rig.export).changed(1e9, None)
    proof = prove(rig, {graph: swapped}, tolerance=loose).proof
    assert departures(proof)[0] == f"{graph}: top1"
    assert {flip.image for flip in proof.flips} == set(PHOTOS.names)
    assert proof.agreement < 1
    assert all(flip.onnx == (flip.torch + 1) % 3 for flip in proof.flips)


@pytest.mark.parametrize("graph", [KERNELS, FULL_PLAN])
@pytest.mark.parametrize("name", ["cls", "attention", "fg", "logits"])
def test_what_is_no_number_departs_whatever_the_limit(rig: Rig, graph: str, name: str) -> None:
    nowhere = damage(name, "unknown", "size 4")
    endless = StageErrors(**dict.fromkeys(StageErrors.model_fields, 1e9))
    loose = Tolerance(error=ForwardError(total=endless, encoder=endless))
    proof = prove(rig, {graph: nowhere}, tolerance=loose).proof
    assert proof.departure == f"{graph}: {name}"


def test_limits_of_the_users_decide(rig: Rig) -> None:
    harm = {FULL_PLAN: damage("logits", "a bit higher")}
    assert prove(rig, harm).proof.departure == "full.plan: logits"
    # The sum of class products is float32 in every precision: no limit of the user's moves that.
    loose = stored_tolerance(rig.export).changed(0.02, None)
    assert departures(prove(rig, harm, tolerance=loose).proof) == ["full.plan: classes"]


@pytest.mark.parametrize("plan", [BACKBONE_PLAN, FULL_PLAN])
def test_layers_in_another_precision_depart(rig: Rig, plan: str) -> None:
    assert departures(prove(rig, told={plan: layers("Half")}).proof) == [f"{plan}: precision"]


@pytest.mark.parametrize("version", [10, 11])
@pytest.mark.parametrize(
    ("kinds", "proven"),
    [
        ((), {"fp32"}),
        (("Float",), {"fp32"}),
        (("FP32", "Int64"), {"fp32"}),
        (("Row major linear FP32",), {"fp32"}),
        (("N/A due to dynamic shapes", "Row major Int8 format"), {"fp32"}),
        (("Half",), {"fp16"}),
        (("FP16",), {"fp16"}),
        (("Channel major FP16 format where channel % 8 == 0",), {"fp16"}),
        (("Float", "Half"), {"fp16"}),
        (("BFloat16",), {"bf16"}),
        (("BF16",), {"bf16"}),
        (("Row major linear BF16 format",), {"bf16"}),
        (("Float", "BF16"), {"bf16"}),
        (("Half", "BF16"), set()),
    ],
    ids=str,
)
def test_layers_have_the_precision_of_the_graph_or_depart(
    kinds: tuple[str, ...], proven: set[str], version: int
) -> None:
    for precision in ("fp32", "fp16", "bf16"):
        told = layers(*kinds, version=version)
        stage = engine_parity.precision_stage(FULL_PLAN, told, precision)
        assert str(stage) == f"{FULL_PLAN}: precision"
        assert stage.departs == (precision not in proven)


def test_engines_in_int8_attend_in_fp16() -> None:
    def departs(*kinds: str) -> bool:
        stage = engine_parity.precision_stage(FULL_PLAN, layers(*kinds), "int8-static")
        return bool(stage.departs)

    assert not departs("Float", "Half", "Int8")
    assert departs("Float", "Half")
    assert departs("Float", "Int8")
    assert departs("BFloat16", "Half", "Int8")
    assert departs("Half", "UInt8")


def test_kernels_that_round_to_tf32_depart_in_float32() -> None:
    told = layers("Float", tactic="ampere_tf32_gemm")
    assert engine_parity.precision_stage(FULL_PLAN, told, "fp32").departs


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "told",
    [
        {},
        [],
        None,
        {"Layers": []},
        {"Layers": None},
        {"Layers": ["gemm 1", "gemm 2"], "Bindings": ["image"]},
        {"Layers": [{"Name": "gemm"}]},
        {"Layers": [{"Name": "gemm", "Inputs": None, "Outputs": None}]},
        {"Layers": [{"Name": "gemm", "Inputs": ["image"], "Outputs": [{"Name": "cls"}]}]},
        {"Layers": [{"Inputs": [{"DataType": None, "Format/Datatype": None}]}]},
    ],
    ids=str,
)
def test_layers_that_tell_no_types_prove_nothing(told: Any, precision: Precision) -> None:
    assert engine_parity.precision_stage(BACKBONE_PLAN, told, precision).departs
