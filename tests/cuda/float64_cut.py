"""What float64 says about given graphs, and for which of them no rounding can change it."""

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from array_api_compat import array_namespace
from numpy.typing import NDArray

from microclip_deploy.cuda.layout import KernelLayout
from microclip_deploy.ncut.foreground import Fiedler, Saliency, bipartition, margin, pairs_joined
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import WELL_POSED_GAP, WELL_POSED_MARGIN, _laplacian, _one_thread
from tests.cuda.kernels_on_cpu import Facts, cut_edges

Bools = NDArray[np.bool_]

PARTS_GAP = 1e-4
"""Share of λ3 that λ3 - λ2 must exceed in a graph of parts, where both are of the order of eps.
As in test_conformance.py, to which the margins of section 9 are added."""


class Verdict(NamedTuple):
    """The exact cut of each graph, and what binds a float32 solver to it."""

    mask: Bools
    """(B, N)."""
    degenerate: Bools
    """(B,)."""
    complete: Bools
    """(B,)."""
    well_posed: Bools
    """(B,): as steps.well_posed says."""
    determined: Bools
    """(B,): and those of all or no pairs, too."""
    relative_gap: NDArray[np.float64]
    """(B,): (λ3 - λ2) / λ3."""
    margins_hold: Bools
    """(B,): level and orientation are further from a tie than WELL_POSED_MARGIN."""


class Comparison(NamedTuple):
    """A batch of graphs, cut by the kernel and exactly."""

    kernel: Saliency
    facts: Facts
    exact: Verdict
    binding: Bools
    """(B,): where the kernel's mask must be the exact one."""

    def wrong(self) -> NDArray[np.intp]:
        """Return the numbers of binding graphs whose mask is another."""
        return np.flatnonzero((self.kernel.mask != self.exact.mask).any(axis=1) & self.binding)


def exact_cut(edges: Bools, spec: NCutSpec) -> Verdict:
    """Cut bool (B, N, N) graphs by dense float64 eigendecomposition.

    As fiedler_exact, well_posed and determined of steps.py, which each decompose for themselves; a
    test holds them together.
    """
    joined = torch.from_numpy(edges)
    xp = array_namespace(joined)
    laplacian, _ = _laplacian(joined, spec, xp.float64)
    with _one_thread(laplacian):
        values, vectors = torch.linalg.eigh(laplacian)
    first, second, third, largest = values[:, [0, 1, 2, -1]].T
    simple = third - second > spec.gap_tolerance * third
    fiedler = Fiedler(vectors[:, :, 1], simple, torch.zeros_like(second))
    tokens = torch.zeros((*edges.shape[:2], 1))
    found = bipartition(tokens, joined, fiedler, spec.tie_tolerance, spec)
    margins = margin(found.vector, spec) > WELL_POSED_MARGIN
    posed = margins & (torch.minimum(second - first, third - second) > WELL_POSED_GAP * largest)
    no_pair = pairs_joined(xp, joined) == 0
    return Verdict(
        found.mask.numpy(),
        found.degenerate.numpy(),
        found.complete.numpy(),
        posed.numpy(),
        (posed | found.complete | no_pair).numpy(),
        ((third - second) / third).numpy(),
        margins.numpy(),
    )


def compare(layout: KernelLayout, edges: Bools) -> Comparison:
    """Cut graphs both ways, side by side."""
    with ThreadPoolExecutor(1) as other:
        exact_later = other.submit(exact_cut, edges, layout.spec)
        kernel, facts = cut_edges(layout, edges)
        exact = exact_later.result()
    in_parts = facts.components > 1
    parts_decided = in_parts & ~exact.degenerate & (exact.relative_gap > PARTS_GAP)
    parts_decided &= exact.margins_hold
    for image in np.flatnonzero(parts_decided & kernel.degenerate):
        parts_decided[image] = not densest_parts_tie(edges[image])
    return Comparison(kernel, facts, exact, exact.determined | parts_decided)


def densest_parts_tie(edges: Bools) -> bool:
    """Say whether parts of a graph (N, N) share the largest mean degree exactly.

    To the first order of eps three of them have no second eigenvector and two of them stand
    opposite, tied where their peaks are equal: every token by rule (section 2.4). Float64 also sees
    the second order, from what binds each part inside, and may decide such a graph.
    """
    reach = (edges | np.eye(len(edges), dtype=bool)).astype(np.float32)
    for _ in range(len(edges).bit_length()):  # paths twice as long each time
        reach = np.minimum(reach @ reach, 1)
    parts = np.unique(reach, axis=0)
    sizes, degrees = parts.sum(axis=1).astype(int), (parts @ edges.sum(axis=1)).astype(int)
    means = [Fraction(int(d), int(n)) for d, n in zip(degrees, sizes, strict=True)]
    return means.count(max(means)) >= 2
