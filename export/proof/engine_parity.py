"""The proof of engines: every plan, and the session that serves one, against ONNX Runtime.

ONNX Runtime runs the very graphs the plans were built from, which are proven against PyTorch. A
plan is asked at the least, the best and the largest batch of each of its profiles, with different
images in a batch; the session also at sizes that it pads and splits. Stages stand in the order in
which the model computes them, and depart as those of ONNX graphs do; the first stage of a plan is
the precision that its layers really have.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from microclip_deploy.export.proof.answers import Answers, open_graph, rotating
from microclip_deploy.export.proof.judge import Judge, Proof, Stage
from microclip_deploy.export.proof.limits import Tolerance
from microclip_deploy.export.proof.probes import Array, Photos, Reference
from microclip_deploy.ncut.steps import adjacency, determined
from microclip_deploy.serving.engines import BACKBONE_PLAN, FULL_PLAN, EngineManifest, PlanSpec
from microclip_deploy.serving.exported import BACKBONE, FULL, Export, Precision
from microclip_deploy.serving.session import Session

if TYPE_CHECKING:
    from microclip_deploy.serving.tensorrt_engine import Engine

KERNELS = "backbone.plan + CUDA kernels"
"""Name of the session in the proof."""


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
    served: "Engine"
    """The session's own."""
    layers: Mapping[str, Any]
    """What the inspector tells, by file name."""
    stream: cupy.cuda.Stream
    """Of the plans and the session."""


def onnx_reference(export: Export, images: NDArray[np.uint8]) -> Reference:
    """Let ONNX Runtime answer on the CPU.

    Raises:
        CheckpointError: a graph cannot be run.
    """
    precision, spec = export.manifest.precision, export.manifest.ncut_spec()
    with (
        open_graph(export.directory / BACKBONE, precision, "cpu") as backbone,
        open_graph(export.directory / FULL, precision, "cpu") as full,
    ):

        def answer(batch: NDArray[np.uint8]) -> Reference:
            tokens = ["patches", *["agreement"] * spec.asks_cls]
            patches, *agreement = backbone.run(tokens, {"image": batch})
            wanted = ("cls", "mask", "attention", "fg", "embedding", "logits", "complete")
            feeds: dict[str, Array] = {"image": batch, "classifier": export.classifier}
            outputs = dict(zip(wanted, full.run(wanted, feeds), strict=True))
            decided = determined(adjacency(patches, spec), spec, *agreement)
            return Reference(images=batch, patches=patches, determined=decided, **outputs)

        return Reference.by_batch(answer, images)


def prove_engines(
    export: Export, subject: Subject, reference: Reference, photos: Photos, tolerance: Tolerance
) -> Proof:
    """Compare plans and session with ONNX Runtime's answers.

    Args:
        export: whose graphs were built.
        subject: on a device.
        reference: images, and what ONNX Runtime answers to them.
        photos: where the images come from.
        tolerance: what departs.

    Raises:
        CheckpointError: a plan refuses a batch that its profiles take.
        EnvironmentProblem: the device fails, or is out of memory.
    """
    precision, images, matrix = subject.manifest.precision, reference.images, export.classifier
    other = np.concatenate([matrix[1:], matrix[:2]])
    backbone = _ask(subject, BACKBONE_PLAN, images, matrix)
    by_session, by_plan = _ask_session(subject, images), _ask(subject, FULL_PLAN, images, matrix)
    served = _ask(subject, FULL_PLAN, images, other)
    spec = export.manifest.ncut_spec()
    allowed = tolerance.between_graphs()
    judge = Judge(reference, photos, backbone, spec=spec, precision=precision, tolerance=allowed)
    kernels, full = judge.verdict(by_session), judge.verdict(by_plan)
    stages = (
        precision_stage(BACKBONE_PLAN, subject.layers[BACKBONE_PLAN], precision),
        *judge.backbone,
        judge.distance(by_session, "cls"),
        *(kernels.mask, *kernels.distances, kernels.top1),
        precision_stage(FULL_PLAN, subject.layers[FULL_PLAN], precision),
        judge.distance(by_plan, "cls"),
        *(full.mask, *full.distances, full.top1),
        judge.classes(served, other, export.manifest.cls_share),
    )
    device = str(subject.manifest.target)
    return judge.proof(stages, [kernels, full], device=device, reference="ONNX Runtime")


def precision_stage(plan: str, layers: Any, precision: Precision) -> Stage:
    """Say whether a plan's layers have the precision of its graph: 0, or 1 where they do not.

    An encoder in half precision must have layers in it, whatever TensorRT fused, and none in the
    other half precision; one in float32 must have neither, and no kernel that rounds to TF32. One
    in int8-static has int8, and attends in fp16.
    """
    types = layer_types(layers)
    quantised, halves = precision == "int8-static", {"fp16", "bf16"}
    wanted = {"fp16"} if quantised else {precision} & halves
    wrong = types & halves != wanted or (quantised and "int8" not in types)
    # A plan whose layers tell nothing proves nothing.
    wrong |= not types or (not wanted and "tf32" in json.dumps(layers).lower())
    return Stage(graph=plan, stage="precision", difference=float(wrong), limit=0)


def layer_types(layers: Any) -> set[str]:
    """Return the types of what a plan's layers read and write: fp32, fp16, bf16, int8.

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
    kinds = (_type_of(tensor) for tensor in tensors if isinstance(tensor, dict))
    return {kind for kind in kinds if kind is not None}


def _type_of(tensor: Mapping[str, Any]) -> str | None:
    text = str(tensor.get("DataType") or tensor.get("Datatype") or tensor.get("Format/Datatype"))
    text = text.lower()
    if "bf16" in text or "bfloat16" in text:  # which also says "float"
        return "bf16"
    if "half" in text or "fp16" in text:
        return "fp16"
    if "int8" in text and "uint8" not in text:
        return "int8"
    return "fp32" if "float" in text or "fp32" in text else None


def jobs(manifest: EngineManifest, images: int) -> Iterator[Job]:
    """Yield batches of each profile's sizes, and in the end every image; rows rotate."""
    spans = manifest.options.batches()
    asked = [
        (profile, size)
        for profile, span in enumerate(spans)
        for size in sorted({span.least, span.opt, span.most})
    ]
    size = min(spans[-1].most, max(spans[-1].least, images))
    asked += [(manifest.profile_of(size), size)] * math.ceil(images / size)
    profiles, sizes = zip(*asked, strict=True)
    return map(Job, profiles, rotating(sizes, images))


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


def _ask(subject: Subject, plan: str, images: Array, classifier: Array) -> Answers:
    """Give a plan every job."""
    batches = list(jobs(subject.manifest, len(images)))
    spec, engine = subject.manifest.plans[plan], subject.plans[plan]
    outputs = []
    with cupy.cuda.Device(subject.stream.device_id), subject.stream:
        for job in batches:
            tensors = buffers(spec, len(job.rows), len(classifier))
            tensors["image"].set(images[job.rows])
            if "classifier" in tensors:
                tensors["classifier"].set(np.ascontiguousarray(classifier))
            engine.bind(job.profile, tensors)()
            outputs.append({each.name: tensors[each.name].get() for each in spec.tensors.outputs})
    return Answers.of(plan, [job.rows for job in batches], outputs)


def _ask_session(subject: Subject, images: Array) -> Answers:
    batches = list(rotating(session_sizes(subject.manifest), len(images)))
    outputs = [subject.session.predict(images[rows])._asdict() for rows in batches]
    return Answers.of(KERNELS, batches, outputs)
