"""Fairness and cross-entropy at their edges; their numbers are tested in test_train_step.py."""

import math

import torch

from microclip_deploy.adapt.loss import cross_entropy, fairness


def test_fairness_is_least_for_a_uniform_prediction() -> None:
    uniform = fairness(torch.zeros(8, 5), None).loss.item()
    assert math.isclose(uniform, 2 * math.log(5), rel_tol=1e-6)
    assert fairness(torch.randn(8, 5), None).loss.item() > uniform


def test_fairness_of_a_collapsed_prediction_is_finite_and_has_a_gradient() -> None:
    logits = torch.zeros(4, 3)
    logits[:, 0] = 500.0
    logits.requires_grad_(True)
    found = fairness(logits, None).loss
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


def test_fairness_averages_with_the_previous_step_without_its_gradient() -> None:
    previous = torch.tensor([0.5, 0.3, 0.2], requires_grad=True)
    logits = torch.randn(4, 3, requires_grad=True)
    found = fairness(logits, previous)
    torch.testing.assert_close(found.average, 0.5 * (previous + logits.softmax(1).mean(0)))
    found.loss.backward()
    assert previous.grad is None


def test_images_not_kept_do_not_count() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    kept = torch.tensor([True, False, True, False])
    expected = cross_entropy(logits[kept], labels[kept])
    torch.testing.assert_close(cross_entropy(logits, labels, kept), expected)
    assert cross_entropy(logits, labels, torch.zeros(4, dtype=torch.bool)).item() == 0
