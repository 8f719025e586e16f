"""Reading logits, and finding how they are read."""

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from microclip_deploy.calibrating import (
    LEAST_ANSWERS,
    MOST_LOGITS,
    calibrate,
    calibrate_with_answers,
    sample,
    share_with_doubt,
)
from microclip_deploy.calibration import (
    LEAST_SHARE,
    Calibration,
    is_unknown,
    probabilities,
    softmax,
)
from microclip_deploy.errors import DataError, VerificationError

KNOWN = Calibration(
    temperature=2.0, mean_prediction=(0.6, 0.3, 0.1), unknown_below=0.5, source="folder", images=9
)

# Temperatures and accuracies from thousands of draws.
DRAWN = 0.08


def drawn(
    count: int, classes: int, temperature: float, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return logits and labels of which the probabilities at a temperature are the truth."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3 * temperature, (count, classes)).astype(np.float32)
    sums = softmax(logits, temperature).cumsum(axis=1)
    labels = (rng.random((count, 1)) > sums).sum(axis=1)
    return logits, np.minimum(labels, classes - 1)


def test_the_bias_divides_the_folders_frequencies_out() -> None:
    logits = np.random.default_rng(0).normal(0, 5, (4, 3)).astype(np.float32)
    wanted = probabilities(logits, KNOWN) / KNOWN.mean_prediction
    found = probabilities(logits + KNOWN.bias(), KNOWN)
    np.testing.assert_allclose(found, wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-5)
    target = np.array([0.1, 0.1, 0.8])
    towards = probabilities(logits + KNOWN.bias(target), KNOWN)
    wanted = wanted * target
    np.testing.assert_allclose(towards, wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-5)
    assert KNOWN.bias().dtype == np.float32
    assert KNOWN.bias(target).mean() == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(KNOWN.bias(np.array(KNOWN.mean_prediction)), 0, atol=1e-6)


def test_a_class_that_was_never_predicted_has_a_finite_bias() -> None:
    never = KNOWN.model_copy(update={"mean_prediction": (1.0, 0.0, 0.0)})
    for bias in (never.bias(), never.bias(np.array([0.0, 0.0, 1.0]))):
        assert np.ptp(bias) <= 2 * 2 * np.log(3 / LEAST_SHARE) + 1e-3


def test_added_classes_are_left_as_they_are_and_removed_ones_leave_the_rest() -> None:
    more = KNOWN.with_classes_added(2)
    np.testing.assert_allclose(more.bias(), [*KNOWN.bias(), 0, 0], atol=1e-4)
    again = more.of_classes([2, 0])
    assert again.mean_prediction == pytest.approx((1 / 7, 6 / 7), abs=1e-5)
    assert (again.temperature, again.unknown_below) == (2.0, 0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0},
        {"temperature": float("nan")},
        {"mean_prediction": (0.6, 0.6, 0.1)},
        {"mean_prediction": (1.2, -0.2)},
        {"mean_prediction": (1.0,)},
        {"unknown_below": 1.1},
        {"source": "elsewhere"},
    ],
)
def test_what_is_no_calibration_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Calibration.model_validate({**KNOWN.model_dump(), **wrong})


def test_without_a_calibration_logits_are_read_at_one_and_nothing_is_unknown() -> None:
    logits = np.zeros((1, 4), np.float32)
    np.testing.assert_array_equal(probabilities(logits, None), softmax(logits))
    assert not is_unknown(1e-9, None)
    assert is_unknown(0.49, KNOWN)
    assert not is_unknown(0.5, KNOWN)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_temperature_gives_the_expected_accuracy(temperature: float) -> None:
    logits, labels = drawn(4000, 20, temperature)
    accuracy = float((logits.argmax(axis=1) == labels).mean())
    found = calibrate(logits, accuracy)
    surest = probabilities(logits, found).max(axis=1)
    assert surest.mean() == pytest.approx(accuracy, abs=1e-4)
    assert found.temperature == pytest.approx(temperature, rel=DRAWN)
    assert 0 < is_unknown(surest, found).mean() <= 0.05
    np.testing.assert_allclose(
        found.mean_prediction, probabilities(logits, found).mean(axis=0), rtol=1e-4
    )


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_answers_find_the_temperature_and_a_threshold(temperature: float) -> None:
    logits, labels = drawn(3000, 20, temperature)
    labels[:300] = -1  # of no class
    logits[:300] *= 0.1
    right, shown = logits.argmax(axis=1) == labels, labels >= 0
    found = calibrate_with_answers(logits, logits, right, shown)
    assert (found.source, found.images) == ("clicks", 3000)
    assert found.temperature == pytest.approx(temperature, rel=DRAWN)
    unknown = is_unknown(probabilities(logits, found).max(axis=1), found)
    assert unknown[:300].mean() > 0.9
    assert right[~unknown].mean() > right.mean() + 0.1


def test_weights_count_as_copies() -> None:
    logits, labels = drawn(60, 5, 1.0)
    weights = np.where(np.arange(60) < 20, 3.0, 1.0)
    copies = np.repeat(np.arange(60), weights.astype(int))
    right, shown = logits.argmax(axis=1) == labels, np.ones(60, bool)
    once = calibrate_with_answers(logits, logits, right, shown, weights)
    copied = calibrate_with_answers(logits, logits[copies], right[copies], shown[copies])
    assert once.temperature == pytest.approx(copied.temperature, rel=1e-4)


def test_unusual_folders_are_calibrated() -> None:
    one = np.tile(np.array([[30.0, 20, 10]], np.float32), (50, 1))
    same = calibrate(one, share_with_doubt(np.ones(50, np.bool_)))
    assert not is_unknown(probabilities(one + 1e-4, same).max(axis=1), same).any()
    two = calibrate(one[:2], share_with_doubt(np.ones(2, np.bool_)))
    assert probabilities(one[:2], two).max() == pytest.approx(0.75, abs=1e-3)
    certain = calibrate_with_answers(one, one, np.ones(50, bool), np.ones(50, bool))
    assert certain.unknown_below == 0
    flat = calibrate(np.zeros((5, 4), np.float32), 0.9)
    assert flat.mean_prediction == (0.25,) * 4
    wide = np.random.default_rng(0).normal(0, 5, (3, 10_000)).astype(np.float32)
    assert len(calibrate(wide, 0.3).mean_prediction) == 10_000


def test_a_large_folder_is_sampled_evenly() -> None:
    assert sample(5, 3).tolist() == [0, 1, 2, 3, 4]
    chosen = sample(10**6, 1000)
    assert len(chosen) == MOST_LOGITS // 1000
    assert set(np.diff(chosen)) == {40}
    assert sample(10, 10**9).tolist() == [0]


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(VerificationError, match="NaN"):
        calibrate(np.full((3, 2), np.nan, np.float32), 0.5)
    with pytest.raises(DataError, match="at least 2 classes"):
        calibrate(np.zeros((0, 3), np.float32), 0.5)
    few = np.zeros((LEAST_ANSWERS - 1, 3), np.float32)
    with pytest.raises(DataError, match=f"at least {LEAST_ANSWERS}"):
        calibrate_with_answers(few, few, np.ones(len(few), bool), np.ones(len(few), bool))
