"""Class frequencies without labels, where the truth is known."""

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.adapt.frequencies import estimate, summary, warning
from microclip_deploy.adapt.train_step import AdaptConfig


def calibrated(truth: NDArray[np.float64], photos: int, seed: int) -> NDArray[np.float32]:
    """Draw photos of Gaussian classes; return the probabilities for equally frequent classes."""
    rng, classes = np.random.default_rng(seed), len(truth)
    labels = rng.choice(classes, photos, p=truth)
    seen = 2 * np.eye(classes)[labels] + rng.standard_normal((photos, classes))
    logits = 2 * seen  # log density ratio of unit Gaussians at distance 2
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: NDArray[np.float32] = (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
    return found


def test_frequencies_come_out_of_calibrated_probabilities() -> None:
    truth = np.array([0.6, 0.2, 0.1, 0.06, 0.04])
    rows = calibrated(truth, 20_000, 0)
    found = estimate(lambda: iter([rows[:7_000], rows[7_000:]]))
    assert abs(found.sum() - 1) < 1e-9
    assert np.abs(found - truth).sum() < 0.04
    assert np.abs(rows.mean(axis=0) - truth).sum() > 0.2  # what the plain mean says


def test_a_recipe_that_contradicts_the_folder_is_warned_of() -> None:
    even, tail = np.full(10, 0.1), np.array([0.91, *[0.01] * 9])
    published, free = AdaptConfig(), AdaptConfig(fairness_weight=0)
    assert "--recipe default" in (warning(tail, 500, published) or "")
    assert warning(even, 500, published) is None
    assert warning(tail, 500, free) is None
    assert warning(tail, 500, AdaptConfig(fairness_prior="estimated")) is None
    assert warning(tail, 9, published) is None  # fewer photos than classes tell nothing
    assert "too few" in summary(tail, list("abcdefghij"), 9)
    assert "1 most frequent hold 91%" in summary(tail, list("abcdefghij"), 500)


def test_photos_of_one_class_are_found_out() -> None:
    rows = calibrated(np.array([0.0, 1.0, 0.0]), 500, 1)
    assert estimate(lambda: iter([rows])).argmax() == 1
    assert estimate(lambda: iter([rows])).max() > 0.95
