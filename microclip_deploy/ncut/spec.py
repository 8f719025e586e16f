"""Every constant of the normalised cut, in one place.

Artifacts carry these values and their fingerprint, and a reader refuses values that do not match
it.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field


class NCutSpec(BaseModel):
    """Constants and rules of the saliency mask (docs/numerics.md section 2)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    affinity: Literal["dot", "cosine", "centered_cosine"] = "dot"
    """What is compared with `tau`: raw products of the tokens (the method's own rule), their
    cosines, or the cosines after the image's mean token is subtracted."""

    tau: float = Field(default=0.2, allow_inf_nan=False)
    """Two tokens are joined when their similarity is strictly above this value."""

    eps: float = Field(default=1e-6, gt=0, lt=1e-3)
    """Weight of an absent edge, also added to sqrt(degree)."""

    threshold: Literal["std", "mean", "otsu"] = "std"
    """What splits the entries of the oriented vector: its unbiased standard deviation (the method's
    own rule), its mean, or the level that leaves the most variance between both sides (Otsu)."""

    side: Literal["seed", "border", "cls", "object"] = "seed"
    """Which side of the split is foreground: the one with the largest entry (the method's own
    rule); the one with the smaller share of the image's border; the one whose tokens agree more
    with [CLS]; or the one with the larger agreement minus share of the border."""

    fallback: Literal["all", "cls"] = "all"
    """Where the vector is undefined, [FG] is pooled with every token as the query (the method's own
    rule), or is [CLS], so that [CLS] alone answers."""

    gap_tolerance: float = Field(default=1e-6, gt=0, lt=1e-2)
    """The vector is undefined when (lambda3 - lambda2) <= gap_tolerance * lambda3."""

    tie_tolerance: float = Field(default=1e-9, gt=0, lt=1e-5)
    """Float64: entries of the unit vector closer than this count as equal."""

    tie_tolerance_iterative: float = Field(default=2e-6, gt=0, lt=1e-4)
    """Float32: entries of the unit vector closer than this count as equal."""

    squarings: int = Field(default=22, ge=8, le=32)
    """Squarings of the iterative solver: it applies the filter 2**squarings times."""

    rank_one_residual: float = Field(default=0.01, gt=0, lt=0.41)
    """The iterative solver calls the vector undefined when trace / Frobenius norm - 1 of its
    filter exceeds this (0 for a simple eigenvalue, 0.41 for a double one)."""

    lanczos_residual: float = Field(default=1e-6, gt=0, lt=1e-3)
    """The kernel has converged when the residual is below this share of the spectrum's spread."""

    lanczos_restarts: int = Field(default=6, ge=1, le=64)
    """Krylov spaces that the kernel builds at most: its work is bounded."""

    @property
    def asks_cls(self) -> bool:
        """Say whether the side depends on [CLS]."""
        return self.side in ("cls", "object")

    @property
    def asks_border(self) -> bool:
        """Say whether the side depends on where tokens lie, so that they must form a square."""
        return self.side in ("border", "object")

    def fingerprint(self) -> str:
        """Return sha256 (hex) of the canonical JSON of all fields."""
        return _fingerprint(self.model_dump())

    def stored(self) -> dict[str, Any]:
        """Return what artifacts hold: all fields and their fingerprint."""
        return {**self.model_dump(), "fingerprint": self.fingerprint()}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """Read what `stored` wrote.

        Raises:
            ValueError: unknown or invalid fields, or values that do not match their fingerprint.
        """
        spec = cls(**{name: value for name, value in stored.items() if name != "fingerprint"})
        # Over the fields it has: an artifact from before a field existed means its default.
        known = {name: value for name, value in spec.model_dump().items() if name in stored}
        if _fingerprint(known) != stored.get("fingerprint"):
            raise ValueError("the constants of the cut do not match their fingerprint")
        return spec


def _fingerprint(fields: Mapping[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


UNINFORMATIVE_SHARE = 0.5
"""Above this share of complete graphs the saliency carries no information for most images."""


def saliency_warning(share: float) -> str | None:
    """Return the warning with its remedy, or None where there is nothing to warn of.

    Args:
        share: images whose graph is complete, 0 to 1.
    """
    if share <= UNINFORMATIVE_SHARE:
        return None
    return (
        f"the saliency carries no information: {share:.0%} of the graphs join every pair of "
        "tokens; adapt again with --set ncut.affinity=centered_cosine"
    )
