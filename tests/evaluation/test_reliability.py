"""Calibration error, coverage and strangers, counted by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.evaluation.evaluate import evaluate
from microclip_deploy.evaluation.reliability import Reliability, Strangers, chart_of


def test_numbers_are_those_counted_by_hand() -> None:
    surest = np.array([0.9, 0.92, 0.5, 0.3])
    right = np.array([True, False, True, False])
    found = Reliability.of(surest, np.ones(4), right, 2.0, 0.4)
    assert [(b.images, round(b.probability, 2), b.accuracy) for b in found.bins] == [
        (1, 0.3, 0.0), (1, 0.5, 1.0), (2, 0.91, 0.5),
    ]  # fmt: skip
    assert found.ece == pytest.approx((0.3 + 0.5 + 2 * 0.41) / 4)
    assert found.ece_uncalibrated == pytest.approx(0.5)
    assert found.answered == 0.75
    assert found.accuracy_answered == pytest.approx(2 / 3)
    covered = {each.share: each.accuracy for each in found.coverage}
    assert (covered[1.0], covered[0.5], covered[0.1]) == (0.5, 0.5, 0.0)
    assert "unknown below 0.4: 75.0 % answered, 66.7 % of them right" in found.lines()


def test_nothing_answered_has_no_accuracy() -> None:
    found = Reliability.of(np.full(3, 0.2), np.ones(3), np.ones(3, np.bool_), 1.0, 0.5)
    assert (found.answered, found.accuracy_answered) == (0.0, None)
    assert found.lines()[1] == "unknown below 0.5: 0.0 % answered"


def test_strangers_are_told_apart_by_ranks() -> None:
    known = np.array([0.9, 0.6, 0.4])
    found = Strangers.of(np.array([0.4, 0.2]), known, 0.3)
    assert found.auroc == pytest.approx(5.5 / 6)
    assert found.flagged == 0.5


def test_an_evaluation_tells_reliability_and_strangers(
    finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    strange = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    for number, pixels in enumerate(strange):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    plain = evaluate(finished_run, photos, zero_shot=False, unknown=tmp_path)
    even = evaluate(finished_run, photos, zero_shot=False, prior="uniform")
    for result, prior in ((plain, "folder"), (even, "uniform")):
        told = json.loads(json.dumps(result.to_json()))
        assert told["prior"] == prior
        assert told["reliability"]["temperature"] == 2.0
        assert sum(each["images"] for each in told["reliability"]["bins"]) == 24
    assert plain.reliability
    assert plain.reliability.unknown
    assert plain.reliability.unknown.images == 3
    unknown = [answer.unknown for answer in plain.answers]
    assert plain.reliability.answered == pytest.approx(1 - np.mean(unknown))
    assert [a.probability for a in plain.answers] != [a.probability for a in even.answers]
    drawn = chart_of(plain.to_json())
    assert drawn
    assert drawn.wide.count("<svg") == 1
    assert chart_of({"rows": []}) is None
