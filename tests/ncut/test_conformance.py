"""Every implementation of the cut on every golden graph (docs/numerics.md section 2)."""

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from microclip_deploy.errors import UsageError
from microclip_deploy.model.saliency import saliency
from microclip_deploy.ncut.foreground import Fiedler, Saliency, bipartition
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import (
    _laplacian,
    adjacency,
    fiedler_exact,
    fiedler_iterative,
    saliency_exact,
    saliency_iterative,
    well_posed,
)
from tests.ncut.graphs import bright_tokens

CASES = np.load(Path(__file__).parent.parent / "vectors" / "ncut_cases.npz")
SIZES = (49, 196, 256, 576)
SPEC = NCutSpec()

Implementation = Callable[[Any], Saliency]


def implementation(
    solver: Callable[..., Saliency], convert: Callable[[Any], Any]
) -> Implementation:
    return lambda tokens: solver(convert(tokens), SPEC)


IMPLEMENTATIONS = {
    "numpy float64 exact": implementation(saliency_exact, lambda x: x.astype(np.float64)),
    "numpy float32 exact": implementation(saliency_exact, lambda x: x),
    "torch float64 exact": implementation(saliency_exact, lambda x: torch.from_numpy(x).double()),
    "torch float32 exact": implementation(saliency_exact, torch.from_numpy),
    "numpy float32 iterative": implementation(saliency_iterative, lambda x: x),
    "torch float32 iterative": implementation(saliency_iterative, torch.from_numpy),
}
EXACT = [name for name in IMPLEMENTATIONS if "exact" in name]

# Complete, edgeless and exactly symmetric graphs: the eigenvector does not exist.
UNDEFINED = ("complete", "empty", "star", "ring_symmetric")


# One source serves both array libraries: the largest graphs are cut by one of them.
RUNS = [
    (name, size)
    for size in SIZES
    for name in IMPLEMENTATIONS
    if size < 576 or name in ("torch float64 exact", "torch float32 iterative")
]


@lru_cache
def result(name: str, size: int) -> Saliency:
    """Return what an implementation says about all graphs of a size."""
    return IMPLEMENTATIONS[name](case(size, "tokens"))


def case(size: int, name: str) -> Any:
    return CASES[f"n{size}/{name}"]


@pytest.mark.parametrize(("name", "size"), RUNS)
def test_golden_masks(name: str, size: int) -> None:
    found = result(name, size)
    mask = np.asarray(found.mask)
    decided = case(size, "well_posed")
    if name in EXACT:
        decided = decided | case(size, "well_posed_f64")
    np.testing.assert_array_equal(mask[decided], case(size, "mask")[decided])
    undefined = np.isin(case(size, "kind"), UNDEFINED)
    assert mask[undefined].all()
    assert np.asarray(found.degenerate)[undefined].all()
    assert mask.any(axis=1).all()
    assert np.isfinite(np.asarray(found.vector)).all()


@pytest.mark.parametrize(("name", "size"), RUNS)
def test_mask_is_the_same_again_and_in_another_batch(name: str, size: int) -> None:
    few = slice(0, None, 7)
    again = IMPLEMENTATIONS[name](case(size, "tokens")[few])
    np.testing.assert_array_equal(np.asarray(result(name, size).mask)[few], again.mask)


@pytest.mark.parametrize("size", SIZES[:3])
@pytest.mark.parametrize("name", EXACT)
def test_exact_mask_moves_with_the_tokens(name: str, size: int) -> None:
    order = np.random.default_rng(size).permutation(size)
    tokens = case(size, "tokens")
    found = np.asarray(result(name, size).mask)
    moved = np.asarray(IMPLEMENTATIONS[name](np.ascontiguousarray(tokens[:, order])).mask)
    np.testing.assert_array_equal(moved, found[:, order])


@pytest.mark.parametrize("size", SIZES)
def test_graph_equals_the_reference(size: int) -> None:
    bits = np.unpackbits(case(size, "edges_bits"), axis=1)[:, : size * size]
    found = adjacency(case(size, "tokens"), SPEC)
    np.testing.assert_array_equal(found, bits.reshape(-1, size, size).astype(bool))


@pytest.mark.parametrize("size", SIZES)
def test_exact_vector_equals_the_reference(size: int) -> None:
    decided = case(size, "well_posed_f64")
    found = saliency_exact(case(size, "tokens").astype(np.float64), SPEC).vector
    # The gap of a disconnected graph is 1e-6, which leaves 1e-9 of 1e-16 rounding.
    np.testing.assert_allclose(found[decided], case(size, "fiedler")[decided], atol=1e-8)


def test_mask_ignores_the_sign_of_the_eigenvector(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = case(49, "tokens").astype(np.float64)
    expected = saliency_exact(tokens, SPEC).mask

    def flipped(edges: Any, spec: NCutSpec) -> Any:
        found = fiedler_exact(edges, spec)
        return found._replace(vector=-found.vector)

    monkeypatch.setattr("microclip_deploy.ncut.steps.fiedler_exact", flipped)
    np.testing.assert_array_equal(saliency_exact(tokens, SPEC).mask, expected)


@pytest.mark.parametrize("solver", [saliency_exact, saliency_iterative, saliency])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_bright_tokens_are_cut_in_every_type(library: str, dtype: str, solver: Any) -> None:
    if library == "numpy" and dtype == "bfloat16":
        pytest.skip("NumPy has no bfloat16")
    tokens = torch.from_numpy(bright_tokens()).to(getattr(torch, dtype))
    found = solver(tokens if library == "torch" else tokens.numpy(), SPEC)
    np.testing.assert_array_equal(np.asarray(found.mask)[0], np.arange(196) < 49)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_tokens_that_are_no_numbers_give_every_token_of_their_image_only(bad: float) -> None:
    tokens = case(49, "tokens")[:3].copy()
    expected = saliency_exact(tokens, SPEC).mask
    tokens[1, 5, 2] = bad
    with np.errstate(invalid="ignore"):
        found = saliency(tokens, SPEC)
    assert found.mask[1].all()
    assert found.degenerate[1]
    np.testing.assert_array_equal(found.mask[[0, 2]], expected[[0, 2]])


def cliques(sizes: tuple[int, ...]) -> Any:
    """Return the edges bool (N, N) of cliques side by side."""
    part = np.repeat(np.arange(len(sizes)), sizes)
    return part[:, None] == part[None, :]


def random_parts(rng: np.random.Generator, sizes: tuple[int, ...], density: float) -> Any:
    """Return cliques of which edges were taken out at random; parts may fall apart further."""
    kept = np.triu(rng.random((sum(sizes), sum(sizes))) < density)
    return (cliques(sizes) & (kept | kept.T)) | np.eye(sum(sizes), dtype=bool)


def graphs_in_parts(count: int) -> Any:
    """Return many graphs (K, N, N) of two and more parts, as outlier tokens make them."""
    rng = np.random.default_rng(count)
    giant = [(1,) * k + (count - k,) for k in (1, 2, 3, 8)]
    mixed = [(count // 2, count // 3, count - count // 2 - count // 3), (2, 3, 5, count - 10)]
    graphs = [cliques(sizes) for sizes in (*giant, *mixed)]
    graphs += [random_parts(rng, sizes, 0.4) for sizes in (*giant, *mixed) for _ in range(4)]
    graphs += [random_parts(rng, (count,), density) for density in (0.01, 0.02, 0.05)]
    order = [rng.permutation(count) for _ in graphs]
    return np.stack([graph[moved][:, moved] for graph, moved in zip(graphs, order, strict=True)])


def cut(solver: Callable[..., Fiedler], edges: Any, tie: float) -> Saliency:
    """Cut given graphs; there are no tokens."""
    tokens = np.zeros((*edges.shape[:2], 1), dtype=np.float32)
    return bipartition(tokens, edges, solver(edges, SPEC), tie, SPEC)


@pytest.mark.parametrize("count", [49, 196])
def test_iterative_solver_decides_graphs_in_parts_as_float64_does(count: int) -> None:
    edges = graphs_in_parts(count)
    exact = cut(fiedler_exact, edges, SPEC.tie_tolerance)
    iterative = cut(fiedler_iterative, edges, SPEC.tie_tolerance_iterative)
    eigenvalues = np.linalg.eigvalsh(_laplacian(edges, SPEC, np.float64)[0])
    decided = ~exact.degenerate & (eigenvalues[:, 2] - eigenvalues[:, 1] > 1e-4 * eigenvalues[:, 2])
    assert (eigenvalues[:, 2] < 1e-2).any(), "no graph of three parts was tried"
    assert decided.mean() > 0.9
    np.testing.assert_array_equal(iterative.mask[decided], exact.mask[decided])


@pytest.mark.parametrize("sizes", [(7,) * 7, (15, 15, 15, 4), (1,) * 49])
def test_three_largest_parts_of_one_size_give_every_token(sizes: tuple[int, ...]) -> None:
    found = cut(fiedler_iterative, cliques(sizes)[None], SPEC.tie_tolerance_iterative)
    assert found.degenerate[0]
    assert found.mask[0].all()


def test_residual_tells_a_vector_from_a_mixture() -> None:
    kind = case(49, "kind")
    found = np.asarray(result("numpy float32 iterative", 49).residual)
    assert (found[case(49, "well_posed")] < 1e-3).all()
    assert (found[np.isin(kind, ("complete", "ring_symmetric"))] > 0.4).all()
    assert (np.asarray(result("numpy float32 exact", 49).residual) == 0).all()


@pytest.mark.parametrize("size", SIZES[:3])
def test_well_posed_is_what_the_vectors_call_so(size: int) -> None:
    edges = adjacency(case(size, "tokens"), SPEC)
    np.testing.assert_array_equal(well_posed(edges, SPEC), case(size, "well_posed"))


def test_complete_graphs_are_counted() -> None:
    found = saliency(case(49, "tokens"), SPEC)
    np.testing.assert_array_equal(found.complete, case(49, "kind") == "complete")


def test_centered_cosine_tells_anisotropic_tokens_apart() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(1, 49, 16)) + 20.0  # a shared component makes every product positive
    tokens[:, :12] += 6 * rng.normal(size=16)
    assert saliency(tokens, SPEC).complete.all()
    centered = saliency(tokens, NCutSpec(affinity="centered_cosine"))
    assert not centered.degenerate.any()
    np.testing.assert_array_equal(centered.mask[0], np.arange(49) < 12)


def test_cosine_affinity_ignores_the_length_of_tokens() -> None:
    tokens = case(49, "tokens").astype(np.float64)[:10]
    spec = NCutSpec(affinity="cosine")
    scaled = tokens * np.random.default_rng(0).uniform(0.5, 2, (10, 49, 1))
    np.testing.assert_array_equal(
        saliency_exact(tokens, spec).mask, saliency_exact(scaled, spec).mask
    )


def test_mean_threshold_is_looser_than_the_deviation() -> None:
    tokens = case(49, "tokens").astype(np.float64)[:10]
    by_mean = saliency(tokens, NCutSpec(threshold="mean"))
    by_std = saliency(tokens, SPEC)
    assert (by_mean.mask >= by_std.mask).all()
    center = by_mean.vector.mean(axis=1, keepdims=True)
    np.testing.assert_array_equal(by_mean.mask, by_mean.vector > center)


@pytest.mark.parametrize("shape", [(49, 16), (1, 3, 16)])
def test_shapes_that_are_no_tokens_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="expected floating point"):
        saliency(np.zeros(shape, np.float32), SPEC)


def test_fingerprint_changes_with_every_constant() -> None:
    assert SPEC.fingerprint() == NCutSpec().fingerprint()
    changed = [
        NCutSpec(tau=0.3),
        NCutSpec(eps=1e-5),
        NCutSpec(affinity="cosine"),
        NCutSpec(threshold="mean"),
    ]
    assert len({spec.fingerprint() for spec in [SPEC, *changed]}) == 5


def test_constants_stored_before_a_field_existed_are_read() -> None:
    fields = {"tau": 0.3, "eps": 1e-5}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    stored = {**fields, "fingerprint": hashlib.sha256(canonical.encode()).hexdigest()}
    assert NCutSpec.from_stored(stored) == NCutSpec(tau=0.3, eps=1e-5)
    with pytest.raises(ValueError, match="fingerprint"):
        NCutSpec.from_stored({**stored, "tau": 0.4})
    with pytest.raises(ValueError, match="fingerprint"):
        NCutSpec.from_stored({**stored, "lanczos_restarts": 6})
