"""From an eigenvector to the foreground: orientation, split, side; written against the array API.

The method leaves the sign of the eigenvector to the solver, and with it the mask. Here the
vector is oriented first (largest entry positive) and split second; where it is undefined
(complete, edgeless or exactly symmetric graphs) every token is foreground. Other rules than the
method's then choose the foreground among both sides of the split.

Letters: B images, N tokens, D width.
"""

import math
from typing import Any, NamedTuple, TypeAlias

from array_api_compat import array_namespace, device

from microclip_deploy.errors import UsageError
from microclip_deploy.ncut.spec import NCutSpec

Array: TypeAlias = Any  # the array API has no static type that covers NumPy, torch and CuPy


class Fiedler(NamedTuple):
    """The second eigenvector of each graph and whether it is determined."""

    vector: Array
    """float (B, N), unit norm, sign arbitrary."""
    simple: Array
    """bool (B,): the second eigenvalue is separated from the third."""
    residual: Array
    """float (B,): what other eigenvectors still contribute; 0 from the exact solver."""


class Saliency(NamedTuple):
    """Foreground of each image."""

    mask: Array
    """bool (B, N), never all False."""
    vector: Array
    """float (B, N), oriented unit eigenvector; meaningless where `degenerate`."""
    degenerate: Array
    """bool (B,): the eigenvector is undefined and the mask is all True."""
    complete: Array
    """bool (B,): every pair of tokens is joined, so the graph says nothing."""
    residual: Array
    """float (B,): how far the vector is from an eigenvector, 0 from the exact solver. Iterative
    solver: trace / Frobenius norm - 1 of its filter. Kernel: residual / spread of the spectrum."""


def agreement_with(direction: Array, tokens: Array) -> Array:
    """Return the cosine of each token with a direction: float32 (B, N).

    Args:
        direction: float32 (B, D), P cls: the [CLS] embedding brought back among the tokens.
        tokens: float (B, N, D).

    Source: docs/numerics.md section 2.3.
    """
    xp = array_namespace(tokens)
    x = xp.astype(tokens, xp.float32)
    length = xp.sqrt(xp.sum(x * x, axis=2) * xp.sum(direction * direction, axis=1, keepdims=True))
    return (x @ direction[:, :, None])[:, :, 0] / xp.clip(length, min=1e-12)


def bipartition(
    tokens: Array,
    edges: Array,
    fiedler: Fiedler,
    tie: float,
    spec: NCutSpec,
    agreement: Array | None = None,
) -> Saliency:
    """Orient, split, choose the side, and answer "everything" where the vector is undefined."""
    xp = array_namespace(edges)
    vector = _oriented(xp, fiedler.vector)
    decided = xp.abs(xp.max(vector, axis=1) + xp.min(vector, axis=1)) > tie
    inside = vector > _level(xp, vector, spec, tie) + tie
    mask = inside
    if spec.side != "seed":
        mask = inside ^ (_preference(xp, inside, agreement, spec) < 0)[:, None]
    joined = pairs_joined(xp, edges)
    complete = joined == edges.shape[1] * (edges.shape[1] - 1)
    determined = fiedler.simple & decided & (joined > 0) & ~complete
    finite = xp.abs(xp.sum(_summable(xp, tokens), axis=(1, 2))) < xp.inf  # False for NaN
    determined = determined & finite & xp.any(inside, axis=1)
    everything = mask | ~determined[:, None]
    return Saliency(everything, vector, ~determined, complete, fiedler.residual)


def pairs_joined(xp: Any, edges: Array) -> Array:
    """Count the joined pairs of different tokens, each twice: float32 (B,), exact below 2**24."""
    off_diagonal = edges & ~identity_of(xp, edges)
    return xp.sum(xp.astype(off_diagonal, xp.float32), axis=(1, 2))


def _oriented(xp: Any, vector: Array) -> Array:
    """Return the vectors with their largest entry positive."""
    upright = xp.max(vector, axis=1, keepdims=True) >= -xp.min(vector, axis=1, keepdims=True)
    return xp.where(upright, vector, -vector)


def _level(xp: Any, vector: Array, spec: NCutSpec, tie: float = 0.0) -> Array:
    """Return what the entries of one side exceed by more than a tie, (B, 1)."""
    center = xp.mean(vector, axis=1, keepdims=True)
    if spec.threshold == "mean":
        return center
    deviation = vector - center
    if spec.threshold == "otsu":
        between = _between(xp, deviation, tie)
        best = between >= xp.max(between, axis=1, keepdims=True)
        return xp.max(xp.where(best, vector, -xp.ones_like(vector)), axis=1, keepdims=True)
    return xp.sqrt(xp.sum(deviation * deviation, axis=1, keepdims=True) / (vector.shape[1] - 1))


def _between(xp: Any, deviation: Array, tie: float) -> Array:
    """Return the variance between both sides, times N, if they were split just above each entry.

    Args:
        xp: the array library.
        deviation: float (B, N), entries less their mean.
        tie: entries closer than this stay on one side.

    Source: Otsu 1979, equation 14.
    """
    count = deviation.shape[1]
    above = deviation[:, None, :] > deviation[:, :, None] + tie
    above = xp.astype(above, deviation.dtype)  # [b, i, j]: j lies above i
    number, total = xp.sum(above, axis=2), (above @ deviation[:, :, None])[:, :, 0]
    return total * total * count / xp.clip(number * (count - number), min=1.0)


def margin(vector: Array, spec: NCutSpec, agreement: Array | None = None) -> Array:
    """Return how far the entries are from where the foreground would be another one, (B,).

    Args:
        vector: float (B, N), unit norm.
        spec: rules.
        agreement: as for `saliency_exact`.
    """
    xp = array_namespace(vector)
    orientation = xp.abs(xp.max(vector, axis=1) + xp.min(vector, axis=1))
    vector = _oriented(xp, vector)
    least = xp.minimum(orientation, _split_margin(xp, vector, spec))
    if not spec.asks_cls:
        return least
    inside = vector > _level(xp, vector, spec)
    return xp.minimum(least, xp.abs(_preference(xp, inside, agreement, spec)))


def _split_margin(xp: Any, vector: Array, spec: NCutSpec) -> Array:
    """Return how far the entries are from where they would change sides, (B,)."""
    level = _level(xp, vector, spec)
    if spec.threshold != "otsu":
        return xp.min(xp.abs(vector - level), axis=1)
    # Only the best of all other splits can take its place; both are of the order of 1 at most.
    between = _between(xp, vector - xp.mean(vector, axis=1, keepdims=True), 0.0)
    other = xp.where(vector == level, xp.zeros_like(vector), between)
    return xp.max(between, axis=1) - xp.max(other, axis=1)


def _preference(xp: Any, inside: Array, agreement: Array | None, spec: NCutSpec) -> Array:
    """Return by how much the rule prefers one side of a split to the other one, float (B,).

    The rule's score of a side is the mean agreement of its tokens with [CLS], less the share of the
    image's border that lies in it.
    """
    score, sides = 0.0, (inside, ~inside)
    if spec.asks_cls:
        values = require_agreement(agreement, spec)
        ours, others = (_mean_over(xp, values, side) for side in sides)
        score = score + ours - others
    if spec.asks_border:
        border = on_border(inside)
        ours, others = (_mean_over(xp, xp.astype(side, xp.float32), border) for side in sides)
        score = score - ours + others
    return score


def _mean_over(xp: Any, values: Array, where: Array) -> Array:
    """Return the mean (B,) of values (B, N) where a bool (B, N) or (1, N) holds; 0 if nowhere."""
    weight = xp.astype(where, values.dtype)
    return xp.sum(values * weight, axis=1) / xp.clip(xp.sum(weight, axis=1), min=1.0)


def on_border(mask: Array) -> Array:
    """Return which of (B, N) tokens, a square image's row by row, touch its border: bool (1, N).

    Raises:
        UsageError: N is no square number.
    """
    xp, count = array_namespace(mask), mask.shape[1]
    side = square_side(count)
    index = xp.arange(side, device=device(mask))
    edge = (index == 0) | (index == side - 1)
    return xp.reshape(edge[:, None] | edge[None, :], (1, count))


def require_agreement(agreement: Array | None, spec: NCutSpec) -> Array:
    """Insist on what the side asks for.

    Raises:
        UsageError: there is none.
    """
    if agreement is None:
        raise UsageError(
            f'ncut.side = "{spec.side}": expected the agreement of tokens with [CLS], found none; '
            "give what agreement_with returns"
        )
    return agreement


def square_side(count: int) -> int:
    """Return how many tokens lie in a row of a square image of `count` tokens.

    Raises:
        UsageError: `count` is no square number.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise UsageError(
            f"patch tokens: expected a square number of them, whose border is known, found {count}"
        )
    return side


def _summable(xp: Any, tokens: Array) -> Array:
    """Return tokens whose sums do not overflow: halves as float32."""
    halves = tokens.dtype not in (xp.float32, xp.float64)
    return xp.astype(tokens, xp.float32) if halves else tokens


def identity_of(xp: Any, edges: Array) -> Array:
    """Return bool (N, N), made from comparisons because `eye` has no ONNX form."""
    index = xp.arange(edges.shape[1], device=device(edges))
    return index[:, None] == index[None, :]
