"""The kernel with every rule of threshold and side, against the definition in float64."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from microclip_deploy.cuda.layout import Device, KernelLayout
from microclip_deploy.errors import UsageError
from microclip_deploy.ncut.foreground import bipartition
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import determined, fiedler_exact
from tests.cuda.kernels_on_cpu import cut_edges, require_compiler
from tests.ncut.graphs import FAMILIES, Bools

HOPPER = Device(90, 232448)


def graphs(count: int, each: int) -> tuple[Bools, NDArray[np.float32]]:
    """Return some graphs of every family, with an agreement for each token."""
    rng = np.random.default_rng(count)
    edges = np.concatenate([family(rng, each, count) for family in FAMILIES.values()])
    return edges, rng.uniform(-1, 1, edges.shape[:2]).astype(np.float32)


@pytest.mark.parametrize(
    ("count", "threshold", "side"),
    [
        (4, "otsu", "object"),
        (49, "otsu", "object"),
        (49, "std", "cls"),
        (49, "mean", "border"),
        (64, "otsu", "seed"),
        (196, "otsu", "object"),
        (576, "otsu", "object"),
    ],
)
def test_masks_are_those_of_the_definition(count: int, threshold: Any, side: Any) -> None:
    require_compiler()
    spec = NCutSpec(threshold=threshold, side=side)
    edges, agreement = graphs(count, 6 if count < 128 else 1)
    if count > 500:
        edges, agreement = edges[::4], agreement[::4]
    layout = KernelLayout(count, 16, "float32", spec, HOPPER)
    found, facts = cut_edges(layout, edges, agreement=agreement)
    tokens = np.zeros((*edges.shape[:2], 1))
    exact = bipartition(
        tokens, edges, fiedler_exact(edges, spec), spec.tie_tolerance, spec, agreement
    )
    binding = determined(edges, spec, agreement)
    assert binding.mean() > 0.2
    np.testing.assert_array_equal(found.mask[binding], exact.mask[binding])
    np.testing.assert_array_equal(facts.salient, found.mask.sum(axis=1))


def test_the_rule_does_not_depend_on_the_order_of_threads() -> None:
    require_compiler()
    edges, agreement = graphs(49, 2)
    spec = NCutSpec(threshold="otsu", side="object")
    layout = KernelLayout(49, 16, "float32", spec, HOPPER)
    first, _ = cut_edges(layout, edges, agreement=agreement)
    for order in (1, 2, 3):
        again, _ = cut_edges(layout, edges, agreement=agreement, order=order)
        assert again.mask.tobytes() == first.mask.tobytes()


def test_a_border_needs_a_square_of_tokens() -> None:
    layout = KernelLayout(50, 16, "float32", NCutSpec(side="border"), HOPPER)
    with pytest.raises(UsageError, match="a square number of them"):
        layout.cut_source()
