"""TokenFusion: [CLS] and [FG] -> fused logits, the average of both tokens' own."""

import torch.nn.functional as F
from torch import Tensor

from microclip_deploy.head import LOGIT_SCALE


def class_logits(embedding: Tensor, classifier: Tensor) -> Tensor:
    """Return 100 * cosine: float (B, E) unit rows and (C, E) unit rows -> (B, C)."""
    return LOGIT_SCALE * embedding @ classifier.T


def fused_logits(cls: Tensor, fg: Tensor, classifier: Tensor, cls_share: float) -> Tensor:
    """TokenFusion: the convex combination (B, C) of the logits of both tokens."""
    return cls_share * class_logits(cls, classifier) + (1 - cls_share) * class_logits(
        fg, classifier
    )


def fused_embedding(cls: Tensor, fg: Tensor, cls_share: float) -> Tensor:
    """Return the normalised convex combination (B, E) that pseudo-labels look at."""
    return F.normalize(cls_share * cls + (1 - cls_share) * fg, dim=-1)
