"""The library that is called without a binding. Run with: python -m pytest -m gpu"""

import numpy as np
import pytest
import torch

from microclip_deploy.bench.kernel.cusolver import eigh

FLOAT32 = 5e-5
"""Error of an eigenvalue or a residual, of the largest eigenvalue."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [5, 49, 196])
def test_a_batch_is_decomposed_as_numpy_does_in_float64(size: int) -> None:
    squares = torch.randn(7, size, size, generator=torch.Generator().manual_seed(size))
    matrices = squares + squares.mT
    given = matrices.cuda()
    values, vectors = (found.cpu().double().numpy() for found in eigh(given))
    assert torch.equal(given.cpu(), matrices), "expected matrices that are kept as they are"
    exact = matrices.double().numpy()
    expected = np.linalg.eigvalsh(exact)
    atol = FLOAT32 * np.abs(expected).max()
    np.testing.assert_allclose(values, expected, rtol=0, atol=atol)
    np.testing.assert_allclose(exact @ vectors, vectors * values[:, None], rtol=0, atol=atol)
    unit = np.broadcast_to(np.eye(size), exact.shape)
    np.testing.assert_allclose(vectors.swapaxes(1, 2) @ vectors, unit, rtol=0, atol=FLOAT32)
