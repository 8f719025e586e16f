"""What the answers so far say."""

import json
from pathlib import Path

import numpy as np
import pytest

from microclip_deploy.audit.answers import read_clicks
from microclip_deploy.audit.plan import Plan
from microclip_deploy.audit.result import Result
from microclip_deploy.audit.wording import sentences, tables, write_result
from microclip_deploy.errors import CheckpointError
from tests.audit.made import all_said, made_plan, right_for


def test_census_is_exact() -> None:
    plan = made_plan(clicks=20)
    result = Result(plan, all_said(plan, right_for(plan, 0)))
    a, b = result.accuracies() or (None, None)
    assert a is not None
    assert b is not None
    assert (a.low, a.estimate, a.high) == (1, 1, 1)
    assert (b.low, b.high) == pytest.approx((12 / 20, 12 / 20))
    assert "difference +40.0 points (+40.0 to +40.0)" in " ".join(sentences(result))
    assert result.verdict == "a"


def test_nothing_is_claimed_before_the_first_answer(plan: Plan) -> None:
    result = Result(plan, all_said(plan, []))
    assert result.accuracies() is None
    assert result.difference() is None
    assert not result.may_stop
    assert "0 of 9" in sentences(result)[-1]


def test_verdict_is_given_at_planned_looks_only() -> None:
    plan = made_plan(differ=400, agree=400, clicks=100)
    answers = right_for(plan, 1)
    found = [Result(plan, all_said(plan, answers[:n])).verdict for n in (49, 50, 51)]
    assert found == ["open", "b", "b"]


def test_what_the_rest_cannot_change_is_told_at_once() -> None:
    plan = made_plan(differ=4, agree=100, clicks=100)
    answers = right_for(plan, 0)
    at = next(n for n in range(101) if sum(row.differ for row in plan.drawn[:n]) == 3)
    result = Result(plan, all_said(plan, answers[:at]))
    assert result.verdict == "a"
    assert result.may_stop
    assert not result.complete


def test_models_that_say_the_same_need_no_answers() -> None:
    plan = made_plan(differ=0, agree=12)
    result = Result(plan, all_said(plan, []))
    assert result.may_stop
    assert "say the same of every photo" in sentences(result)[0]


def test_skipped_photos_are_told_and_bounded(plan: Plan) -> None:
    answers = right_for(plan, 0)
    answers[0], answers[1] = "skip", ""
    result = Result(plan, all_said(plan, answers))
    assert result.skipped == 2
    low, high = result.skip_bounds() or (0, 0)
    found = result.difference()
    assert found is not None
    assert low < found.estimate <= high
    assert "2 of 9 photos were skipped" in " ".join(sentences(result))


def test_classes_are_told_once_there_are_answers_enough() -> None:
    plan = made_plan(differ=30, agree=30, clicks=40)
    few, many = (Result(plan, all_said(plan, right_for(plan, 0)[:n])) for n in (6, 40))
    assert few.classes() == []
    assert {each.name for each in many.classes()} >= {"hen", "château"}
    assert all(0 <= each.found.low <= each.found.estimate <= 1 for each in many.classes())
    assert (few.class_clicks() or 0) > 0
    assert len(tables(many)) == 2


def test_other_programs_read_the_answers_with_their_weights(plan: Plan, tmp_path: Path) -> None:
    answers = right_for(plan, 0)
    answers[2:4] = ["neither", "skip"]
    write_result(tmp_path, Result(plan, all_said(plan, answers)))
    read = read_clicks(tmp_path)
    assert len(read.paths) == 8
    assert read.right[0].sum() == 7
    assert read.confidence.shape == (2, 8)
    assert (read.confidence[1] == 0.4).all()
    assert np.sum(1 / read.inclusion) == pytest.approx(plan.photos)
    stored = json.loads((tmp_path / "audit.json").read_text())
    assert stored["format"] == "microclip.audit/1"
    (tmp_path / "audit.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected microclip"):
        read_clicks(tmp_path)
