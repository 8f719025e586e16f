"""The judgement: answers held against a reference's, stage by stage; what departs is found out.

A stage departs when it is further from the reference than its limit. A mask is compared where it is
determined: in float32 only where no similarity is so near tau that the rounding seen could move it,
in other precisions where the graph's own tokens join the same edges and choose the same side. What
is left out is counted and listed.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, PlainSerializer

from microclip_deploy.errors import VerificationError, printable
from microclip_deploy.export.proof.answers import Answers
from microclip_deploy.export.proof.limits import NEAR_TAU, Limits, Tolerance
from microclip_deploy.export.proof.probes import Array, Photos, Reference
from microclip_deploy.head import LOGIT_SCALE
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import adjacency, saliency_exact, similarities
from microclip_deploy.serving.exported import FULL, HEAD, Precision

Measured = Annotated[float, PlainSerializer(lambda x: x if math.isfinite(x) else None)]
"""What is no number is null in JSON."""


class Stage(BaseModel, frozen=True):
    """One comparison."""

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

    def __str__(self) -> str:
        return f"{self.graph}: {self.stage}"


class Flip(BaseModel, frozen=True):
    """An image that gets another class."""

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


class Proof(BaseModel, frozen=True):
    """All comparisons of an export; parity.json."""

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
    left_out: Mapping[str, Any] = {}
    """What the search for the user's images left out, as `LeftOut.to_json`."""


def require_proven(proof: Proof, evidence: Path, remedy: str | None = None) -> None:
    """Refuse what departs.

    Args:
        proof: what was found.
        evidence: the file where it is written.
        remedy: for the user; None: what helps against the stage that departs.

    Raises:
        VerificationError: with the first stage that departs and where the evidence is.
    """
    if proof.departure is None:
        return
    stage = next(stage for stage in proof.stages if stage.departs)
    limit, source = stage.limit, proof.reference
    wanted = "a number" if limit is None else f"at most {limit:.3g} from {source}"
    found = f"{stage.difference:.3g}"
    if stage.stage == "precision":
        wanted, found = f"layers in {proof.precision}", "others in TensorRT's inspector"
    raise VerificationError(
        f"{stage}: expected {wanted}, found {found} on {proof.images} images ({proof.precision}, "
        f"{proof.device}); evidence: {printable(evidence)}; {remedy or _remedy(proof, stage)}"
    )


_FLOAT32 = ("cut", "parts", "classes")
"""Stages of the full graph that are float32 in every precision."""


def _remedy(proof: Proof, stage: Stage) -> str:
    """Return what helps, if anything does, against a stage that departs."""
    if stage.stage == "pixels":
        return "use the Pillow and torchvision of the export"
    exact = proof.precision == "fp32" or stage.graph == HEAD or stage.stage in _FLOAT32
    if exact and proof.precision != "fp32":
        return "this is float32 in every --dtype, so the graph is wrong: export again"
    first = "fp32 is the most exact --dtype" if exact else "export with a more exact --dtype"
    if stage.graph == FULL and math.isfinite(stage.difference):
        if stage.stage == "logits":  # rounded to one digit, 1.5 times as much is never less
            return (
                f"{first}; if this is near enough, export with --atol {1.5 * stage.difference:.1g}"
            )
        if stage.stage == "top1":
            share = math.floor(100 * (1 - stage.difference)) / 100
            return f"{first}; if this is enough, export with --min-agreement {share}"
    if exact:
        return f"{first}, so this graph is wrong: export again; if it stays, report the evidence"
    return first


class Verdict(NamedTuple):
    """What was found of answers that lead from images to logits."""

    answers: int
    mask: Stage
    distances: tuple[Stage, ...]
    """Of attention, [FG] and logits, where the masks are the same."""
    top1: Stage
    flips: list[Flip]
    other_masks: set[int]
    """Images that got another mask."""
    batches: dict[int, float]
    """As in `Proof`."""


class Judge:
    """Holds answers against a reference's: says what departs, and what rounding excuses."""

    def __init__(
        self,
        reference: Reference,
        photos: Photos,
        backbone: Answers,
        *,
        spec: NCutSpec,
        precision: Precision,
        tolerance: Tolerance,
    ) -> None:
        """Judge the backbone, whose tokens say which masks must be the reference's.

        Args:
            reference: images, and the answers to them.
            photos: where the images come from.
            backbone: "cls" and "patches" of every image.
            spec: constants of the cut.
            precision: of the encoder.
            tolerance: what departs.
        """
        self.reference = reference
        self.photos = photos
        self.precision = precision
        self.limits = tolerance.limits(precision)
        self.exact = tolerance.exact()
        """Of what is float32 in every precision."""
        self._tie = tolerance.tie(precision)
        tokens = backbone.by_image("patches")
        agreement = backbone.by_image("agreement") if spec.asks_cls else None
        self._determined = _determined(tokens, agreement, reference, spec, precision)
        changed = adjacency(tokens, spec) != adjacency(reference.patches, spec)
        self.backbone = (
            self.distance(backbone, "cls"),
            self.distance(backbone, "patches"),
            Stage(graph=backbone.graph, stage="edges", difference=changed.mean(), limit=None),
        )

    def distance(self, answers: Answers, name: str, limits: Limits | None = None) -> Stage:
        """Compare an output with the reference's; limits may be others than the judge's."""
        output, expected = answers.outputs[name], getattr(self.reference, name)[answers.rows]
        largest = float(np.abs(output - expected).max(initial=0))
        relative = largest / float(np.abs(expected).max(initial=1e-30))
        return Stage(
            graph=answers.graph,
            stage=name,
            difference=relative if name == "patches" else largest,
            relative=relative,
            cosine=_least_cosine(output, expected),
            limit=getattr(limits or self.limits, name),
        )

    def head(self, answers: Answers, limits: Limits | None = None) -> tuple[Stage, ...]:
        """Compare what is made of tokens and masks with the reference's."""
        return tuple(self.distance(answers, name, limits) for name in ("attention", "fg", "logits"))

    def verdict(self, answers: Answers) -> Verdict:
        """Judge answers that lead from images to logits."""
        graph, rows, logits = answers.graph, answers.rows, answers.outputs["logits"]
        other = (answers.outputs["mask"] != self.reference.mask[rows]).any(axis=1)
        other_cut = other | (answers.outputs["complete"] != self.reference.complete[rows])
        images = np.unique(rows[other_cut])
        masks = self._determined[images].sum() / max(self._determined.sum(), 1)
        # Where the logits are no numbers the mask says nothing: these answers are never left out.
        same = answers.where(~other | ~np.isfinite(logits).all(axis=1))
        flips = self._flips(answers, other)
        top1 = sum(map(self._counts, flips)) / len(rows)
        return Verdict(
            len(rows),
            Stage(graph=graph, stage="mask", difference=masks, limit=self.limits.mask),
            self.head(same),
            Stage(graph=graph, stage="top1", difference=top1, limit=self.limits.top1),
            flips,
            set(images.tolist()),
            self._by_batch_size(same),
        )

    def classes(self, served: Answers, classifier: NDArray[np.float32], cls_share: float) -> Stage:
        """Compare embedding and logits of a class matrix from outside with their products."""
        cls, fg = (served.outputs[name].astype(np.float64) for name in ("cls", "fg"))
        fused = cls_share * cls + (1 - cls_share) * fg
        wanted = {
            "embedding": fused / np.linalg.norm(fused, axis=1, keepdims=True),
            "logits": LOGIT_SCALE * fused @ classifier.T.astype(np.float64),
        }
        largest = self.exact.largest_share(served.outputs, wanted)
        return Stage(graph=served.graph, stage="classes", difference=largest, limit=1)

    def proof(
        self,
        stages: tuple[Stage, ...],
        verdicts: Sequence[Verdict],
        *,
        device: str,
        reference: str,
    ) -> Proof:
        """Return the proof of all stages; batches are the first verdict's."""
        names = self.photos.names
        flips = tuple(flip for each in verdicts for flip in each.flips)
        other_masks = {image for each in verdicts for image in each.other_masks}
        return Proof(
            precision=self.precision,
            device=device,
            reference=reference,
            source=self.photos.source,
            images=len(self.reference.images),
            stages=stages,
            departure=next((str(stage) for stage in stages if stage.departs), None),
            agreement=1 - len(flips) / sum(each.answers for each in verdicts),
            flips=flips,
            batches=verdicts[0].batches,
            undetermined=tuple(names[i] for i in np.flatnonzero(~self._determined)),
            other_masks=tuple(names[i] for i in sorted(other_masks)),
            left_out=dict(self.photos.left_out),
        )

    def _flips(self, answers: Answers, other_mask: Array) -> list[Flip]:
        """List the answers with another class than the reference's."""
        expected = self.reference.logits[answers.rows]
        ours, theirs = answers.outputs["logits"].argmax(axis=1), expected.argmax(axis=1)
        return [
            Flip(
                image=self.photos.names[answers.rows[i]],
                row=int(answers.rows[i]),
                batch=int(answers.sizes[i]),
                torch=int(theirs[i]),
                onnx=int(ours[i]),
                margin=float(expected[i, theirs[i]] - expected[i, ours[i]]),
                other_mask=bool(other_mask[i]),
            )
            for i in np.flatnonzero(ours != theirs)
        ]

    def _counts(self, flip: Flip) -> bool:
        """Say whether a flip is neither a tie nor due to a mask that rounding may change."""
        excused = flip.other_mask and not self._determined[flip.row]
        return not (flip.margin <= self._tie or excused)

    def _by_batch_size(self, answers: Answers) -> dict[int, float]:
        """Return the largest difference of logits for each batch size."""
        logits, expected = answers.outputs["logits"], self.reference.logits[answers.rows]
        difference = np.abs(logits - expected).max(axis=1)
        sizes = np.unique(answers.sizes).tolist()
        return {size: float(difference[answers.sizes == size].max()) for size in sizes}


def _determined(
    tokens: Array,
    agreement: Array | None,
    reference: Reference,
    spec: NCutSpec,
    precision: Precision,
) -> Array:
    """Return which images' masks must be PyTorch's, bool (P,)."""
    if precision != "fp32":
        moved = (adjacency(tokens, spec) != adjacency(reference.patches, spec)).any(axis=(1, 2))
        if spec.asks_cls:  # where both sides score nearly alike, rounding chooses the side
            own = saliency_exact(tokens, spec, agreement)
            moved |= (own.mask != reference.mask).any(axis=1)
        unmoved: Array = reference.determined & ~moved
        return unmoved
    expected = similarities(reference.patches, spec)
    rounding = np.abs(similarities(tokens, spec) - expected).max(axis=(1, 2))
    nearest = np.abs(expected - spec.tau).min(axis=(1, 2))
    certain: Array = reference.determined & (nearest > NEAR_TAU * rounding)
    return certain


def _least_cosine(rows: Array, expected: Array) -> float:
    """Return the least cosine of rows (..., D); NaN where a row is no number."""
    one, other = rows.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of rows that are no numbers
        norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        cosines = (one * other).sum(axis=-1) / np.maximum(norms, 1e-30)
    return float(cosines.min(initial=1))
