"""The rules of threshold, side and fallback, against what they say in plain Python."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from microclip_deploy.errors import UsageError
from microclip_deploy.ncut.foreground import Saliency, agreement_with
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import adjacency, determined, saliency_exact, saliency_iterative
from tests.ncut.test_conformance import case

Floats = NDArray[np.float32]
RULES = [
    pytest.param(NCutSpec.model_validate(rule), id="-".join(rule.values()))
    for rule in (
        {"threshold": threshold, "side": side}
        for threshold, side in product(("std", "mean", "otsu"), ("seed", "border", "cls", "object"))
    )
]
SOLVERS: dict[str, Callable[..., Saliency]] = {
    "numpy exact": saliency_exact,
    "numpy iterative": saliency_iterative,
    "torch exact": lambda x, spec, a: saliency_exact(t(x), spec, t(a)),
    "torch iterative": lambda x, spec, a: saliency_iterative(t(x), spec, t(a)),
}


def t(array: Floats) -> torch.Tensor:
    return torch.from_numpy(array)


def seen(size: int) -> tuple[Floats, Floats]:
    """Return golden tokens, and the agreement of each with a made-up [CLS]."""
    tokens = case(size, "tokens")
    direction = tokens.mean(axis=1) + np.random.default_rng(0).normal(size=tokens[:, 0].shape)
    return tokens, np.asarray(agreement_with(direction.astype(np.float32), tokens))


def level(entries: NDArray[Any], threshold: str) -> float:
    if threshold != "otsu":
        return float(entries.mean() if threshold == "mean" else entries.std(ddof=1))
    ordered = np.sort(entries)
    within = [k * ordered[:k].var() + (len(ordered) - k) * ordered[k:].var()
              for k in range(1, len(ordered))]  # fmt: skip
    return float(ordered[np.argmin(within)])


def score(side: NDArray[np.bool_], agreement: NDArray[Any], rule: str) -> float:
    """Return what a side is chosen by: its agreement with [CLS], less its share of the border."""
    width = math.isqrt(len(side))
    grid = np.zeros((width, width), bool)
    grid[[0, -1]] = grid[:, [0, -1]] = True
    border = grid.ravel()
    found = float(agreement[side].mean()) if rule in ("cls", "object") else 0.0
    return found - (side[border].mean() if rule in ("border", "object") else 0)


@pytest.mark.parametrize("spec", RULES)
def test_masks_are_what_the_rules_say(spec: NCutSpec) -> None:
    tokens, agreement = seen(49)
    posed = determined(adjacency(tokens, spec), spec, agreement)
    exact = saliency_exact(tokens.astype(np.float64), spec, agreement)
    assert posed.mean() > 0.7
    for image in np.flatnonzero(posed & ~exact.degenerate):
        entries = exact.vector[image]
        inside = entries > level(entries, spec.threshold)
        scores = [score(part, agreement[image], spec.side) for part in (inside, ~inside)]
        expected = ~inside if spec.side != "seed" and scores[1] > scores[0] else inside
        np.testing.assert_array_equal(exact.mask[image], expected)
    assert exact.mask[exact.degenerate].all()
    for name, solve in SOLVERS.items():
        found = np.asarray(solve(tokens, spec, agreement).mask)
        np.testing.assert_array_equal(found[posed], exact.mask[posed], err_msg=name)


@pytest.mark.parametrize("size", [196, 576])
def test_solvers_agree_on_larger_images(size: int) -> None:
    tokens, agreement = (part[::4] for part in seen(size))
    spec = NCutSpec(threshold="otsu", side="object")
    posed = determined(adjacency(tokens, spec), spec, agreement)
    exact, found = (f(tokens, spec, agreement) for f in (saliency_exact, saliency_iterative))
    assert posed.mean() > 0.6
    np.testing.assert_array_equal(found.mask[posed], exact.mask[posed])


def test_the_side_of_cls_moves_with_the_tokens() -> None:
    tokens, agreement = seen(49)
    spec = NCutSpec(threshold="otsu", side="cls")
    posed = determined(adjacency(tokens, spec), spec, agreement)
    order = np.random.default_rng(1).permutation(49)
    moved = saliency_exact(tokens[:, order], spec, agreement[:, order]).mask
    expected = saliency_exact(tokens, spec, agreement).mask[:, order]
    np.testing.assert_array_equal(moved[posed], expected[posed])


def test_what_a_rule_needs_is_asked_for() -> None:
    tokens = case(49, "tokens")[:1]
    with pytest.raises(UsageError, match="agreement_with"):
        saliency_exact(tokens, NCutSpec(side="cls"))
    with pytest.raises(UsageError, match="a square number"):
        saliency_exact(tokens[:, :48], NCutSpec(side="border"))


def test_agreement_is_a_cosine() -> None:
    tokens, agreement = seen(49)
    assert agreement.dtype == np.float32
    assert np.abs(agreement).max() <= 1 + 1e-6
    same, zero = agreement_with(tokens[:, 7], tokens)[:, 7], ~tokens[:, 7].any(axis=1)
    np.testing.assert_allclose(same[~zero], 1, atol=1e-6)
    assert (same[zero] == 0).all()
