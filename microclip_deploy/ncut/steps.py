"""The normalised cut of patch tokens, written once against the array API.

NumPy, torch and CuPy arrays run the same lines. Two solvers share everything but the
eigenvector itself (a third implementation, for NVIDIA GPUs, is `cuda.ncut`; `model.saliency`
chooses):

* `saliency_exact`: dense float64 eigendecomposition. The oracle, and the solver on CPUs.
* `saliency_iterative`: float32 repeated squaring of a spectral filter. Only matrix products
  and reductions, so it runs on an accelerator without a host synchronisation, and exports as a
  plain graph. Where the graph falls apart, the filter is built from its components instead.

The method leaves the sign of the eigenvector to the solver, and with it the mask. Here the
vector is oriented first (largest entry positive) and thresholded second; where it is undefined
(complete, edgeless or exactly symmetric graphs) every token is foreground. Other rules than the
method's then choose the foreground among both sides of the split.

Letters: B images, N tokens, D width.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

from array_api_compat import array_namespace, device, is_torch_array

from microclip_deploy.errors import UsageError
from microclip_deploy.ncut.spec import NCutSpec

Array: TypeAlias = Any  # the array API has no static type that covers NumPy, torch and CuPy

MIN_TOKENS = 4

NORMALISE_EVERY = 4
"""Squarings between normalisations. The largest eigenvalue then is at least 1/sqrt(N), and four
squarings of it stay above 1e-29 even for N = 4096, within float32."""

WELL_POSED_GAP = 1e-4
"""Share of the largest eigenvalue that must lie between the second and its neighbours, and ..."""
WELL_POSED_MARGIN = 1e-5
"""... how far threshold and orientation must be from a tie, for float32 solvers to agree."""


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


def saliency_exact(tokens: Array, spec: NCutSpec, agreement: Array | None = None) -> Saliency:
    """Mark the tokens on the foreground side of the cut, by a dense float64 eigendecomposition.

    Args:
        tokens: float (B, N, D), N >= 4, raw (not normalised), class token removed.
        spec: constants and rules.
        agreement: float32 (B, N), each token's with [CLS], from `agreement_with`; not read where
            `spec.asks_cls` is False.

    Raises:
        UsageError: `tokens` is not (B, N, D) floating point with N >= 4, no square of tokens where
            the border counts, or has no agreement where it does.

    Source: docs/numerics.md section 2.
    """
    edges = adjacency(tokens, spec)
    fiedler = fiedler_exact(edges, spec)
    return bipartition(tokens, edges, fiedler, spec.tie_tolerance, spec, agreement)


def saliency_iterative(tokens: Array, spec: NCutSpec, agreement: Array | None = None) -> Saliency:
    """As `saliency_exact`, by float32 matrix products only."""
    edges = adjacency(tokens, spec)
    fiedler = fiedler_iterative(edges, spec)
    return bipartition(tokens, edges, fiedler, spec.tie_tolerance_iterative, spec, agreement)


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


def adjacency(tokens: Array, spec: NCutSpec) -> Array:
    """Join the tokens whose similarity exceeds tau.

    The lower triangle decides, as in the method's `eigh`, so that the graph is symmetric to the
    bit.

    Returns:
        bool (B, N, N), symmetric; the diagonal follows the same rule.
    """
    xp = array_namespace(tokens)
    above = similarities(tokens, spec) > spec.tau
    lower = above & _lower_triangle(xp, above)
    return lower | xp.matrix_transpose(lower)


def similarities(tokens: Array, spec: NCutSpec) -> Array:
    """Return what is compared with tau: float32 (B, N, N), or float64 for float64 tokens.

    Raises:
        UsageError: `tokens` is not (B, N, D) floating point with N >= 4.
    """
    xp = array_namespace(tokens)
    if (
        tokens.ndim != 3
        or tokens.shape[1] < MIN_TOKENS
        or not xp.isdtype(tokens.dtype, "real floating")
    ):
        raise UsageError(
            f"patch tokens: expected floating point (B, N, D) with N >= {MIN_TOKENS}, "
            f"found {tokens.dtype} {tuple(tokens.shape)}"
        )
    x = tokens if tokens.dtype == xp.float64 else xp.astype(tokens, xp.float32)
    if spec.affinity == "centered_cosine":
        x = x - xp.mean(x, axis=1, keepdims=True)
    if spec.affinity != "dot":
        x = x / xp.clip(xp.sqrt(xp.sum(x * x, axis=2, keepdims=True)), min=1e-12)
    return x @ xp.matrix_transpose(x)


def fiedler_exact(edges: Array, spec: NCutSpec) -> Fiedler:
    """Solve the symmetric normalised Laplacian in float64."""
    xp = array_namespace(edges)
    laplacian, _ = _laplacian(edges, spec, xp.float64)
    with _one_thread(laplacian):
        values, vectors = xp.linalg.eigh(laplacian)
    simple = (values[:, 2] - values[:, 1]) > spec.gap_tolerance * values[:, 2]
    return Fiedler(vectors[:, :, 1], simple, xp.zeros_like(values[:, 1]))


def well_posed(edges: Array, spec: NCutSpec, agreement: Array | None = None) -> Array:
    """Say which graphs have a mask that rounding in float32 cannot change: bool (B,).

    Args:
        edges: bool (B, N, N), symmetric.
        spec: constants and rules.
        agreement: as for `saliency_exact`.

    Source: docs/numerics.md section 9.
    """
    xp = array_namespace(edges)
    laplacian, _ = _laplacian(edges, spec, xp.float64)
    with _one_thread(laplacian):
        values, vectors = xp.linalg.eigh(laplacian)
    first, second, third = (values[:, i] for i in range(3))
    gap = xp.minimum(second - first, third - second) > WELL_POSED_GAP * values[:, -1]
    vector = _oriented(xp, vectors[:, :, 1])
    threshold = _split_margin(xp, vector, spec)
    orientation = xp.abs(xp.max(vector, axis=1) + xp.min(vector, axis=1))
    certain = gap & (xp.minimum(threshold, orientation) > WELL_POSED_MARGIN)
    if not spec.asks_cls:
        return certain
    inside = vector > _level(xp, vector, spec)
    preference = _preference(xp, inside, agreement, spec)
    return certain & (xp.abs(preference) > WELL_POSED_MARGIN)


def determined(edges: Array, spec: NCutSpec, agreement: Array | None = None) -> Array:
    """Say which graphs' masks are the same from every solver: bool (B,).

    Besides the well-posed ones, those in which all or no pairs are joined: every token by rule.
    """
    xp = array_namespace(edges)
    pairs = edges.shape[1] * (edges.shape[1] - 1)
    joined = _pairs_joined(xp, edges)
    return well_posed(edges, spec, agreement) | (joined == 0) | (joined == pairs)


def fiedler_iterative(edges: Array, spec: NCutSpec) -> Fiedler:
    """Square a filter that keeps the wanted eigenvector until it has rank one.

    For a positive semidefinite rank-one matrix the column of the largest diagonal entry is the
    eigenvector, with its largest entry positive.
    """
    xp = array_namespace(edges)
    identity = xp.astype(_identity(xp, edges), xp.float32)
    apart, apart_filter = _component_filter(xp, edges, identity)
    filter_ = xp.where(apart, apart_filter, _spectral_filter(xp, edges, identity, spec))
    for squaring in range(spec.squarings):
        if squaring % NORMALISE_EVERY == 0:
            filter_ = filter_ / _frobenius(xp, filter_)
        filter_ = filter_ @ filter_
    return _dominant(xp, filter_ / _frobenius(xp, filter_), identity, spec)


def _spectral_filter(xp: Any, edges: Array, identity: Array, spec: NCutSpec) -> Array:
    """Return a matrix (B, N, N) whose eigenvalues fall as those of L rise.

    The null vector is known and removed; the rest of `1 - L` is shifted just enough to be positive
    semidefinite, so that rounding is relative to the spread of the spectrum.
    """
    laplacian, null = _laplacian(edges, spec, xp.float32)
    projector = identity - null[:, :, None] * null[:, None, :]
    kept = projector - laplacian  # eigenvalues 1 - lambda, and 0 for the null vector
    return kept + _frobenius(xp, kept) * projector


def _component_filter(xp: Any, edges: Array, identity: Array) -> tuple[Array, Array]:
    """Say which graphs fall apart (B, 1, 1), and return the filter (B, N, N) that decides those.

    The eigenvalues of a graph in parts are of the order of eps, too close for float32. To first
    order in eps the eigenvectors are constants on the parts, scaled by sqrt(degree), and among
    those L has the generalised inverse P C P / eps: C spreads every token over its part, P removes
    the null vector. Multiplied out here, so that no large numbers cancel.

    A token without any edge, not even to itself, belongs to no part: nothing draws it anywhere.

    Source: docs/numerics.md section 2.2.
    """
    joined = xp.astype(edges, xp.float32)
    reach = xp.maximum(joined, identity)
    for _ in range((edges.shape[1] - 2).bit_length()):  # paths twice as long each time
        reach = xp.clip(reach @ reach, max=1.0)
    size = xp.sum(reach, axis=2, keepdims=True)
    degree = xp.sum(joined, axis=2, keepdims=True)
    mean_degree = (reach @ degree) / size
    volume = xp.clip(xp.sum(degree, axis=1, keepdims=True), min=1.0)
    overall = xp.sum(degree * mean_degree, axis=1, keepdims=True) / volume
    root = xp.sqrt(degree)
    spread = reach / size - (mean_degree + xp.matrix_transpose(mean_degree) - overall) / volume
    tokens = xp.sum(xp.astype(degree > 0, xp.float32), axis=1, keepdims=True)
    apart = xp.max(size, axis=1, keepdims=True) < tokens
    return apart, spread * root * xp.matrix_transpose(root)


def _dominant(xp: Any, filter_: Array, identity: Array, spec: NCutSpec) -> Fiedler:
    """Read the eigenvector off a positive semidefinite matrix of (almost) rank one."""
    diagonal = xp.sum(filter_ * identity, axis=2)
    at_peak = diagonal >= xp.max(diagonal, axis=1, keepdims=True)
    weight = xp.astype(at_peak, filter_.dtype)
    # Several equal peaks only occur where the vector is undefined or tied; their mean is as good.
    column = xp.sum(filter_ * weight[:, None, :], axis=2)
    norm = xp.sqrt(xp.sum(column * column, axis=1, keepdims=True))
    residual = xp.sum(diagonal, axis=1) - 1
    simple = residual <= spec.rank_one_residual
    return Fiedler(column / xp.clip(norm, min=1e-30), simple, residual)


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
    joined = _pairs_joined(xp, edges)
    complete = joined == edges.shape[1] * (edges.shape[1] - 1)
    determined = fiedler.simple & decided & (joined > 0) & ~complete
    finite = xp.abs(xp.sum(_summable(xp, tokens), axis=(1, 2))) < xp.inf  # False for NaN
    determined = determined & finite & xp.any(inside, axis=1)
    everything = mask | ~determined[:, None]
    return Saliency(everything, vector, ~determined, complete, fiedler.residual)


def _pairs_joined(xp: Any, edges: Array) -> Array:
    """Count the joined pairs of different tokens, each twice: float32 (B,), exact below 2**24."""
    off_diagonal = edges & ~_identity(xp, edges)
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


def _laplacian(edges: Array, spec: NCutSpec, dtype: Any) -> tuple[Array, Array]:
    """Return L = diag(s) (diag(d) - A) diag(s), s = 1 / (sqrt(d) + eps), and its null vector."""
    xp = array_namespace(edges)
    joined = xp.astype(edges, dtype)
    affinity = joined + spec.eps * (1 - joined)
    root = xp.sqrt(xp.sum(affinity, axis=2)) + spec.eps
    degree = xp.sum(affinity, axis=2)
    identity = xp.astype(_identity(xp, edges), dtype)
    scaled = affinity / (root[:, :, None] * root[:, None, :])
    laplacian = identity * (degree / (root * root))[:, :, None] - scaled
    return laplacian, root / xp.sqrt(xp.sum(root * root, axis=1, keepdims=True))


@contextmanager
def _one_thread(matrix: Array) -> Iterator[None]:
    """Keep torch's LAPACK on one thread: on small matrices its threads wait for one another.

    Where other processes use the cores too, as loader workers do, a batch took many times
    longer on two threads than on one.
    """
    if not is_torch_array(matrix):
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _summable(xp: Any, tokens: Array) -> Array:
    """Return tokens whose sums do not overflow: halves as float32."""
    halves = tokens.dtype not in (xp.float32, xp.float64)
    return xp.astype(tokens, xp.float32) if halves else tokens


def _identity(xp: Any, edges: Array) -> Array:
    """Return bool (N, N), made from comparisons because `eye` has no ONNX form."""
    index = xp.arange(edges.shape[1], device=device(edges))
    return index[:, None] == index[None, :]


def _lower_triangle(xp: Any, edges: Array) -> Array:
    index = xp.arange(edges.shape[1], device=device(edges))
    return index[:, None] >= index[None, :]


def _frobenius(xp: Any, matrix: Array) -> Array:
    """Return the norm of each matrix, (B, 1, 1), never zero."""
    return xp.clip(xp.sqrt(xp.sum(matrix * matrix, axis=(1, 2), keepdims=True)), min=1e-30)
