"""What counts as a wrong mask."""

import numpy as np

from microclip_deploy.bench.kernel.exact_masks import exact_masks
from microclip_deploy.bench.kernel.tokens import vit_tokens
from microclip_deploy.ncut.spec import NCutSpec


def two_clusters() -> np.ndarray:
    tokens = np.zeros((1, 8, 4))
    tokens[:, :3, 0] = tokens[:, 3:, 1] = 1.0
    tokens[:, :, 2] = np.linspace(0.0, 0.3, 8)
    return tokens


def test_another_mask_of_a_binding_graph_is_wrong() -> None:
    exact = exact_masks(vit_tokens(16, 49, 64, seed=0).astype(np.float64), NCutSpec())
    assert exact.wrong(exact.mask) == 0
    assert exact.wrong(~exact.mask) == exact.binding.sum() > 0


def test_a_pair_at_tau_lets_no_mask_be_wrong() -> None:
    tokens = two_clusters()
    tokens[:, :, 2] = 0.0
    tokens[0, 0, 1] = 0.2 + 1e-9  # its product with the second cluster is tau, but for rounding
    exact = exact_masks(tokens, NCutSpec())
    assert exact.near_tau.all()
    assert exact.wrong(~exact.mask) == 0


def test_a_graph_in_parts_is_apart() -> None:
    assert exact_masks(two_clusters(), NCutSpec()).apart() == 1.0
    assert exact_masks(np.ones((1, 8, 4)), NCutSpec()).apart() == 0.0
