"""Masks that a fast solver must reproduce: float64, on the CPU, on the very tokens it was given."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import adjacency, determined, saliency_exact, similarities

Bools = NDArray[np.bool_]

EDGE_ROUNDING = 1e-6
"""A similarity closer to tau than this share of the product of both lengths may fall on either side
in float32. Measured on vit_tokens with D = 1024, pairs with |cosine| under 0.02: sums in order, in
BLAS's order, and truncated every 16 terms as tensor cores do, were off by at most 1.4e-7 of it."""


class ExactMasks(NamedTuple):
    """What float64 says about the graphs of some images."""

    edges: Bools
    """(B, N, N), symmetric."""
    mask: Bools
    """(B, N)."""
    degenerate: Bools
    """(B,): everything is foreground by rule."""
    complete: Bools
    """(B,): every pair is joined."""
    near_tau: Bools
    """(B,): some pair is so close to tau that rounding may join or part it."""
    binding: Bools
    """(B,): no rounding in float32 can change the mask, so every solver must give it."""

    def wrong(self, mask: Bools) -> int:
        """Count the binding graphs whose `mask` (B, N) is another."""
        differs = (mask != self.mask).any(axis=1)
        return int((differs & self.binding).sum())

    def apart(self) -> float:
        """Return the share of graphs that are not connected."""
        reach = (self.edges | np.eye(self.edges.shape[1], dtype=bool)).astype(np.float32)
        for _ in range(self.edges.shape[1].bit_length()):  # paths twice as long each time
            reach = np.minimum(reach @ reach, 1.0)
        return float((reach.min(axis=(1, 2)) == 0).mean())


def exact_masks(tokens: NDArray[np.float64], spec: NCutSpec) -> ExactMasks:
    """Solve float64 (B, N, D) tokens, which hold the values the fast solver saw."""
    edges = adjacency(tokens, spec)
    cut = saliency_exact(tokens, spec)
    distance = np.abs(similarities(tokens, spec) - spec.tau)
    near = (distance < EDGE_ROUNDING * _lengths(tokens, spec)).any(axis=(1, 2))
    binding = determined(edges, spec) & ~near
    return ExactMasks(edges, cut.mask, cut.degenerate, cut.complete, near, binding)


def _lengths(tokens: NDArray[np.float64], spec: NCutSpec) -> NDArray[np.float64]:
    """Return what rounding of a similarity is relative to, (B, N, N)."""
    length = np.linalg.norm(tokens, axis=2)
    if spec.affinity == "cosine":
        length = np.ones_like(length)
    elif spec.affinity == "centered_cosine":  # the mean is rounded with the whole token's length
        centred = np.linalg.norm(tokens - tokens.mean(axis=1, keepdims=True), axis=2)
        length = length / np.maximum(centred, 1e-12)
    product: NDArray[np.float64] = length[:, :, None] * length[:, None, :]
    return product
