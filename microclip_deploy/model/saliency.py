"""Which solver cuts the tokens: the kernel, the iterative or the exact one, by where they are."""

import logging
from functools import lru_cache

from array_api_compat import device, is_cupy_array, is_torch_array

from microclip_deploy.ncut.foreground import Array, Saliency
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import saliency_exact, saliency_iterative

_log = logging.getLogger(__name__)


def saliency(tokens: Array, spec: NCutSpec, agreement: Array | None = None) -> Saliency:
    """Mark the tokens on the foreground side of the normalised cut.

    CuPy arrays and torch CUDA tensors take the kernel, other accelerators the iterative solver,
    because a dense eigendecomposition would synchronise with the host; everything else takes the
    exact one. Where CuPy is missing, or for tokens that the kernel is not made for (N > 1024, D no
    multiple of 16, float64), CUDA takes the iterative solver as well.

    Args:
        tokens: float (B, N, D), N >= 4, raw (not normalised), class token removed.
        spec: constants and rules.
        agreement: as for `saliency_exact`.

    Returns:
        One foreground mask an image.

    Raises:
        UsageError: as for `saliency_exact`.

    Source: docs/numerics.md section 2.
    """
    place = device(tokens).type if is_torch_array(tokens) else "cpu"
    if is_cupy_array(tokens) or (place == "cuda" and _has_cupy()):
        from microclip_deploy.cuda.ncut import saliency_cuda, takes

        if takes(tokens):
            return saliency_cuda(tokens, spec, agreement)
    solve = saliency_exact if place == "cpu" else saliency_iterative
    return solve(tokens, spec, agreement)


@lru_cache(maxsize=1)
def _has_cupy() -> bool:
    """Say whether CuPy works here; where it does not, tell once what it would do."""
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except (ImportError, OSError, RuntimeError) as error:  # CuPy's own errors are RuntimeErrors
        _log.warning(
            "warning: CuPy cannot be used (%s), so the normalised cut takes matrix products in "
            'place of its kernel; run: pip install "microclip-deploy[gpu]"',
            error,
        )
        return False
    return True
