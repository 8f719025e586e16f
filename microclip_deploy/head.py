"""The head of an adapted model, folded for inference: what is left between tokens and logits."""

from typing import Any, NamedTuple

LOGIT_SCALE = 100.0
"""Factor on the cosines of an image with the class rows, before the softmax; never trained
(docs/numerics.md section 5)."""


class Head(NamedTuple):
    """SOAP's maps and the projection, applied to one vector an image; classes; TokenFusion."""

    match: Any | None
    """float32 (D, D), Wk^T Wq / sqrt(D): applied to the mean of the salient tokens. None where the
    tokens are pooled alike."""
    project: Any
    """float32 (E, D), (Wv^T P)^T: from the pooled token to the joint space."""
    classifier: Any
    """float32 (C, E), unit rows."""
    cls_share: float
    """Weight of [CLS] in the fused logits, 0 to 1."""
    cls_fallback: bool
    """[FG] is [CLS] where every token is salient, which is where the cut is undefined."""


def fused_logits(cls: Any, fg: Any, classifier: Any, cls_share: Any) -> Any:
    """Return TokenFusion's logits (B, C) of unit rows (B, E), in any array library.

    Source: docs/numerics.md section 5; one product with the class matrix in place of two.
    """
    return (LOGIT_SCALE * (cls_share * cls + (1 - cls_share) * fg)) @ classifier.T
