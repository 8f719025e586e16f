"""Pairs of classes that CLIP confuses."""

import numpy as np
import pytest

from microclip_deploy.describe import pairs
from microclip_deploy.describe.pairs import confused_pairs, nearest, nearest_cosine

ANGLES = np.radians([0, 10, 90, 95, 200])
ROWS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)


def test_pairs_come_by_cosine() -> None:
    assert confused_pairs(ROWS, 3) == [(2, 3), (0, 1), (1, 2)]


def test_no_more_pairs_than_there_are() -> None:
    assert len(confused_pairs(ROWS, 99)) == 10


def test_photos_between_two_classes_come_first() -> None:
    photos = np.array([[0.4, 0, 0, 0, 0.6], [0.5, 0, 0.1, 0, 0.4], [0, 0.9, 0.1, 0, 0]])
    assert confused_pairs(ROWS, 2, photos) == [(0, 4), (2, 3)]


def test_neighbours_are_in_order_and_exclude_the_class_itself() -> None:
    assert nearest(ROWS, 2)[:4].tolist() == [[1, 2], [0, 2], [3, 1], [2, 1]]
    assert nearest(ROWS, 9).shape == (5, 4)
    assert nearest_cosine(ROWS) == pytest.approx(np.cos(np.radians([10, 10, 5, 5, 105])), abs=1e-6)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    whole = confused_pairs(rows, 20), nearest(rows, 4).tolist(), nearest_cosine(rows).tolist()
    monkeypatch.setattr(pairs, "_BLOCK", 7)
    assert whole[:2] == (confused_pairs(rows, 20), nearest(rows, 4).tolist())
    assert whole[2] == pytest.approx(nearest_cosine(rows).tolist(), abs=1e-6)
