"""The verdict on photos whose classes are known: clusters of vectors, labelled well and badly."""

import numpy as np
import pytest
from numpy.typing import NDArray

from microclip_deploy.errors import DataError
from microclip_deploy.verdict import harmed, verdict

CLASSES, EACH = 10, 40
TRUTH = np.repeat(np.arange(CLASSES), EACH)


def photos(seed: int = 0) -> NDArray[np.float32]:
    """Return unit vectors that gather around one direction a class."""
    rng = np.random.default_rng(seed)
    seen = np.eye(32)[TRUTH] + 0.15 * rng.standard_normal((len(TRUTH), 32))
    return np.asarray(seen / np.linalg.norm(seen, axis=1, keepdims=True), np.float32)


def mistaken(share: float, seed: int = 1) -> NDArray[np.int64]:
    """Return the true classes with a share of them drawn anew."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(TRUTH)) < share
    return np.where(wrong, rng.integers(0, CLASSES, len(TRUTH)), TRUTH)


def test_fewer_mistakes_are_a_gain_and_more_are_a_loss() -> None:
    better = verdict(photos(), mistaken(0.4), mistaken(0.1), CLASSES)
    worse = verdict(photos(), mistaken(0.1), mistaken(0.4), CLASSES)
    assert better.decision == "adapted"
    assert worse.decision == "keep zero-shot"
    assert better.change is not None
    assert worse.change is not None
    assert better.change > 0 > worse.change
    assert "agree more" in better.sentence()


def test_no_change_cannot_be_told() -> None:
    same = verdict(photos(), mistaken(0.3), mistaken(0.3), CLASSES)
    assert (same.decision, same.changed, same.moves, same.harmed) == ("cannot tell", 0, (), ())


def test_a_collapse_is_never_called_adapted() -> None:
    one = verdict(photos(), mistaken(0.3), np.zeros_like(TRUTH), CLASSES)
    assert one.decision == "keep zero-shot"
    assert one.missing == CLASSES - 1
    assert "collapsed" in one.sentence()


def test_a_class_that_was_torn_from_its_neighbours_is_named() -> None:
    after = TRUTH.copy()
    rng = np.random.default_rng(2)
    after[TRUTH == 3] = rng.integers(0, CLASSES, EACH)
    found = verdict(photos(), TRUTH, after, CLASSES)
    assert 3 in found.harmed
    assert found.moves[0].before == 3
    assert sum(move.photos for move in found.moves) <= EACH


def test_harm_counts_each_photo_once_a_class() -> None:
    before, after = np.array([0, 0, 1]), np.array([0, 1, 1])
    lost = harmed(np.array([1.0, 1.0, 1.0]), np.array([1.0, 0.6, 1.0]), before, after, 3)
    assert lost == (0, 1)  # -0.4 over two photos each; class 2 has none


@pytest.mark.parametrize("count", [1, 2, 50])
def test_few_photos_are_no_ground_for_a_prediction(count: int) -> None:
    few = verdict(photos()[:count], mistaken(0.4)[:count], TRUTH[:count], CLASSES)
    assert (few.decision, few.change) == ("cannot tell", None)
    assert "too few" in few.sentence()


def test_photos_that_are_all_the_same_give_an_answer() -> None:
    same = np.repeat(photos()[:1], len(TRUTH), axis=0)
    zeros = np.zeros_like(TRUTH)
    found = verdict(same, zeros, zeros, CLASSES)
    assert found.decision == "cannot tell"
    assert "one class" in found.sentence()


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(DataError, match="NaN"):
        verdict(np.full_like(photos(), np.nan), TRUTH, TRUTH, CLASSES)
