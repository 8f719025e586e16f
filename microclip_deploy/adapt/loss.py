"""The two terms of the loss: agreement with the pseudo-labels, and fairness over classes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Fairness(NamedTuple):
    """The fairness term and the average it leaves for the next step."""

    loss: Tensor
    """float scalar."""
    average: Tensor
    """float (C,): running mean prediction, with the graph of this step only."""


def cross_entropy(logits: Tensor, labels: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of (B, C) logits against labels.

    Args:
        logits: float (B, C), scale 100.
        labels: int64 (B,), or float (B, C) with rows that sum to 1.
        kept: bool (B,) of the images that count; None for all. No image kept gives zero.
    """
    if kept is None:
        return F.cross_entropy(logits, labels)
    each = F.cross_entropy(logits, labels, reduction="none") * kept
    return each.sum() / kept.sum().clamp(min=1)


def fairness(logits: Tensor, previous: Tensor | None, expected: Tensor | None = None) -> Fairness:
    """Penalise classes that the running mean prediction forgets: -2 mean_c log p[c].

    The first batch of an epoch passes None and stands alone; later ones average with the
    previous running mean, half and half, gradient through this batch only.

    Args:
        logits: float (B, C), scale 100.
        previous: float (C,), running mean of the batch before.
        expected: float (C,), class frequencies that sum to 1, in place of the uniform ones:
            -2 sum_c expected[c] log p[c].

    Source: docs/numerics.md section 7.3. Probabilities are clamped to the smallest normal
    number, where the method would return infinity.
    """
    average = logits.softmax(dim=-1).mean(dim=0)
    if previous is not None:
        average = 0.5 * (previous.detach() + average)
    floor = torch.finfo(average.dtype).tiny
    logs = average.clamp(min=floor).log()
    return Fairness(-2 * (logs.mean() if expected is None else expected @ logs), average)
