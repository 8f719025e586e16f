"""What is measured of a model before adaptation."""

import pytest
import torch

from microclip_deploy.bench.objects_model.zero_shot import (
    WANTED,
    Scored,
    conditions,
    conditions_table,
)


def test_the_interval_of_a_gain_is_over_classes() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    hits = {"[CLS]": torch.tensor([1, 0, 0, 0]).bool(), "both": torch.tensor([1, 1, 0, 0]).bool()}
    scored = Scored(labels, hits, {}, {})
    assert scored.accuracy("both") == 50
    gain, error = scored.gain("both", "[CLS]")
    assert gain == 25  # class 0 gains half, class 1 nothing
    assert error == pytest.approx(196 * 0.25)


def test_every_condition_of_a_claim_is_measured() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    hits = {
        "[CLS]": torch.tensor([1, 0, 1, 0]).bool(),
        "[CLS] + token mean": torch.tensor([1, 0, 0, 0]).bool(),
        "[CLS] + method": torch.tensor([1, 1, 1, 0]).bool(),
        "[CLS] + true mask": torch.tensor([1, 1, 1, 1]).bool(),
    }
    scored = Scored(labels, hits, {"method": 0.64}, {})
    found = conditions(scored, scored)
    assert list(found) == list(WANTED)
    assert [value for value, _ in found.values()] == pytest.approx([50, 50, 50, 64, 25, 50])
    rows = conditions_table({"one": {"source": scored, "target, val": scored}})
    assert rows[1][:2] == ["wanted", "85"]
    assert rows[2] == ["one", "50.0", "50.0", "50.0 ± 0.0", "64.0", "25.0 ± 49.0", "50.0 ± 0.0"]
