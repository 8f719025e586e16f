"""How far exported graphs may be from PyTorch, and from one another."""

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from microclip_deploy.errors import UsageError
from microclip_deploy.serving.exported import Precision

NEAR_TAU = 1.5
"""A similarity counts as near tau within this many times the largest difference seen."""

OTHER_CUT = 0.05
"""Share of answers whose mask may differ from the exact cut of the same tokens: a similarity near
tau falls to either side in the two products."""

PARTS = 2.0
"""Multiple of the float32 limit on logits by which the full graph may differ from its parts."""


class Limits(BaseModel):
    """How far each stage may be from PyTorch's float32; None is only reported."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    logits_relative: float = 0
    """... or as much as this share of the largest logit, if that is more."""
    top1: float
    """Share of answers with another class; ties within twice the precision's own limit on logits do
    not count, nor do other masks that are undetermined."""

    def changed(self, atol: float | None, min_agreement: float | None) -> "Limits":
        """Return the limits with the user's own in their place.

        Args:
            atol: largest difference of logits; None keeps ours.
            min_agreement: least share of equal top-1 classes; None keeps ours.

        Raises:
            UsageError: one is no finite number.
        """
        for option, limit in (("atol", atol), ("min-agreement", min_agreement)):
            if limit is not None and not math.isfinite(limit):
                raise UsageError(f"--{option}: expected a finite number, found {limit}; give one")
        changes: dict[str, float] = {}
        if atol is not None:
            changes |= {"logits": atol, "logits_relative": 0.0}
        if min_agreement is not None:
            changes["top1"] = 1 - min_agreement
        return self.model_copy(update=changes)

    def scaled(self, largest: float) -> "Limits":
        """Return the limits with the one on logits raised to what logits of this size need."""
        if self.logits is None:
            return self
        needed = self.logits_relative * largest
        return self.model_copy(update={"logits": max(self.logits, needed)})


# float32 holds a logit of 80 to 8e-6, and sums dozens of products; half precision has 11 bits. A
# share of 0.04 lets no mask differ among the 24 made-up images, and few among many of the user's.
LIMITS: Mapping[Precision, Limits] = {
    "fp32": Limits(
        cls=5e-6,
        patches=2e-5,
        mask=0,
        attention=2e-5,
        fg=1e-5,
        logits=5e-5,
        logits_relative=1e-6,
        top1=0,
    ),
    "fp16": Limits(
        cls=2e-3, patches=1e-2, mask=0.04, fg=5e-3, logits=2e-2, logits_relative=1e-3, top1=0.01
    ),
    "bf16": Limits(cls=0.05, patches=0.25, top1=0.1),
    "int8": Limits(cls=0.05, patches=0.25, top1=0.1),
}
