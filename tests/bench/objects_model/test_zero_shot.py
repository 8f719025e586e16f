"""What is measured of a model before adaptation."""

import pytest
import torch

from microclip_deploy.bench.objects_model.zero_shot import Scored


def test_the_interval_of_a_gain_is_over_classes() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    hits = {"[CLS]": torch.tensor([1, 0, 0, 0]).bool(), "both": torch.tensor([1, 1, 0, 0]).bool()}
    scored = Scored(labels, hits, {}, {})
    assert scored.accuracy("both") == 50
    gain, error = scored.gain("both", "[CLS]")
    assert gain == 25  # class 0 gains half, class 1 nothing
    assert error == pytest.approx(196 * 0.25)
