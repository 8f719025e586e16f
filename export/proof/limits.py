"""How far exported graphs may be from PyTorch, and from one another.

Nobody can ask float32 graphs to be nearer to PyTorch than PyTorch's own float32 is to the exact
answer. That distance is measured for the model and the images at hand (`forward_error`), so limits
follow whatever it depends on: depth, the length of tokens, SOAP's scores, the scale of the logits.
docs/numerics.md section 12 derives them.
"""

import math
from collections.abc import Mapping
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from microclip_deploy.errors import UsageError
from microclip_deploy.export.proof.probes import Array
from microclip_deploy.serving.exported import Precision

MARGIN = 4.0
"""Float32 graphs may be this many times PyTorch's own distance from float64 away from PyTorch. Both
round, in other orders: of all models and images tried, the largest multiple was
2.4."""

ROUNDOFF: Mapping[Precision, float] = {"fp16": 2.0**12, "bf16": 2.0**15}
"""The same for what an encoder in half precision makes: half of its unit roundoff as a multiple of
float32's, because its products are summed in float32. The largest multiple found was 1600 in
fp16."""

NEAR_TAU = 1.5
"""A similarity counts as near tau within this many times the largest difference seen."""

OTHER_CUT = 0.05
"""Share of answers whose mask may differ from the exact cut of the same tokens: a similarity near
tau falls to either side in the two products."""

QUANTISED_MARGIN = 2.0
"""Graphs in int8-static may be this many times as far from PyTorch as their own scales put exact
products: rounding in another order turns some activations to the next integer. The largest
multiple tried was 1.2; products that saturate gave 10 on the tiny model."""

PARTS = 2.0
"""Multiple of the float32 limits by which the full graph may differ from its parts."""


class StageErrors(BaseModel, frozen=True):
    """Largest differences of what a model makes of images.

    That of patch tokens is a share of the largest token value.
    """

    cls: float
    patches: float
    attention: float
    fg: float
    logits: float


class ForwardError(BaseModel, frozen=True):
    """How far PyTorch's float32 is from float64, on the same images and masks."""

    total: StageErrors
    """From pixels on."""
    encoder: StageErrors
    """What the encoder's rounding alone does: its float32 tokens, followed by float64."""

    def or_more(self, other: "ForwardError") -> "ForwardError":
        """Return the larger of both, number by number."""
        parts = {
            name: {key: max(value, getattr(getattr(other, name), key)) for key, value in part}
            for name, part in self
        }
        return ForwardError.model_validate(parts)


EARLIER = ForwardError(
    total=StageErrors(cls=1.25e-6, patches=5e-6, attention=5e-6, fg=2.5e-6, logits=2.5e-5),
    encoder=StageErrors(cls=5e-7, patches=2.5e-6, attention=5e-6, fg=1.2e-6, logits=1.9e-5),
)
"""For exports of earlier versions, which do not tell theirs."""


class TokenErrors(BaseModel, frozen=True):
    """How far exact int8 products with the scales of a graph are from PyTorch's float32."""

    cls: float
    patches: float
    """As a share of the largest token value."""

    def or_more(self, other: "TokenErrors") -> "TokenErrors":
        """Return the larger of both, number by number."""
        return TokenErrors(cls=max(self.cls, other.cls), patches=max(self.patches, other.patches))


LARGEST_QUANTISED = TokenErrors(cls=0.05, patches=0.5)
"""No limit of int8-static is larger: scales that fit worse are of no use."""


class Limits(BaseModel):
    """How far each stage may be from PyTorch's float32; None is only reported."""

    model_config = ConfigDict(frozen=True)

    cls: float | None = None
    """Largest difference of [CLS] embeddings; rows have length 1."""
    patches: float | None = None
    """Largest difference of patch tokens, as a share of the largest token value."""
    mask: float | None = None
    """Share of images with another mask, of those whose mask is determined."""
    attention: float | None = None
    """Largest difference of SOAP's weights, where the masks are the same."""
    fg: float | None = None
    """Largest difference of [FG] embeddings, where the masks are the same."""
    logits: float | None = None
    """Largest difference of logits, scale 100, where the masks are the same."""
    top1: float
    """Share of answers with another class; ties within twice the precision's own limit on logits do
    not count, nor do other masks that are undetermined."""

    @property
    def embedding(self) -> float | None:
        """Largest difference of fused embeddings; rows have length 1."""
        return None if self.cls is None or self.fg is None else self.cls + self.fg

    def largest_share(self, found: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
        """Return the largest difference of what is wanted, as a multiple of its limit."""
        shares = [np.abs(found[name] - x).max() / getattr(self, name) for name, x in wanted.items()]
        return float(np.max(shares))  # NaN is the largest


class Tolerance(BaseModel, frozen=True, extra="forbid"):
    """What decides how far an export may be from PyTorch; stored with it."""

    error: ForwardError = EARLIER
    quantised: TokenErrors | None = None
    """Of int8-static; None for the others."""
    atol: float | None = None
    """The user's own limit on logits; None: ours."""
    min_agreement: float | None = None
    """The user's least share of answers with PyTorch's class; None: ours."""

    def changed(self, atol: float | None, min_agreement: float | None) -> Self:
        """Put the user's own limits in their place.

        Args:
            atol: largest difference of logits of the full graph; None keeps what is there.
            min_agreement: least share of equal top-1 classes; None keeps what is there.

        Raises:
            UsageError: one is no finite number.
        """
        given = {"atol": atol, "min_agreement": min_agreement}
        changes = {name: value for name, value in given.items() if value is not None}
        for name, value in changes.items():
            if not math.isfinite(value):
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option}: expected a finite number, found {value}; give one")
        return self.model_copy(update=changes)

    def between_graphs(self) -> Self:
        """Return the tolerance of graphs that are not held against PyTorch: both round."""
        parts = {name: {key: 2 * value for key, value in part} for name, part in self.error}
        changes: dict[str, object] = {"error": ForwardError.model_validate(parts)}
        if self.quantised is not None:
            twice = {name: 2 * value for name, value in self.quantised}
            changes["quantised"] = TokenErrors.model_validate(twice)
        return self.model_copy(update=changes)

    def limits(self, precision: Precision) -> Limits:
        """Return what the full graph and the backbone are held to."""
        own = self._own(precision)
        logits = own.logits if self.atol is None else self.atol
        top1 = own.top1 if self.min_agreement is None else 1 - self.min_agreement
        return own.model_copy(update={"logits": logits, "top1": top1})

    def exact(self) -> Limits:
        """Return what everything is held to that is float32 in every precision."""
        return self._own("fp32")

    def tie(self, precision: Precision) -> float:
        """Return by how much the best logit leads at least where rounding cannot turn the class.

        Whatever the user allows, a tie is what rounding can turn.
        """
        return 2 * (self._own(precision).logits or 0)

    def _own(self, precision: Precision) -> Limits:
        """Return the limits without the user's."""
        error = self.error
        if precision == "fp32":
            float32 = {name: MARGIN * value for name, value in error.total}
            return Limits(**float32, mask=0, top1=0)
        if precision == "int8":
            return Limits(cls=0.05, patches=0.25, top1=0.1)
        if precision == "int8-static":
            own = self.quantised or LARGEST_QUANTISED
            found = {name: QUANTISED_MARGIN * value for name, value in own}
            most = dict(LARGEST_QUANTISED)
            return Limits(**{name: min(found[name], most[name]) for name in most}, top1=0.1)
        half = {
            name: ROUNDOFF[precision] * value + MARGIN * getattr(error.total, name)
            for name, value in error.encoder
        }
        if precision == "bf16":
            return Limits(cls=half["cls"], patches=half["patches"], top1=0.1)
        return Limits(**half | {"attention": None}, mask=0.04, top1=0.01)
