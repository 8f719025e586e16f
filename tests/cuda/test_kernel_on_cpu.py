"""The kernels of the cut on every golden graph, run on the CPU from the unchanged sources."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from microclip_deploy.cuda.layout import Device, KernelLayout
from microclip_deploy.cuda.source import TOKEN_TYPES, TokenType
from microclip_deploy.ncut.foreground import Saliency
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import saliency_exact
from tests.cuda.kernels_on_cpu import (
    Facts,
    affinity,
    cut_bits,
    cut_edges,
    require_compiler,
    unpacked,
)
from tests.ncut.graphs import FAMILIES, bright_tokens, layer_norm_tokens

CASES = np.load(Path(__file__).parent.parent / "vectors" / "ncut_cases.npz")
SIZES = (49, 196, 256, 576)
SPEC = NCutSpec()
HOPPER = Device(90, 232448)
GOLDEN: list[tuple[int, TokenType]] = [(size, "float32") for size in SIZES]
GOLDEN += [(196, "float16"), (196, "bfloat16")]
UNDEFINED = ("complete", "empty", "star", "ring_symmetric")
ORDERS = (1, 2, 3)
"""Of the threads: descending, and two random ones; 0 is ascending."""


@pytest.fixture(scope="module", autouse=True)
def _needs_a_compiler() -> None:
    require_compiler()


def case(size: int, name: str) -> Any:
    return CASES[f"n{size}/{name}"]


def stored(tokens: NDArray[np.float32], token: TokenType) -> NDArray[Any]:
    """Return tokens in a type, bfloat16 as its bits. Golden tokens lose nothing."""
    if token != "bfloat16":
        return tokens.astype(token)
    return torch.from_numpy(tokens).bfloat16().view(torch.uint16).numpy()


@cache
def golden(size: int, token: TokenType) -> tuple[NDArray[np.uint32], Saliency, Facts]:
    """Return bits and cut of the golden tokens."""
    tokens = case(size, "tokens")
    layout = KernelLayout(size, tokens.shape[2], token, SPEC, HOPPER)
    bits, defects = affinity(layout, stored(tokens, token))
    assert not defects.any()
    return bits, *cut_bits(layout, bits, defects)


@pytest.mark.parametrize("size", SIZES)
def test_golden_tokens_are_exact_in_every_type(size: int) -> None:
    tokens = case(size, "tokens")
    for token in TOKEN_TYPES:
        held = torch.from_numpy(tokens).to(getattr(torch, token)).float().numpy()
        np.testing.assert_array_equal(held, tokens)


@pytest.mark.parametrize(("size", "token"), GOLDEN)
def test_bits_are_the_golden_graph(size: int, token: TokenType) -> None:
    layout = KernelLayout(size, 16, token, SPEC, HOPPER)
    found = unpacked(layout, golden(size, token)[0])
    bits = np.unpackbits(case(size, "edges_bits"), axis=1)[:, : size * size]
    np.testing.assert_array_equal(found[:, :size, :size], bits.reshape(-1, size, size))
    assert not found[:, size:].any(), "expected no bits in rows past the last token"
    assert not found[:, :, size:].any(), "expected no bits in columns past the last token"


@pytest.mark.parametrize(("size", "token"), GOLDEN)
def test_golden_masks(size: int, token: TokenType) -> None:
    _, found, facts = golden(size, token)
    posed, kind = case(size, "well_posed"), case(size, "kind")
    np.testing.assert_array_equal(found.mask[posed], case(size, "mask")[posed])
    undefined = np.isin(kind, UNDEFINED)
    assert found.mask[undefined].all()
    assert found.degenerate[undefined].all()
    assert (found.residual[posed] < SPEC.lanczos_residual).all()
    assert (facts.steps[found.complete] == 0).all()


@pytest.mark.parametrize("token", TOKEN_TYPES)
def test_bright_tokens_are_cut_in_every_type(token: TokenType) -> None:
    layout = KernelLayout(196, 768, token, SPEC, HOPPER)
    bits, defects = affinity(layout, stored(bright_tokens(), token))
    found, _ = cut_bits(layout, bits, defects)
    np.testing.assert_array_equal(found.mask[0], np.arange(196) < 49)


@pytest.mark.parametrize("size", SIZES)
def test_golden_flags_are_those_of_float64(size: int) -> None:
    found = golden(size, "float32")[1]
    exact = saliency_exact(torch.from_numpy(case(size, "tokens")), SPEC)
    np.testing.assert_array_equal(found.degenerate, exact.degenerate)
    np.testing.assert_array_equal(found.complete, exact.complete)


# ------------------------------------------------------------------------------ order of threads


@pytest.mark.parametrize("count", [49, 196, 577])
def test_the_cut_does_not_depend_on_the_order_of_threads(count: int) -> None:
    layout = KernelLayout(count, 16, "float32", SPEC, HOPPER)
    each = 3 if count < 300 else 1
    rng = np.random.default_rng(count)
    edges = np.concatenate([family(rng, each, count) for family in FAMILIES.values()])
    first = cut_edges(layout, edges)
    for order in ORDERS:
        assert_same_bits(first, cut_edges(layout, edges, order=order))


@pytest.mark.parametrize("name", ["dot", "cosine", "centered_cosine"])
@pytest.mark.parametrize("token", TOKEN_TYPES)
def test_the_affinity_does_not_depend_on_the_order_of_threads(token: TokenType, name: Any) -> None:
    spec = NCutSpec(affinity=name)
    layout = KernelLayout(100, 144, token, spec, HOPPER)
    tokens = stored(layer_norm_tokens(np.random.default_rng(0), 2, 100, 144), token)
    first = affinity(layout, tokens)
    for order in ORDERS:
        again = affinity(layout, tokens, order=order)
        np.testing.assert_array_equal(again[0], first[0])
        np.testing.assert_array_equal(again[1], first[1])


def assert_same_bits(expected: tuple[Saliency, Facts], found: tuple[Saliency, Facts]) -> None:
    others = found[0]._asdict() | found[1]._asdict()
    for name, values in (expected[0]._asdict() | expected[1]._asdict()).items():
        same = values.tobytes() == others[name].tobytes()
        assert same, f"expected the same {name} in any order of the threads"


# ------------------------------------------------------------------------------ no numbers


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", TOKEN_TYPES)
def test_tokens_that_are_no_numbers_give_every_token_of_their_image_only(
    token: TokenType, bad: float
) -> None:
    tokens = case(196, "tokens")[:4].copy()
    layout = KernelLayout(196, tokens.shape[2], token, SPEC, HOPPER)
    expected = cut_bits(layout, *affinity(layout, stored(tokens, token)))[0]
    for place in (0, 70, 195):
        broken = tokens.copy()
        broken[1, place, 5] = bad
        bits, defects = affinity(layout, stored(broken, token))
        found = cut_bits(layout, bits, defects)[0]
        assert found.mask[1].all()
        assert found.degenerate[1]
        assert (found.vector[1] == 0).all()
        np.testing.assert_array_equal(found.mask[[0, 2, 3]], expected.mask[[0, 2, 3]])
        np.testing.assert_array_equal(found.vector[[0, 2, 3]], expected.vector[[0, 2, 3]])


def test_values_whose_squares_overflow_float32_are_no_numbers() -> None:
    tokens = case(49, "tokens")[:1].copy()
    tokens[0, 3, 0] = 1e30
    layout = KernelLayout(49, tokens.shape[2], "float32", SPEC, HOPPER)
    found = cut_bits(layout, *affinity(layout, tokens))[0]
    assert found.degenerate[0]
    assert found.mask[0].all()
