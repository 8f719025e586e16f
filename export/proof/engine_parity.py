"""The proof of engines: every plan, and the session that serves one, against ONNX Runtime.

ONNX Runtime runs the very graphs the plans were built from, which are proven against PyTorch. A
plan is asked at the least, the best and the largest batch of each of its profiles, with different
images in a batch; the session also at sizes that it pads and splits. Stages stand in the order in
which the model computes them, and depart as those of ONNX graphs do; the first stage of a plan is
the precision that its layers really have.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from microclip_deploy.export.proof.answers import Answers, Array, open_graph
from microclip_deploy.export.proof.limits import LIMITS, Limits
from microclip_deploy.export.proof.parity import (
    COMPARED,
    Proof,
    Serving,
    Stage,
    by_batch_size,
    changed_edges,
    classes_stage,
    count_flips,
    determined_masks,
    distance,
    list_flips,
    share,
    share_of,
)
from microclip_deploy.export.proof.probes import Reference
from microclip_deploy.ncut.steps import adjacency, determined
from microclip_deploy.serving.engines import BACKBONE_PLAN, FULL_PLAN, EngineManifest, PlanSpec
from microclip_deploy.serving.exported import BACKBONE, FULL, Export, Precision
from microclip_deploy.serving.session import Prediction, Session

if TYPE_CHECKING:
    from microclip_deploy.serving.tensorrt_engine import Engine

KERNELS = "backbone.plan + CUDA kernels"
"""Name of the session in the proof."""

_ANSWERS = ("cls", "mask", "attention", "fg", "embedding", "logits", "complete")
_BATCH = 8


class Job(NamedTuple):
    """One batch for a plan."""

    profile: int
    rows: Array
    """Which images."""


class Subject(NamedTuple):
    """What is proven."""

    manifest: EngineManifest
    plans: Mapping[str, "Engine"]
    """By file name."""
    session: Session
    """Over the backbone plan."""
    layers: Mapping[str, Any]
    """What the inspector tells, by file name."""
    stream: cupy.cuda.Stream
    """Of the plans and the session."""


def onnx_reference(export: Export, images: NDArray[np.uint8]) -> Reference:
    """Let ONNX Runtime answer on the CPU, a few images at a time.

    Raises:
        CheckpointError: a graph cannot be run.
    """
    precision, spec = export.manifest.precision, export.manifest.ncut_spec()
    parts: list[tuple[Array, ...]] = []
    with (
        open_graph(export.directory / BACKBONE, precision, "cpu") as backbone,
        open_graph(export.directory / FULL, precision, "cpu") as full,
    ):
        for start in range(0, len(images), _BATCH):
            image = images[start : start + _BATCH]
            (patches,) = backbone.run(["patches"], {"image": image})
            feeds: dict[str, Array] = {"image": image, "classifier": export.classifier}
            told = dict(zip(_ANSWERS, full.run(_ANSWERS, feeds), strict=True))
            decided = determined(adjacency(patches, spec), spec)
            named = {**told, "patches": patches, "determined": decided}
            parts.append(tuple(named[field] for field in Reference._fields[1:]))
    return Reference(images, *(np.concatenate(column) for column in zip(*parts, strict=True)))


def prove_engines(
    export: Export,
    subject: Subject,
    reference: Reference,
    limits: Limits,
    names: Sequence[str],
    source: str,
) -> Proof:
    """Compare plans and session with ONNX Runtime's answers.

    Args:
        export: whose graphs were built.
        subject: on a device.
        reference: images, and what ONNX Runtime answers to them.
        limits: what departs.
        names: one an image, for lists.
        source: which images they are.

    Raises:
        CheckpointError: a plan refuses a batch that its profiles take.
        EnvironmentProblem: the device fails, or is out of memory.
    """
    manifest, spec = subject.manifest, export.manifest.ncut_spec()
    largest = float(np.abs(reference.logits).max())
    limits, exact = limits.scaled(largest), LIMITS["fp32"].scaled(largest)
    own = LIMITS[manifest.precision].scaled(largest)
    backbone = _ask(subject, BACKBONE_PLAN, reference, export.classifier)
    full = _ask(subject, FULL_PLAN, reference, export.classifier)
    kernels = _ask_session(subject.session, manifest, reference.images)
    other = np.concatenate([export.classifier[1:], export.classifier[:2]])
    served = _ask(subject, FULL_PLAN, reference, other)
    tokens = _by_image(backbone)
    certain = determined_masks(tokens, reference, spec, manifest.precision)
    judged = [_Judged.of(each, reference, limits, own, certain, names) for each in (kernels, full)]
    stages = (
        precision_stage(BACKBONE_PLAN, subject.layers[BACKBONE_PLAN], manifest.precision),
        distance(backbone, "cls", reference, limits.cls),
        distance(backbone, "patches", reference, limits.patches, relative=True),
        share(BACKBONE_PLAN, "edges", changed_edges(tokens, reference, spec), None),
        *judged[0].stages,
        precision_stage(FULL_PLAN, subject.layers[FULL_PLAN], manifest.precision),
        *judged[1].stages,
        classes_stage(served, Serving(other, export.manifest.cls_share), exact),
    )
    departed = next((stage for stage in stages if stage.departs), None)
    flips = [flip for each in judged for flip in each.flips]
    masks = sorted({row for each in judged for row in each.other_masks})
    return Proof(
        precision=manifest.precision,
        device=str(manifest.target),
        reference="ONNX Runtime",
        source=source,
        images=len(reference.images),
        stages=stages,
        departure=f"{departed.graph}: {departed.stage}" if departed else None,
        agreement=1 - len(flips) / (len(kernels.rows) + len(full.rows)),
        flips=tuple(flips),
        batches=judged[0].batches,
        undetermined=tuple(names[i] for i in np.flatnonzero(~certain).tolist()),
        other_masks=tuple(names[i] for i in masks),
    )


def precision_stage(plan: str, layers: Any, precision: Precision) -> Stage:
    """Say whether a plan's layers have the precision of its graph: 0, or 1 where they do not.

    An encoder in half precision must have layers in it, whatever TensorRT fused, and none in the
    other half precision; one in float32 must have neither, and no kernel that rounds to TF32.
    """
    found = layer_types(layers)
    halves = {"fp16", "bf16"}
    wanted = {precision} & halves
    wrong = {kind for kind in halves if found[kind]} != wanted
    # A plan whose layers tell nothing proves nothing.
    wrong |= not found.total() or (not wanted and "tf32" in json.dumps(layers).lower())
    return Stage(graph=plan, stage="precision", difference=float(wrong), limit=0)


def layer_types(layers: Any) -> Counter[str]:
    """Count the inputs and outputs of a plan's layers by type: fp32, fp16, bf16.

    Args:
        layers: JSON of TensorRT's inspector, in detailed verbosity. TensorRT 10 has types and
            layouts in one text, 11 apart.
    """
    listed = (layers.get("Layers") or ()) if isinstance(layers, dict) else ()
    tensors = (
        tensor
        for layer in listed
        if isinstance(layer, dict)
        for tensor in (*(layer.get("Inputs") or ()), *(layer.get("Outputs") or ()))
    )
    told = (_type_of(tensor) for tensor in tensors if isinstance(tensor, dict))
    return Counter(kind for kind in told if kind is not None)


def _type_of(tensor: Mapping[str, Any]) -> str | None:
    text = str(tensor.get("DataType") or tensor.get("Datatype") or tensor.get("Format/Datatype"))
    text = text.lower()
    if "bf16" in text or "bfloat16" in text:  # which also says "float"
        return "bf16"
    if "half" in text or "fp16" in text:
        return "fp16"
    return "fp32" if "float" in text or "fp32" in text else None


def jobs(manifest: EngineManifest, images: int) -> Iterator[Job]:
    """Yield batches of each profile's sizes, and in the end every image; rows rotate."""
    start = 0
    spans = manifest.options.batches()
    for profile, span in enumerate(spans):
        for size in sorted({span.least, span.opt, span.most}):
            yield Job(profile, (start + np.arange(size)) % images)
            start += size
    size = min(spans[-1].most, max(spans[-1].least, images))
    for start in range(0, images, size):
        yield Job(manifest.profile_of(size), (start + np.arange(size)) % images)


def session_sizes(manifest: EngineManifest) -> tuple[int, ...]:
    """Return batch sizes for the session: every bucket, some to pad, and one to split."""
    buckets = manifest.buckets()
    padded = (bucket - 1 for bucket in buckets if bucket > 2)
    return tuple(sorted({*buckets, *padded, buckets[-1] + 1}))


def buffers(plan: PlanSpec, batch: int, classes: int) -> dict[str, cupy.ndarray]:
    """Allocate every input and output of a plan."""
    sizes = {"batch": batch, "classes": classes}
    return {
        tensor.name: cupy.zeros(
            tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape),
            tensor.dtype,
        )
        for tensor in (*plan.tensors.inputs, *plan.tensors.outputs)
    }


class _Judged(NamedTuple):
    """The stages of answers that go from images to logits."""

    stages: tuple[Stage, ...]
    flips: list[Any]
    other_masks: list[int]
    batches: dict[int, float]

    @classmethod
    def of(
        cls,
        answers: Answers,
        reference: Reference,
        limits: Limits,
        own: Limits,
        certain: Array,
        names: Sequence[str],
    ) -> "_Judged":
        other = (answers.outputs["mask"] != reference.mask[answers.rows]).any(axis=1)
        other_cut = other | (answers.outputs["complete"] != reference.complete[answers.rows])
        images = np.unique(answers.rows[other_cut])
        same = answers.where(~other | ~np.isfinite(answers.outputs["logits"]).all(axis=1))
        flips = list_flips(answers, reference, other, names)
        counted = count_flips(flips, own, certain)
        stages = (
            distance(answers, "cls", reference, limits.cls),
            share(answers.graph, "mask", share_of(images, certain), limits.mask),
            *(distance(same, name, reference, getattr(limits, name)) for name in COMPARED),
            share(answers.graph, "top1", counted / len(answers.rows), limits.top1),
        )
        return cls(stages, flips, images.tolist(), by_batch_size(same, reference))


def _ask(subject: Subject, plan: str, reference: Reference, classifier: Array) -> Answers:
    """Give a plan every job."""
    todo = list(jobs(subject.manifest, len(reference.images)))
    spec, engine = subject.manifest.plans[plan], subject.plans[plan]
    found = []
    with cupy.cuda.Device(subject.stream.device_id), subject.stream:
        for job in todo:
            tensors = buffers(spec, len(job.rows), len(classifier))
            tensors["image"].set(reference.images[job.rows])
            if "classifier" in tensors:
                tensors["classifier"].set(np.ascontiguousarray(classifier))
            engine.bind(job.profile, tensors)()
            found.append({each.name: tensors[each.name].get() for each in spec.tensors.outputs})
    outputs = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return _answers(plan, [job.rows for job in todo], outputs)


def _ask_session(session: Session, manifest: EngineManifest, images: Array) -> Answers:
    start, rows, found = 0, [], []
    for size in session_sizes(manifest):
        rows.append((start + np.arange(size)) % len(images))
        found.append(session.predict(images[rows[-1]]))
        start += size
    joined = Prediction(*(np.concatenate(field) for field in zip(*found, strict=True)))
    return _answers(KERNELS, rows, joined._asdict())


def _answers(graph: str, rows: Sequence[Array], outputs: dict[str, Array]) -> Answers:
    sizes = np.concatenate([np.full(len(batch), len(batch)) for batch in rows])
    return Answers(graph, np.concatenate(rows), sizes, outputs)


def _by_image(backbone: Answers) -> Array:
    """Return the tokens of each image, from the last answer to it."""
    _, newest = np.unique(backbone.rows[::-1], return_index=True)
    tokens: Array = backbone.outputs["patches"][::-1][newest]
    return tokens
