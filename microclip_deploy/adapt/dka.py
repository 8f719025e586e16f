"""Multi-view prior and Dynamic Knowledge Aggregation: views of an image -> its pseudo-label.

No gradient, always float32, always the weights of this very step.
"""

import torch.nn.functional as F
from torch import Tensor


def multi_view_prior(crops: Tensor, weak: Tensor) -> Tensor:
    """Blend the crops' embeddings by their agreement with the whole image.

    Args:
        crops: float32 (B, V, E), unit rows: [CLS] of V crops of each image.
        weak: float32 (B, E), unit rows: [CLS] of the weak view.

    Returns:
        float32 (B, E), unit rows.

    Source: docs/numerics.md section 6; softmax over crops at temperature 1.
    """
    relevance = (crops @ weak[:, :, None]).squeeze(-1).softmax(dim=1)
    return F.normalize((relevance[:, :, None] * crops).sum(dim=1), dim=-1)


def aggregate(
    prior: Tensor, fused: Tensor, *, frozen: Tensor, classifier: Tensor, gamma: float
) -> Tensor:
    """Combine what the frozen head and the learnable head say.

    Args:
        prior: float32 (B, E) from `multi_view_prior`, judged by the frozen head.
        fused: float32 (B, E), normalised mean of [CLS] and [FG] of the weak view, judged by the
            learnable head.
        frozen: float32 (C, E), unit rows.
        classifier: float32 (C, E), unit rows.
        gamma: share of the frozen side, 0 to 1.

    Returns:
        float32 (B, C) cosines; the pseudo-label is their argmax.

    Source: Dynamic Knowledge Aggregation, docs/numerics.md section 6.
    """
    return gamma * prior @ frozen.T + (1 - gamma) * fused @ classifier.T
