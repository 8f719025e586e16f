"""Models of well-known sizes: the same weights each time, and nothing else is changed."""

import logging

import pytest
import torch
from torch import nn

from microclip_deploy.bench import geometry
from microclip_deploy.bench.geometry import random_geometry
from microclip_deploy.errors import UsageError


def test_a_geometry_is_the_same_each_time_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    one, other = random_geometry("tiny"), random_geometry("tiny")
    assert torch.equal(torch.get_rng_state(), state)
    weights = zip(one.visual.parameters(), other.visual.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_only_open_clips_warning_of_random_weights_is_kept_quiet() -> None:
    root = logging.getLogger()
    before = root.level
    geometry._clip("ViT-B-32")
    assert root.level == before


def test_a_model_that_cannot_carry_microclip_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class ResNet(nn.Module):
        visual = nn.Linear(2, 2)

    monkeypatch.setattr(geometry, "_clip", lambda name: ResNet())
    with pytest.raises(UsageError, match=r"RN50: this model cannot carry microCLIP: .* Linear"):
        random_geometry("RN50")
