"""The kernel of the cut against float64 on random graphs of many kinds, run on the CPU.

`make verify-kernel` tries twenty times as many and prints a table.
"""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from microclip_deploy.cuda.layout import Device, KernelLayout
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import determined, fiedler_exact, well_posed
from tests.cuda.float64_cut import Comparison, compare, exact_cut
from tests.cuda.kernels_on_cpu import cut_edges, require_compiler
from tests.ncut.graphs import FAMILIES, multiple_graphs, shuffled, tied_graphs

GRAPHS = int(os.environ.get("NCUT_GRAPHS", "1000"))
"""Random graphs in all; `make verify-kernel` sets it."""
SHARES = {49: 0.62, 196: 0.26, 256: 0.09, 576: 0.03}
"""Of each number of tokens."""
BATCH = 64
"""Graphs that are in memory at one time."""
DEVICE = Device(90, 232448)
SPEC = NCutSpec()
CASES = [(count, family) for count in SHARES for family in FAMILIES]
STRUCTURED = [
    (count, name) for count in SHARES for name in (*multiple_graphs(count), *tied_graphs(count))
]


@pytest.fixture(scope="module", autouse=True)
def _needs_a_compiler() -> None:
    require_compiler()


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Collect a line a family and print them all; pytest -s shows them."""
    flags, steps = "degenerate: kernel only  exact only", "steps p50  p90  max"
    head = f"graphs  well-posed  binding  wrong  {flags}  {steps}"
    lines = [f"{'N':>4}  {'family':14}  {head}"]
    yield lines
    print("", *lines, sep="\n")


def layout(count: int) -> KernelLayout:
    return KernelLayout(count, 16, "float32", SPEC, DEVICE)


def outcome(count: int, family: str) -> list[Comparison]:
    """Return the batches of a family."""
    left = max(1, round(GRAPHS * SHARES[count] / len(FAMILIES)))
    rng = np.random.default_rng([count, *family.encode()])
    sizes = [BATCH] * (left // BATCH) + [left % BATCH] * (left % BATCH > 0)
    return [compare(layout(count), FAMILIES[family](rng, size, count)) for size in sizes]


def row(count: int, family: str, found: list[Comparison]) -> str:
    """Return one line of the table."""
    kernel = np.concatenate([part.kernel.degenerate for part in found])
    exact = np.concatenate([part.exact.degenerate for part in found])
    steps = np.concatenate([part.facts.steps for part in found])
    numbers = [
        (len(kernel), 6),
        (sum(int(part.exact.well_posed.sum()) for part in found), 10),
        (sum(int(part.binding.sum()) for part in found), 7),
        (sum(len(part.wrong()) for part in found), 5),
        (int((kernel & ~exact).sum()), 23),
        (int((exact & ~kernel).sum()), 10),
        *zip(np.percentile(steps, [50, 90, 100]).astype(int), (9, 3, 3), strict=True),
    ]
    return f"{count:4}  {family:14}  " + "  ".join(f"{number:{width}}" for number, width in numbers)


@pytest.mark.parametrize(("count", "family"), CASES)
def test_masks_are_those_of_float64(count: int, family: str, table: list[str]) -> None:
    found = outcome(count, family)
    table.append(row(count, family, found))
    assert [part.wrong().tolist() for part in found] == [[] for _ in found]
    for part in found:
        assert_consistent(part)


def assert_consistent(part: Comparison) -> None:
    """Hold the outputs of a batch against one another."""
    kernel, facts = part.kernel, part.facts
    assert kernel.mask.any(axis=1).all(), "expected no empty mask"
    assert np.isfinite(kernel.vector).all()
    assert np.isfinite(kernel.residual).all()
    assert kernel.mask[kernel.degenerate].all()
    assert (kernel.vector[kernel.degenerate] == 0).all()
    lengths = np.linalg.norm(kernel.vector[~kernel.degenerate], axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)  # float32 sums of up to 576 squares
    np.testing.assert_array_equal(kernel.complete, part.exact.complete)
    np.testing.assert_array_equal(facts.salient, kernel.mask.sum(axis=1))
    for mask, rows, count in zip(kernel.mask, facts.rows, facts.salient, strict=True):
        np.testing.assert_array_equal(rows[:count], np.flatnonzero(mask))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [49, 196])
def test_masks_move_with_the_tokens(count: int, family: str) -> None:
    rng = np.random.default_rng(count)
    edges = FAMILIES[family](rng, 8, count)
    order = rng.permutation(count)
    found = compare(layout(count), edges)
    moved, _ = cut_edges(layout(count), shuffled(edges, order))
    expected = found.kernel.mask[:, order]
    np.testing.assert_array_equal(moved.mask[found.binding], expected[found.binding])


@pytest.mark.parametrize(("count", "name"), STRUCTURED)
def test_undefined_vectors_give_every_token(count: int, name: str) -> None:
    graphs = {**multiple_graphs(count), **tied_graphs(count)}
    orders = [np.arange(count), *orders_of(count, 2 if count < 300 else 1)]
    edges = np.stack([shuffled(graphs[name], order) for order in orders])
    found, _ = cut_edges(layout(count), edges)
    assert found.degenerate.all(), f"found {found.degenerate} for orders of the tokens"
    assert found.mask.all()


def orders_of(count: int, many: int) -> list[NDArray[np.intp]]:
    rng = np.random.default_rng(count)
    return [rng.permutation(count) for _ in range(many)]


@pytest.mark.parametrize("count", [49, 196])
def test_the_structured_graphs_are_undefined_in_float64(count: int) -> None:
    multiple, tied = multiple_graphs(count), tied_graphs(count)
    found = exact_cut(np.stack([*multiple.values(), *tied.values()]), SPEC)
    assert found.degenerate.all()
    assert (found.relative_gap[: len(multiple)] < 1e-8).all()
    assert (found.relative_gap[len(multiple) :] > 1e-4).all()


def test_one_decomposition_says_what_the_definitions_say() -> None:
    rng = np.random.default_rng(0)
    edges = np.concatenate([family(rng, 4, 49) for family in FAMILIES.values()])
    found, joined = exact_cut(edges, SPEC), torch.from_numpy(edges)
    np.testing.assert_array_equal(found.well_posed, well_posed(joined, SPEC))
    np.testing.assert_array_equal(found.determined, determined(joined, SPEC))
    simple = fiedler_exact(joined, SPEC).simple.numpy()
    assert (found.degenerate | simple).all()
    assert found.well_posed.mean() > 0.5


@pytest.mark.parametrize("count", [49, 196])
def test_one_absent_edge_gives_every_token_wherever_it_is(count: int) -> None:
    edges = tied_graphs(count)["complete without an edge"]
    moved = np.stack([shuffled(edges, order) for order in orders_of(count, 40)])
    found, _ = cut_edges(layout(count), moved)
    assert found.degenerate.all(), f"found {found.degenerate.sum()} of {len(moved)}"
