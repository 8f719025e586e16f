"""The normalised cut of patch tokens, written once against the array API.

NumPy, torch and CuPy arrays run the same lines. Two solvers share everything but the
eigenvector itself (a third implementation, for NVIDIA GPUs, is `cuda.ncut`; `model.saliency`
chooses):

* `saliency_exact`: dense float64 eigendecomposition. The oracle, and the solver on CPUs.
* `saliency_iterative`: float32 repeated squaring of a spectral filter. Only matrix products
  and reductions, so it runs on an accelerator without a host synchronisation, and exports as a
  plain graph. Where the graph falls apart, the filter is built from its components instead.

What follows the eigenvector is in `foreground`.

Letters: B images, N tokens, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from array_api_compat import array_namespace, device, is_torch_array

from microclip_deploy.errors import UsageError
from microclip_deploy.ncut.foreground import (
    Array,
    Fiedler,
    Saliency,
    bipartition,
    identity_of,
    margin,
    pairs_joined,
)
from microclip_deploy.ncut.spec import NCutSpec

MIN_TOKENS = 4

NORMALISE_EVERY = 4
"""Squarings between normalisations. The largest eigenvalue then is at least 1/sqrt(N), and four
squarings of it stay above 1e-29 even for N = 4096, within float32."""

WELL_POSED_GAP = 1e-4
"""Share of the largest eigenvalue that must lie between the second and its neighbours, and ..."""
WELL_POSED_MARGIN = 1e-5
"""... how far threshold and orientation must be from a tie, for float32 solvers to agree."""


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
    return gap & (margin(vectors[:, :, 1], spec, agreement) > WELL_POSED_MARGIN)


def determined(edges: Array, spec: NCutSpec, agreement: Array | None = None) -> Array:
    """Say which graphs' masks are the same from every solver: bool (B,).

    Besides the well-posed ones, those in which all or no pairs are joined: every token by rule.
    """
    xp = array_namespace(edges)
    pairs = edges.shape[1] * (edges.shape[1] - 1)
    joined = pairs_joined(xp, edges)
    return well_posed(edges, spec, agreement) | (joined == 0) | (joined == pairs)


def fiedler_iterative(edges: Array, spec: NCutSpec) -> Fiedler:
    """Square a filter that keeps the wanted eigenvector until it has rank one.

    For a positive semidefinite rank-one matrix the column of the largest diagonal entry is the
    eigenvector, with its largest entry positive.
    """
    xp = array_namespace(edges)
    identity = xp.astype(identity_of(xp, edges), xp.float32)
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


def _laplacian(edges: Array, spec: NCutSpec, dtype: Any) -> tuple[Array, Array]:
    """Return L = diag(s) (diag(d) - A) diag(s), s = 1 / (sqrt(d) + eps), and its null vector."""
    xp = array_namespace(edges)
    joined = xp.astype(edges, dtype)
    affinity = joined + spec.eps * (1 - joined)
    root = xp.sqrt(xp.sum(affinity, axis=2)) + spec.eps
    degree = xp.sum(affinity, axis=2)
    identity = xp.astype(identity_of(xp, edges), dtype)
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


def _lower_triangle(xp: Any, edges: Array) -> Array:
    index = xp.arange(edges.shape[1], device=device(edges))
    return index[:, None] >= index[None, :]


def _frobenius(xp: Any, matrix: Array) -> Array:
    """Return the norm of each matrix, (B, 1, 1), never zero."""
    return xp.clip(xp.sqrt(xp.sum(matrix * matrix, axis=(1, 2), keepdims=True)), min=1e-30)
