"""Arrivals of an open loop: Poisson, the same for everybody."""

import numpy as np

from microclip_deploy.bench.serving.arrivals import poisson


def test_arrivals_have_the_rate_and_the_gaps_of_poisson() -> None:
    due = poisson(50.0, 400.0, seed=1)
    gaps = np.diff(due)
    # 20,000 of them: the standard error of their number is 141, of the gaps' spread under 1 %.
    assert abs(len(due) - 20_000) < 600
    assert abs(gaps.std() / gaps.mean() - 1) < 0.04
    assert due[0] > 0
    assert gaps.min() >= 0
    assert due[-1] < 400


def test_everybody_gets_the_same_arrivals() -> None:
    assert np.array_equal(poisson(5.0, 10.0, 3), poisson(5.0, 10.0, 3))
    assert not np.array_equal(poisson(5.0, 10.0, 3)[:3], poisson(5.0, 10.0, 4)[:3])


def test_there_is_one_at_least() -> None:
    assert len(poisson(1e-3, 0.1, 0)) == 1
