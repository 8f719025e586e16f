"""The proof: PyTorch against every written graph, stage by stage, at many batch sizes.

Stages stand in the order in which the model computes them. A stage departs when it is further from
PyTorch than its limit; the first that departs is where to look. `head.onnx` is fed with PyTorch's
tokens and masks, so it answers for itself alone, and is float32 in every precision.

`full.onnx` is held against PyTorch, and against its parts: its mask against the exact cut of the
tokens that `backbone.onnx` gives, everything else against what `head.onnx` makes of those tokens
and that mask. So nothing of it goes unchecked where a mask differs from PyTorch's.

A mask is compared where it is determined, and in float32 against PyTorch only where no similarity
is so near tau that the rounding seen could move it. What is left out is counted and listed.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, PlainSerializer

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.export.proof.answers import Answers, Array, Asked, Progress, ask
from microclip_deploy.export.proof.limits import LIMITS, NEAR_TAU, OTHER_CUT, PARTS, Limits
from microclip_deploy.export.proof.probes import Reference
from microclip_deploy.head import LOGIT_SCALE
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import adjacency, determined, saliency_exact, similarities
from microclip_deploy.serving.exported import BACKBONE, FULL, Precision

Measured = Annotated[float, PlainSerializer(lambda x: x if math.isfinite(x) else None)]
"""What is no number is null in JSON."""


COMPARED = ("attention", "fg", "logits")
"""Of the head and of the full graph, against PyTorch."""


def _silent(done: int, total: int) -> None:
    """Show no progress."""


class Stage(BaseModel):
    """One comparison."""

    model_config = ConfigDict(frozen=True)

    graph: str
    stage: str
    difference: Measured
    """In the unit that `Limits` gives."""
    relative: Measured | None = None
    """Largest difference as a share of the reference's largest value; None for shares."""
    cosine: Measured | None = None
    """Least cosine of a row with the reference's; None where there are no rows."""
    limit: float | None

    @property
    def departs(self) -> bool:
        """Say whether the limit is exceeded; what is no number always departs."""
        limit = math.inf if self.limit is None else self.limit
        return not self.difference <= limit


class Flip(BaseModel):
    """An image that gets another class."""

    model_config = ConfigDict(frozen=True)

    image: str
    row: int
    """Position among the images."""
    batch: int
    """Images in the batch."""
    torch: int
    """Index of PyTorch's class."""
    onnx: int
    margin: float
    """By how much PyTorch prefers its class to the other one, logits."""
    other_mask: bool


class Proof(BaseModel):
    """All comparisons of an export; parity.json."""

    model_config = ConfigDict(frozen=True)

    precision: Precision
    device: str
    reference: str = "PyTorch"
    """Whose answers the others are held against."""
    source: str
    """Which images."""
    images: int
    stages: tuple[Stage, ...]
    """In the order of computation."""
    departure: str | None
    """The first stage that departs, or None: the export is proven."""
    agreement: float
    """Share of answers with PyTorch's class, over all batches."""
    flips: tuple[Flip, ...]
    batches: dict[int, Measured]
    """Largest difference of logits by batch size, where the masks are the same."""
    undetermined: tuple[str, ...]
    """Images whose mask rounding may change; their masks are not held against a graph."""
    other_masks: tuple[str, ...]
    """Images that got another mask, undetermined ones among them."""


class Serving(NamedTuple):
    """What decides beside the graphs."""

    classifier: NDArray[np.float32]
    """(C', E): a class matrix to give to the full graph; not necessarily the one inside it."""
    cls_share: float


def prove(
    directory: Path,
    reference: Reference,
    spec: NCutSpec,
    precision: Precision,
    *,
    limits: Limits,
    serving: Serving,
    pixels: Stage,
    names: Sequence[str],
    source: str,
    device: str = "cpu",
    progress: Progress = _silent,
) -> Proof:
    """Compare the three graphs in a directory with PyTorch's answers and with one another.

    Args:
        directory: where the graphs are.
        reference: images and answers.
        spec: constants of the cut.
        precision: of the graphs.
        limits: what departs.
        serving: a class matrix from outside, and how tokens are fused.
        pixels: the stage before the graphs, from `compare_pixels`.
        names: one an image, for lists.
        source: which images they are.
        device: as for `OnnxGraph`.
        progress: called with (done, total) batches.

    Raises:
        CheckpointError: a graph cannot be run, or answers in other shapes than PyTorch.
        EnvironmentProblem: the device is missing or out of memory.
    """
    asked = ask(directory, reference, precision, device, serving.classifier, progress)
    largest = float(np.abs(reference.logits).max())
    full, exact = asked.full, LIMITS["fp32"].scaled(largest)
    tokens = of_all(asked.backbone)
    determined = determined_masks(tokens, reference, spec, precision)
    other_mask = (full.outputs["mask"] != reference.mask[full.rows]).any(axis=1)
    with_other_mask = np.unique(full.rows[other_mask])
    flips = list_flips(full, reference, other_mask, names)
    counted = count_flips(flips, LIMITS[precision].scaled(largest), determined)
    # Where the logits are no numbers the mask says nothing: these answers are never left out.
    same = full.where(~other_mask | ~np.isfinite(full.outputs["logits"]).all(axis=1))
    limits = limits.scaled(largest)
    stages = (
        pixels,
        distance(asked.backbone, "cls", reference, limits.cls),
        distance(asked.backbone, "patches", reference, limits.patches, relative=True),
        share(BACKBONE, "edges", changed_edges(tokens, reference, spec), None),
        *(distance(asked.head, name, reference, getattr(exact, name)) for name in COMPARED),
        share(FULL, "cut", _other_cuts(full, asked.backbone, spec), OTHER_CUT),
        share(FULL, "mask", share_of(with_other_mask, determined), limits.mask),
        *(distance(same, name, reference, getattr(limits, name)) for name in COMPARED),
        _parts_stage(asked, exact),
        classes_stage(asked.served, serving, exact),
        share(FULL, "top1", counted / len(full.rows), limits.top1),
    )
    departed = next((stage for stage in stages if stage.departs), None)
    return Proof(
        precision=precision,
        device=device,
        source=source,
        images=len(reference.images),
        batches=by_batch_size(same, reference),
        stages=stages,
        undetermined=tuple(names[i] for i in np.flatnonzero(~determined).tolist()),
        other_masks=tuple(names[i] for i in with_other_mask.tolist()),
        agreement=1 - len(flips) / len(full.rows),
        flips=tuple(flips),
        departure=f"{departed.graph}: {departed.stage}" if departed else None,
    )


def compare_pixels(
    photos: Iterable[Image.Image], views: NDArray[np.uint8], preprocess: Preprocess
) -> Stage:
    """Compare test views with what Pillow, and torchvision if installed, make of the photos here.

    Returns:
        The largest difference where white is 1; the limit is one of 255 levels.
    """
    makers: list[Callable[[Image.Image], NDArray[np.uint8]]] = [preprocess.test_view]
    if importlib.util.find_spec("torchvision"):
        makers.append(_torchvision_view(preprocess))
    largest = max(
        int(np.abs(make(photo).astype(int) - view).max())
        for photo, view in zip(photos, views, strict=True)
        for make in makers
    )
    return Stage(graph="preprocess", stage="pixels", difference=largest / 255, limit=1 / 255)


def _torchvision_view(preprocess: Preprocess) -> Callable[[Image.Image], NDArray[np.uint8]]:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    size = preprocess.size
    transform = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])
    return lambda photo: np.asarray(transform(photo))


def of_all(backbone: Answers) -> Array:
    """Return the tokens of the last batch, which holds every image, in the images' order."""
    count = int(backbone.sizes[-1])
    return backbone.outputs["patches"][-count:][np.argsort(backbone.rows[-count:])]


def changed_edges(tokens: Array, reference: Reference, spec: NCutSpec) -> float:
    """Return the share of token pairs that are joined in one graph and not in PyTorch's."""
    changed = adjacency(tokens, spec) != adjacency(reference.patches, spec)
    return float(changed.mean())


def determined_masks(
    tokens: Array, reference: Reference, spec: NCutSpec, precision: Precision
) -> Array:
    """Return which images' masks must be PyTorch's, bool (P,)."""
    if precision != "fp32":
        return reference.determined
    expected = similarities(reference.patches, spec)
    rounding = np.abs(similarities(tokens, spec) - expected).max(axis=(1, 2))
    nearest = np.abs(expected - spec.tau).min(axis=(1, 2))
    certain: Array = reference.determined & (nearest > NEAR_TAU * rounding)
    return certain


def _other_cuts(full: Answers, backbone: Answers, spec: NCutSpec) -> float:
    """Return the share of answers whose mask is not the exact cut of the backbone's tokens.

    Graphs whose mask is not determined do not count.
    """
    tokens = backbone.outputs["patches"]
    edges = adjacency(tokens, spec)
    expected = saliency_exact(tokens, spec)
    other = (full.outputs["mask"] != expected.mask).any(axis=1)
    other |= full.outputs["complete"] != expected.complete
    counted = determined(edges, spec)
    return float(other[counted].sum() / max(counted.sum(), 1))


def _parts_stage(asked: Asked, exact: Limits) -> Stage:
    """Compare what the full graph says with what its parts say to the same batches."""
    assert exact.logits is not None, "fp32 has a limit on logits"
    made = {**asked.parts.outputs, "cls": asked.backbone.outputs["cls"]}
    largest = max(
        float(np.abs(asked.full.outputs[name] - output).max()) for name, output in made.items()
    )
    limit = PARTS * exact.logits
    return Stage(graph=FULL, stage="parts", difference=largest, limit=limit)


def classes_stage(served: Answers, serving: Serving, exact: Limits) -> Stage:
    """Compare the logits of a class matrix from outside with its products, and the embedding."""
    cls, fg = (served.outputs[name].astype(np.float64) for name in ("cls", "fg"))
    fused = serving.cls_share * cls + (1 - serving.cls_share) * fg
    unit = fused / np.linalg.norm(fused, axis=1, keepdims=True)
    logits = LOGIT_SCALE * fused @ serving.classifier.T.astype(np.float64)
    largest = max(
        float(np.abs(served.outputs["logits"] - logits).max()),
        float(np.abs(served.outputs["embedding"] - unit).max()),
    )
    return Stage(graph=served.graph, stage="classes", difference=largest, limit=exact.logits)


def distance(
    answers: Answers,
    name: str,
    reference: Reference,
    limit: float | None,
    *,
    relative: bool = False,
) -> Stage:
    """Compare an output with the reference's; `relative` limits the relative difference."""
    found, expected = answers.outputs[name], getattr(reference, name)[answers.rows]
    largest = float(np.abs(found - expected).max(initial=0))
    part = largest / float(np.abs(expected).max(initial=1e-30))
    return Stage(
        graph=answers.graph,
        stage=name,
        difference=part if relative else largest,
        relative=part,
        cosine=_least_cosine(found, expected),
        limit=limit,
    )


def _least_cosine(found: Array, expected: Array) -> float:
    """Return the least cosine of rows (..., D); NaN where a row is no number."""
    one, other = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of rows that are no numbers
        norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        cosines = (one * other).sum(axis=-1) / np.maximum(norms, 1e-30)
    return float(cosines.min(initial=1))


def share(graph: str, name: str, found: float, limit: float | None) -> Stage:
    """Return the stage of a share, which is its own difference."""
    return Stage(graph=graph, stage=name, difference=found, limit=limit)


def share_of(images: Array, determined: Array) -> float:
    """Return how many of the determined images (P,) are among the listed ones."""
    return float(determined[images].sum() / max(determined.sum(), 1))


def list_flips(
    full: Answers, reference: Reference, other_mask: Array, names: Sequence[str]
) -> list[Flip]:
    """List the answers with another class than PyTorch's."""
    expected = reference.logits[full.rows]
    ours, theirs = full.outputs["logits"].argmax(axis=1), expected.argmax(axis=1)
    return [
        Flip(
            image=names[full.rows[i]],
            row=int(full.rows[i]),
            batch=int(full.sizes[i]),
            torch=int(theirs[i]),
            onnx=int(ours[i]),
            margin=float(expected[i, theirs[i]] - expected[i, ours[i]]),
            other_mask=bool(other_mask[i]),
        )
        for i in np.flatnonzero(ours != theirs)
    ]


def count_flips(flips: Sequence[Flip], own: Limits, determined: Array) -> int:
    """Count the flips that are neither a tie nor due to a mask that rounding may change."""
    tie = 0.0 if own.logits is None else 2 * own.logits
    excused = (f.margin <= tie or (f.other_mask and not determined[f.row]) for f in flips)
    return len(flips) - sum(excused)


def by_batch_size(full: Answers, reference: Reference) -> dict[int, float]:
    """Return the largest difference of logits for each batch size."""
    difference = np.abs(full.outputs["logits"] - reference.logits[full.rows]).max(axis=1)
    return {
        int(size): float(difference[full.sizes == size].max()) for size in np.unique(full.sizes)
    }
