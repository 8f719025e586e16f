"""Boundary-preserving targets against the paper's formulas, photo by photo and pair by pair."""

import torch

from microclip_deploy.adapt.boundary import Drift, added, moved, targets
from microclip_deploy.adapt.reference import Support

PHOTOS, CLASSES = 200, 7


def batch(seed: int) -> tuple[torch.Tensor, Support]:
    torch.manual_seed(seed)
    current, zero_shot = (torch.randn(PHOTOS, CLASSES).mul(2).softmax(1) for _ in range(2))
    return current, Support(zero_shot, torch.rand(PHOTOS, CLASSES))


def by_the_paper(current: torch.Tensor, support: Support) -> tuple[list[list[float]], torch.Tensor]:
    """Return unsupported h (photos x classes) and increases g."""
    g, h = torch.zeros_like(current), []
    for i, (p, a, s) in enumerate(zip(current, *support, strict=True)):
        c, b = int(a.argmax()), int(p.argmax())
        g[i] = torch.tensor([max(float(p[j] - a[j]), 0) if j != c else 0 for j in range(CLASSES)])
        correction = b != c and s[b] > s[c]
        h.append([float(s[c] > s[j] and not correction) for j in range(CLASSES)])
    return h, g


def test_targets_are_the_papers() -> None:
    current, support = batch(0)
    found = moved(current, support)
    drift = added(Drift.none(CLASSES, torch.device("cpu")), found)
    unsupported, increase = by_the_paper(current, support)
    origin = support.zero_shot.argmax(1)
    held = torch.tensor(unsupported)
    rates = torch.zeros(CLASSES, CLASSES)
    for c in range(CLASSES):
        mine = origin == c
        shares = (increase * held)[mine].sum(0) / increase[mine].sum(0).clamp(min=1e-30)
        rates[c] = shares
    torch.testing.assert_close(drift.rates(), rates)
    expected = current.clone()
    for i in range(PHOTOS):
        for j in range(CLASSES):
            back = rates[origin[i], j] * held[i, j] * increase[i, j]
            expected[i, origin[i]] += back
            expected[i, j] -= back
    torch.testing.assert_close(targets(current, found, drift.rates()), expected)


def test_targets_are_distributions_and_batches_add_up() -> None:
    parts, drift = [batch(seed) for seed in (1, 2)], Drift.none(CLASSES, torch.device("cpu"))
    for current, support in parts:
        drift = added(drift, moved(current, support))
        taught = targets(current, moved(current, support), drift.rates())
        assert taught.min() >= 0
        torch.testing.assert_close(taught.sum(1), torch.ones(PHOTOS))
    current = torch.cat([current for current, _ in parts])
    both = Support(*(torch.cat(pair) for pair in zip(*(s for _, s in parts), strict=True)))
    whole = added(Drift.none(CLASSES, torch.device("cpu")), moved(current, both))
    for found, expected in zip(drift, whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_nothing_is_given_back_where_nothing_has_moved() -> None:
    current, support = batch(3)
    still = moved(support.zero_shot, support)
    drift = added(Drift.none(CLASSES, torch.device("cpu")), still)
    assert not drift.rates().any()
    torch.testing.assert_close(targets(current, moved(current, support), drift.rates()), current)
