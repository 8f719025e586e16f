"""The proof of engines asks every size of every profile, and names the first stage that is wrong.

In the place of TensorRT the graphs themselves answer, on the CPU; then some damage is done.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from microclip_deploy import artifact
from microclip_deploy.export.proof.answers import open_graph
from microclip_deploy.export.proof.limits import LIMITS, Limits
from microclip_deploy.export.proof.parity import Proof
from microclip_deploy.export.proof.probes import Reference, made_up_photos
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
from microclip_deploy.serving.exported import (
    BACKBONE,
    FULL,
    HEAD,
    PROBES,
    SCHEMA,
    Export,
    GraphSpec,
    Precision,
    TensorSpec,
    read_export,
)
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
SMALL = BuildOptions(batch=Span(least=2, opt=4, most=6))
LARGEST = 6
BUCKETS = (1, 2, 4, 6)
TYPES: Mapping[Precision, str] = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16"}
"""As the inspector names them."""

Array = NDArray[Any]


class Run(NamedTuple):
    """One run of an engine or of the session, for damage to be done to it."""

    profile: int
    size: int
    outputs: dict[str, Array]


Damage = Callable[[Run], None]
When = Callable[[Run], bool]


def intact(_run: Run) -> None:
    """Do no damage."""


def always(_run: Run) -> bool:
    return True


def in_batches(run: Run) -> bool:
    return run.size > 1


def of_profile(number: int) -> When:
    return lambda run: run.profile == number


def of_size(size: int) -> When:
    return lambda run: run.size == size


def padded(run: Run) -> bool:
    """Say whether a session has to fill a bucket up."""
    return run.size < LARGEST and run.size not in BUCKETS


def split(run: Run) -> bool:
    return run.size > LARGEST


def changed(*names: str, by: Callable[[Array], Array], when: When = always) -> Damage:
    """Return what changes some outputs; all of them if none is named."""

    def damage(run: Run) -> None:
        if when(run):
            for name in names or tuple(run.outputs):
                run.outputs[name] = by(run.outputs[name].copy())

    return damage


def exchanged(rows: Array) -> Array:
    return rows[::-1]


def of_first_row(rows: Array) -> Array:
    return np.repeat(rows[:1], len(rows), axis=0)


def of_nobody(rows: Array) -> Array:
    rows[:] = 0
    return rows


def last_as_first(rows: Array) -> Array:
    rows[-1] = rows[0]
    return rows


def wrapped(rows: Array) -> Array:
    """Answer what does not fit into the largest bucket with the first answers."""
    return rows[np.arange(len(rows)) % LARGEST]


def unknown(rows: Array) -> Array:
    return rows * np.nan if rows.dtype == np.float32 else rows


def enlarged(rows: Array) -> Array:
    larger: Array = rows * np.float32(1.001)
    return larger


def higher(rows: Array) -> Array:
    return rows + np.float32(1)


def of_other_classes(rows: Array) -> Array:
    return np.roll(rows, 1, axis=1)


def inverted(rows: Array) -> Array:
    return ~rows


def one_token_off(rows: Array) -> Array:
    rows[0, 3] ^= True
    return rows


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
            told = dict(zip(outputs, self.graph.run(outputs, feeds), strict=True))
            self.damage(Run(profile, size, told))
            for name, output in told.items():
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
        told = super().predict(images)._asdict()
        self.damage(Run(-1, len(images), told))
        self.asked.append(len(images))
        return Prediction(**told)


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


@pytest.fixture(scope="module")
def open_rig() -> Iterator[Callable[[Path], Rig]]:
    """Return a function that loads an export."""
    with ExitStack() as stack:

        def opened(directory: Path) -> Rig:
            export = read_export(directory)
            precision = export.manifest.precision
            graphs = {
                name: stack.enter_context(open_graph(directory / name, precision, "cpu"))
                for name in (BACKBONE, FULL)
            }
            images = Reference.read(directory / PROBES).images
            return Rig(export, graphs, engine_parity.onnx_reference(export, images))

        yield opened


@pytest.fixture(scope="module")
def rig(tiny_export: Path, open_rig: Callable[[Path], Rig]) -> Rig:
    return open_rig(tiny_export)


def layers(*kinds: str, tactic: str = "sm90_gemm", version: int = 11) -> dict[str, Any]:
    """Return what the inspector tells of a plan: a layer a type, and those that every plan has."""

    def tensor(name: str, kind: str) -> dict[str, Any]:
        told: dict[str, Any] = {"Name": name, "Location": "Device", "Dimensions": [8, 32]}
        if version == 10:
            return {**told, "Format/Datatype": kind}
        return {**told, "DataType": kind, "Format": "Row major linear"}

    listed = [("UInt8", "Float"), *((kind, kind) for kind in kinds), ("Float", "Bool")]
    return {
        "Layers": [
            {
                "Name": f"layer {number}",
                "LayerType": "gemm",
                "Inputs": [tensor(f"tensor {number}", read)],
                "Outputs": [tensor(f"tensor {number + 1}", written)],
                "TacticName": tactic,
            }
            for number, (read, written) in enumerate(listed)
        ],
        "Bindings": ["image", "logits"],
    }


def manifest_of(export: Export, options: BuildOptions = SMALL) -> EngineManifest:
    return EngineManifest(
        target=TARGET,
        precision=export.manifest.precision,
        options=options,
        classes=Span(least=2, opt=3, most=4096),
        plans={
            plan: PlanSpec(
                graph=graph,
                graph_sha256=export.stored["files"][graph]["sha256"],
                tensors=export.manifest.graphs[graph],
            )
            for graph, plan in PLAN_OF.items()
        },
    )


def prove(
    rig: Rig,
    *,
    damage: Mapping[str, Damage] | None = None,
    full_plan: type[Plan] = Plan,
    told: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    options: BuildOptions = SMALL,
) -> Proven:
    """Prove engines of a rig, with damage to the plans and the session; layers may be others."""
    manifest, stream = manifest_of(rig.export, options), Stream()
    damages: dict[str, Damage] = dict.fromkeys((BACKBONE_PLAN, FULL_PLAN, KERNELS), intact)
    damages |= damage or {}
    kinds: dict[str, type[Plan]] = {BACKBONE_PLAN: Plan, FULL_PLAN: full_plan}
    plans = {
        plan: kinds[plan](rig.graphs[graph], stream, damages[plan])
        for graph, plan in PLAN_OF.items()
    }
    session = WatchedSession(rig.graphs[FULL], rig.export, damages[KERNELS])
    kind = layers(TYPES[manifest.precision])
    subject = engine_parity.Subject(
        manifest, plans, session, {**dict.fromkeys(plans, kind), **(told or {})}, stream
    )
    proof = engine_parity.prove_engines(
        rig.export,
        subject,
        rig.reference,
        limits or LIMITS[manifest.precision],
        PHOTOS.names,
        PHOTOS.source,
    )
    return Proven(proof, plans, session)


def departures(proof: Proof) -> list[str]:
    return [f"{stage.graph}: {stage.stage}" for stage in proof.stages if stage.departs]


def assert_close(found: Reference, expected: Reference, limits: Limits) -> None:
    """Hold answers to the limits of a proof."""
    assert limits.patches is not None
    scale = float(np.abs(expected.patches).max())
    allowed = {
        "cls": limits.cls,
        "patches": limits.patches * scale,
        "attention": limits.attention,
        "fg": limits.fg,
        "embedding": limits.fg,
        "logits": limits.scaled(float(np.abs(expected.logits).max())).logits,
    }
    for name, atol in allowed.items():
        assert atol is not None, f"a limit on {name}"
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=name)
    for name in ("images", "mask", "complete", "determined"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)


def test_onnx_runtime_answers_as_pytorch_did(rig: Rig, tiny_export: Path) -> None:
    assert_close(rig.reference, Reference.read(tiny_export / PROBES), LIMITS["fp32"])


@pytest.mark.parametrize("count", [1, 8, 11])
def test_answers_stand_in_the_order_of_the_images(rig: Rig, tiny_export: Path, count: int) -> None:
    stored = Reference.read(tiny_export / PROBES)
    found = engine_parity.onnx_reference(rig.export, stored.images[::-1][:count])
    assert_close(found, Reference._make(part[::-1][:count] for part in stored), LIMITS["fp32"])


def test_intact_engines_are_proven(rig: Rig) -> None:
    proof = prove(rig).proof
    assert departures(proof) == []
    assert proof.departure is None
    assert (proof.agreement, proof.flips, proof.undetermined, proof.other_masks) == (1, (), (), ())
    assert (proof.precision, proof.reference) == ("fp32", "ONNX Runtime")
    assert (proof.images, proof.source) == (COUNT, PHOTOS.source)
    assert proof.device == str(TARGET)
    assert list(proof.batches) == [1, 2, 3, 4, 5, 6, 7]


def test_stages_stand_in_the_order_of_computation(rig: Rig) -> None:
    answers = ["cls", "mask", "attention", "fg", "logits", "top1"]
    assert [f"{stage.graph}: {stage.stage}" for stage in prove(rig).proof.stages] == [
        *(f"{BACKBONE_PLAN}: {stage}" for stage in ("precision", "cls", "patches", "edges")),
        *(f"{KERNELS}: {stage}" for stage in answers),
        *(f"{FULL_PLAN}: {stage}" for stage in ("precision", *answers, "classes")),
    ]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_intact_engines_in_half_precision_are_proven(
    tiny_export: Path,
    tmp_path: Path,
    write: "Write",
    open_rig: Callable[[Path], Rig],
    precision: Precision,
) -> None:
    directory = shutil.copytree(tiny_export, tmp_path / "export")
    stored = artifact.read_manifest(directory, SCHEMA)
    shutil.copytree(write(precision), directory, dirs_exist_ok=True)
    artifact.rewrite_manifest(directory, {**stored, "precision": precision}, [BACKBONE, FULL, HEAD])
    rig = open_rig(directory)
    assert prove(rig).proof.departure is None
    in_float32 = {BACKBONE_PLAN: layers("Float")}
    assert prove(rig, told=in_float32).proof.departure == "backbone.plan: precision"
    broken = {BACKBONE_PLAN: changed("cls", by=exchanged, when=in_batches)}
    assert prove(rig, damage=broken).proof.departure == "backbone.plan: cls"


@pytest.mark.parametrize("plan", [BACKBONE_PLAN, FULL_PLAN])
def test_a_plan_is_asked_every_size_of_every_profile(rig: Rig, plan: str) -> None:
    asked = prove(rig).plans[plan].asked
    assert set(asked) == {(0, 1), (1, 2), (1, 4), (1, 6)}
    alone = prove(rig, options=BuildOptions(batch=Span(least=1, opt=1, most=1))).plans[plan].asked
    assert set(alone) == {(0, 1)}


def test_a_session_is_asked_every_bucket_and_sizes_to_pad_and_to_split(rig: Rig) -> None:
    assert prove(rig).session.asked == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        ((1, 1, 1), (1, 2)),
        ((1, 8, 64), (1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 65)),
        ((4, 8, 24), (1, 3, 4, 7, 8, 15, 16, 23, 24, 25)),
    ],
)
def test_sizes_for_the_session_are_those_of_its_buckets(
    rig: Rig, batch: tuple[int, int, int], sizes: tuple[int, ...]
) -> None:
    manifest = manifest_of(rig.export, options_of(batch))
    found = engine_parity.session_sizes(manifest)
    assert found == sizes
    assert any(size > manifest.buckets()[-1] for size in found)


def options_of(batch: tuple[int, int, int]) -> BuildOptions:
    least, opt, most = batch
    return BuildOptions(batch=Span(least=least, opt=opt, most=most))


BATCHES = [(1, 1, 1), (1, 8, 64), (4, 8, 24), (2, 2, 2), (10, 12, 16), (7, 8, 9), (32, 48, 64)]


@pytest.mark.parametrize("images", [5, COUNT, 88])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch_holds_different_images_and_fits_its_profile(
    rig: Rig, batch: tuple[int, int, int], images: int
) -> None:
    options = options_of(batch)
    found = list(engine_parity.jobs(manifest_of(rig.export, options), images))
    for job in found:
        assert len(job.rows) in options.batches()[job.profile]
        assert len(set(job.rows.tolist())) == min(len(job.rows), images)
        assert set(job.rows.tolist()) <= set(range(images))
    asked = {(job.profile, len(job.rows)) for job in found}
    for profile, span in enumerate(options.batches()):
        assert {(profile, size) for size in (span.least, span.opt, span.most)} <= asked
    assert set(np.concatenate([job.rows for job in found]).tolist()) == set(range(images))


def test_neighbouring_batches_begin_with_different_images(rig: Rig) -> None:
    found = list(engine_parity.jobs(manifest_of(rig.export), COUNT))[:4]
    assert all(one.rows[0] != other.rows[0] for one, other in pairwise(found))


@pytest.mark.parametrize("batch", [(1, 1, 1), (10, 12, 16), (32, 48, 64), (1, 8, 64)])
def test_engines_are_proven_whatever_their_batches(rig: Rig, batch: tuple[int, int, int]) -> None:
    options = options_of(batch)
    assert prove(rig, options=options).proof.departure is None
    wrong = {BACKBONE_PLAN: changed("patches", by=enlarged)}
    proof = prove(rig, damage=wrong, options=options).proof
    assert proof.departure == "backbone.plan: patches"


@pytest.mark.parametrize(
    ("damage", "stage"),
    [
        (changed("cls", by=enlarged), "cls"),
        (changed("cls", by=enlarged, when=in_batches), "cls"),
        (changed("cls", by=enlarged, when=of_profile(0)), "cls"),
        (changed("cls", by=enlarged, when=of_profile(1)), "cls"),
        (changed("cls", by=last_as_first, when=of_size(4)), "cls"),
        (changed("cls", by=of_nobody), "cls"),
        (changed("cls", by=unknown), "cls"),
        (changed(by=exchanged, when=in_batches), "cls"),
        (changed(by=of_first_row, when=in_batches), "cls"),
        (changed(by=unknown), "cls"),
        (changed("patches", by=enlarged), "patches"),
        (changed("patches", by=enlarged, when=of_profile(0)), "patches"),
        (changed("patches", by=enlarged, when=of_size(2)), "patches"),
        (changed("patches", by=exchanged, when=in_batches), "patches"),
        (changed("patches", by=of_first_row, when=in_batches), "patches"),
        (changed("patches", by=of_nobody), "patches"),
        (changed("patches", by=unknown, when=of_profile(1)), "patches"),
    ],
)
def test_a_wrong_backbone_departs(rig: Rig, damage: Damage, stage: str) -> None:
    found = departures(prove(rig, damage={BACKBONE_PLAN: damage}).proof)
    assert found[0] == f"backbone.plan: {stage}"
    assert all(departure.startswith("backbone.plan: ") for departure in found)


@pytest.mark.parametrize(
    ("damage", "stage"),
    [
        (changed("mask", by=inverted), "mask"),
        (changed("mask", by=inverted, when=of_profile(0)), "mask"),
        (changed("mask", by=inverted, when=of_profile(1)), "mask"),
        (changed("mask", by=one_token_off, when=of_size(4)), "mask"),
        (changed("complete", by=inverted, when=of_profile(0)), "mask"),
        (changed("mask", by=exchanged, when=in_batches), "mask"),
        (changed("mask", by=of_first_row, when=of_size(2)), "mask"),
        (changed(by=exchanged, when=in_batches), "cls"),
        (changed(by=of_first_row, when=in_batches), "cls"),
        (changed("cls", by=enlarged), "cls"),
        (changed("cls", by=last_as_first, when=of_size(4)), "cls"),
        (changed(by=unknown), "cls"),
        (changed("attention", by=exchanged, when=in_batches), "attention"),
        (changed("attention", by=of_nobody), "attention"),
        (changed("fg", by=exchanged, when=of_size(2)), "fg"),
        (changed("fg", by=unknown, when=of_profile(0)), "fg"),
        (changed("logits", by=higher), "logits"),
        (changed("logits", by=higher, when=in_batches), "logits"),
        (changed("logits", by=higher, when=of_profile(0)), "logits"),
        (changed("logits", by=exchanged, when=of_size(4)), "logits"),
        (changed("logits", by=unknown), "logits"),
        (changed("logits", by=of_other_classes), "logits"),
        (changed("embedding", by=enlarged), "classes"),
        (changed("embedding", by=enlarged, when=of_profile(0)), "classes"),
        (changed("embedding", by=exchanged, when=of_size(4)), "classes"),
    ],
)
def test_a_wrong_full_plan_departs(rig: Rig, damage: Damage, stage: str) -> None:
    found = departures(prove(rig, damage={FULL_PLAN: damage}).proof)
    assert found[0] == f"full.plan: {stage}"
    assert all(departure.startswith("full.plan: ") for departure in found)


def test_a_plan_with_constant_classes_departs(rig: Rig) -> None:
    found = departures(prove(rig, full_plan=PlanOfConstantClasses).proof)
    assert found == ["full.plan: classes"]


@pytest.mark.parametrize(
    ("damage", "stage"),
    [
        (changed(by=last_as_first, when=padded), "cls"),
        (changed(by=wrapped, when=split), "cls"),
        (changed("mask", by=last_as_first, when=padded), "mask"),
        (changed("mask", by=wrapped, when=split), "mask"),
        (changed("mask", by=inverted), "mask"),
        (changed("complete", by=inverted), "mask"),
        (changed("mask", by=one_token_off, when=of_size(1)), "mask"),
        (changed("cls", by=last_as_first, when=padded), "cls"),
        (changed("cls", by=of_first_row), "cls"),
        (changed(by=unknown), "cls"),
        (changed("attention", by=of_first_row), "attention"),
        (changed("fg", by=exchanged, when=split), "fg"),
        (changed("logits", by=last_as_first, when=padded), "logits"),
        (changed("logits", by=wrapped, when=split), "logits"),
        (changed("logits", by=of_other_classes, when=of_size(6)), "logits"),
        (changed("logits", by=unknown, when=split), "logits"),
    ],
)
def test_a_wrong_session_departs(rig: Rig, damage: Damage, stage: str) -> None:
    found = departures(prove(rig, damage={KERNELS: damage}).proof)
    assert found[0] == f"{KERNELS}: {stage}"
    assert all(departure.startswith(f"{KERNELS}: ") for departure in found)


def test_the_first_of_several_departures_is_named(rig: Rig) -> None:
    wrong = changed("logits", by=higher)
    proof = prove(rig, damage={FULL_PLAN: wrong, KERNELS: wrong}).proof
    assert departures(proof)[0] == proof.departure == f"{KERNELS}: logits"
    assert "full.plan: logits" in departures(proof)


@pytest.mark.parametrize("graph", [KERNELS, FULL_PLAN])
def test_other_classes_depart_where_logits_have_no_limit(rig: Rig, graph: str) -> None:
    swapped = changed("logits", by=of_other_classes)
    proof = prove(rig, damage={graph: swapped}, limits=LIMITS["bf16"]).proof
    assert departures(proof)[0] == f"{graph}: top1"
    assert {flip.image for flip in proof.flips} == set(PHOTOS.names)
    assert proof.agreement < 1
    assert all(flip.onnx == (flip.torch + 1) % 3 for flip in proof.flips)


@pytest.mark.parametrize("graph", [KERNELS, FULL_PLAN])
@pytest.mark.parametrize("name", ["cls", "attention", "fg", "logits"])
def test_what_is_no_number_departs_without_a_limit(rig: Rig, graph: str, name: str) -> None:
    nowhere = changed(name, by=unknown, when=of_size(4))
    proof = prove(rig, damage={graph: nowhere}, limits=LIMITS["bf16"]).proof
    assert proof.departure == f"{graph}: {name}"


def test_limits_of_the_users_decide(rig: Rig) -> None:
    damage = {FULL_PLAN: changed("logits", by=lambda rows: rows + np.float32(0.01))}
    assert prove(rig, damage=damage).proof.departure == "full.plan: logits"
    # The sum of class products is float32 in every precision: no limit of the user's moves that.
    loose = LIMITS["fp32"].changed(0.02, None)
    assert departures(prove(rig, damage=damage, limits=loose).proof) == ["full.plan: classes"]


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
        (("Half",), {"fp16"}),
        (("FP16",), {"fp16"}),
        (("Float", "Half"), {"fp16"}),
        (("BFloat16",), {"bf16"}),
        (("BF16",), {"bf16"}),
        (("Float", "BF16"), {"bf16"}),
        (("Half", "BF16"), set()),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_layers_have_the_precision_of_the_graph_or_depart(
    precision: Precision, kinds: tuple[str, ...], proven: set[str], version: int
) -> None:
    stage = engine_parity.precision_stage(FULL_PLAN, layers(*kinds, version=version), precision)
    assert (stage.graph, stage.stage) == (FULL_PLAN, "precision")
    assert stage.departs == (precision not in proven)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Row major linear FP16 format", "fp16"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Row major linear BF16 format", "bf16"),
        ("Row major linear FP32", "fp32"),
        ("N/A due to dynamic shapes", None),
        ("Row major Int8 format", None),
    ],
)
def test_types_are_read_out_of_layouts(text: str, kind: str | None) -> None:
    found = engine_parity.layer_types({"Layers": [{"Inputs": [{"Format/Datatype": text}]}]})
    assert found == ({kind: 1} if kind else {})


def test_inputs_and_outputs_of_all_layers_count() -> None:
    assert engine_parity.layer_types(layers("Half", "Half")) == {"fp16": 4, "fp32": 2}


@pytest.mark.parametrize(("tactic", "departs"), [("ampere_tf32_gemm", True), ("ffma_gemm", False)])
def test_kernels_that_round_to_tf32_depart_in_float32(tactic: str, departs: bool) -> None:
    told = layers("Float", tactic=tactic)
    assert engine_parity.precision_stage(FULL_PLAN, told, "fp32").departs == departs


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


def test_buffers_have_the_shapes_and_types_of_the_plan() -> None:
    tensors = GraphSpec(
        inputs=(
            TensorSpec(name="image", dtype="uint8", shape=("batch", 8, 8, 3)),
            TensorSpec(name="classifier", dtype="float32", shape=("classes", 5)),
        ),
        outputs=(
            TensorSpec(name="logits", dtype="float32", shape=("batch", "classes")),
            TensorSpec(name="complete", dtype="bool", shape=("batch",)),
        ),
    )
    plan = PlanSpec(graph=FULL, graph_sha256="", tensors=tensors)
    found = engine_parity.buffers(plan, 4, 7)
    assert {name: (buffer.dtype.name, buffer.shape) for name, buffer in found.items()} == {
        "image": ("uint8", (4, 8, 8, 3)),
        "classifier": ("float32", (7, 5)),
        "logits": ("float32", (4, 7)),
        "complete": ("bool", (4,)),
    }
