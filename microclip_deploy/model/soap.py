"""SOAP, saliency-oriented attention pooling: patch tokens and their saliency -> [FG].

All patch tokens, plus one zero token, are asked with the mean of the salient ones.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pooled(NamedTuple):
    """One vector an image, before the projection to the joint space."""

    vector: Tensor
    """float (B, D)."""
    attention: Tensor
    """float (B, N+1), rows sum to 1; the last column is the zero token's share."""


class SOAP(nn.Module):
    """Single-head attention whose query is the mean of the salient tokens.

    The three D x D maps have no bias and start as the identity. They are applied to the query
    and to the pooled token, never to all N tokens: x_i . (Wk^T Wq q) and Wv (sum a_i x_i) are the
    same numbers for a fraction of the work.

    Source: microCLIP section 3.2; docs/numerics.md section 3. The method's D is fixed at 768;
    here it is the backbone's width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_proj = nn.Linear(width, width, bias=False)
        self.key_proj = nn.Linear(width, width, bias=False)
        self.value_proj = nn.Linear(width, width, bias=False)
        for linear in (self.query_proj, self.key_proj, self.value_proj):
            nn.init.eye_(linear.weight)

    def forward(self, patches: Tensor, mask: Tensor) -> Pooled:
        """Pool float (B, N, D) patch tokens with the bool (B, N) saliency mask as the query."""
        query = masked_mean(patches, mask)
        key = self.query_proj(query) @ self.key_proj.weight / math.sqrt(patches.shape[-1])
        scores = torch.einsum("bnd,bd->bn", patches, key)
        attention = F.pad(scores, (0, 1)).softmax(dim=-1)
        mixed = torch.einsum("bn,bnd->bd", attention[:, :-1], patches)
        return Pooled(self.value_proj(mixed), attention)


class TokenMean(nn.Module):
    """The plain mean of all tokens in place of SOAP: what the saliency is compared against."""

    def forward(self, patches: Tensor, mask: Tensor) -> Pooled:
        """Ignore the mask and weigh every token alike."""
        count = patches.shape[1]
        uniform = patches.new_full((len(patches), count), 1 / count)
        return Pooled(patches.mean(dim=1), F.pad(uniform, (0, 1)))


def masked_mean(patches: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (B, D) of the tokens where `mask` (B, N) is True; gradient to the tokens."""
    weight = mask.to(patches.dtype)
    total = torch.einsum("bn,bnd->bd", weight, patches)
    return total / weight.sum(dim=1, keepdim=True).clamp(min=1)
