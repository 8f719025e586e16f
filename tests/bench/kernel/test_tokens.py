"""The made-up tokens: the same every time, and of the kinds that real tokens are."""

import numpy as np
import pytest

from microclip_deploy.bench.kernel.exact_masks import exact_masks
from microclip_deploy.bench.kernel.tokens import exact_values, stored, vit_tokens
from microclip_deploy.ncut.spec import NCutSpec


def test_the_same_seed_gives_the_same_tokens_and_another_does_not() -> None:
    first, again, other = (vit_tokens(3, 50, 96, seed=seed) for seed in (1, 1, 2))
    assert (first.dtype, first.shape) == (np.dtype(np.float32), (3, 50, 96))
    assert np.isfinite(first).all()  # 50 tokens fill no square
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_tokens_are_rows_after_a_layer_norm_with_uneven_gains() -> None:
    tokens = vit_tokens(8, 196, 768, seed=0)
    gains = tokens.reshape(-1, 768).std(axis=0)
    assert 0.7 < (tokens * tokens).sum(axis=2).mean() / 768 < 1.6
    assert gains.max() > 1.5 * gains.min()


def test_the_graphs_are_of_every_kind() -> None:
    tokens = exact_values(stored(vit_tokens(64, 49, 768, seed=3), "float16"))
    graphs = exact_masks(tokens, NCutSpec())
    assert 0.02 < graphs.apart() < 0.5
    assert 0.02 < graphs.complete.mean() < 0.5
    assert graphs.binding.mean() > 0.5
    assert 0.4 < graphs.edges.mean() < 0.95
    assert graphs.mask.any(axis=1).all()


def test_bfloat16_is_rounded_to_the_nearest_and_to_even() -> None:
    between = np.array([[[1.0, 1.00390625, 1.01171875, -1.0040]]], np.float32)
    rounded = exact_values(stored(between, "bfloat16"))
    np.testing.assert_array_equal(rounded, [[[1.0, 1.0, 1.015625, -1.0078125]]])


@pytest.mark.parametrize(
    ("dtype", "step"), [("float32", 0.0), ("float16", 5e-4), ("bfloat16", 4e-3)]
)
def test_stored_tokens_are_off_by_half_a_step_at_most(dtype: str, step: float) -> None:
    tokens = vit_tokens(1, 16, 64, seed=0)
    difference = np.abs(exact_values(stored(tokens, dtype)) - tokens)
    assert (difference <= step * np.abs(tokens) + 1e-7).all()
