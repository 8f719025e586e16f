"""Boundary-preserving targets: what adaptation may not move away from a class.

A photo that zero-shot gives to class c, and that looks more like the other photos of c than like
those of j, should not drift to j. Where such drift was frequent in the epoch before, part of what
a photo has moved to j is given back to c. Source: arXiv 2610.07903, section 3.3. There the rates
are measured by a pass before each epoch; here over the epoch that has just ended, so that in the
first epoch nothing is given back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from microclip_deploy.adapt.reference import Support


class Drift(NamedTuple):
    """Probability that photos of class c moved to class j in the running epoch, float32 (C, C)."""

    unsupported: Tensor
    """Of it what their looks do not support."""
    all: Tensor

    @classmethod
    def none(cls, classes: int, device: torch.device) -> "Drift":
        """Return the drift before the first photo."""
        return cls(*(torch.zeros(classes, classes, device=device) for _ in cls._fields))

    def rates(self) -> Tensor:
        """Return float32 (C, C), 0 to 1: how much of the drift was unsupported."""
        return self.unsupported / self.all.clamp(min=torch.finfo(torch.float32).tiny)


class Moved(NamedTuple):
    """How a batch has moved from zero-shot."""

    origin: Tensor
    """int64 (B,): zero-shot's class."""
    increase: Tensor
    """float32 (B, C): probability gained by each other class."""
    unsupported: Tensor
    """float32 (B, C): the same where the photo's looks do not support it, otherwise 0."""


def moved(current: Tensor, support: Support) -> Moved:
    """Compare the probabilities of a batch with zero-shot's.

    Args:
        current: float32 (B, C), rows sum to 1.
        support: of the same photos.
    """
    origin = support.zero_shot.argmax(dim=1)
    row = origin[:, None]
    increase = (current - support.zero_shot).clamp(min=0).scatter(1, row, 0)
    at_origin = support.anchors.gather(1, row)
    drifts = at_origin > support.anchors
    best = current.argmax(dim=1, keepdim=True)
    corrected = (best != row) & (support.anchors.gather(1, best) > at_origin)
    return Moved(origin, increase, increase * (drifts & ~corrected))


def targets(current: Tensor, found: Moved, rates: Tensor) -> Tensor:
    """Return float32 (B, C), rows sum to 1: the probabilities with unsupported drift given back."""
    back = rates[found.origin] * found.unsupported
    given = (current - back).scatter_add(1, found.origin[:, None], back.sum(dim=1, keepdim=True))
    return given


def added(drift: Drift, found: Moved) -> Drift:
    """Return the drift of an epoch with a batch added."""
    return Drift(
        drift.unsupported.index_add(0, found.origin, found.unsupported),
        drift.all.index_add(0, found.origin, found.increase),
    )
