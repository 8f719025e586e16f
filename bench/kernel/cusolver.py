"""cuSOLVER's eigensolver of a whole batch in one call, as PyTorch calls it from 2.12 on.

Older ones solve larger matrices one after another. This calls the library directly, so that the
peer is the same whatever PyTorch is installed.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from microclip_deploy.bench.kernel.report import NotTimed

# Of cusolver_common.h, cublas_api.h and library_types.h.
_VECTORS, _LOWER, _FLOAT32 = 1, 0, 0

_HANDLE = (ctypes.c_void_p, ctypes.c_void_p)
_PROBLEM = (
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),  # jobz, uplo, n
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64),  # type, address and leading dimension of A
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int),  # type and address of W, type computed in
)
_SIZES = (ctypes.POINTER(ctypes.c_size_t),) * 2
_WORK = (ctypes.c_void_p, ctypes.c_size_t) * 2  # on the device, on the host
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cusolverDnCreate": (ctypes.POINTER(ctypes.c_void_p),),
    "cusolverDnCreateParams": (ctypes.POINTER(ctypes.c_void_p),),
    "cusolverDnSetStream": _HANDLE,
    "cusolverDnXsyevBatched_bufferSize": (*_HANDLE, *_PROBLEM, *_SIZES, ctypes.c_int64),
    "cusolverDnXsyevBatched": (*_HANDLE, *_PROBLEM, *_WORK, ctypes.c_void_p, ctypes.c_int64),
}


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose symmetric matrices on the current stream; returns before the device is done.

    Args:
        matrices: float32 (B, N, N) on CUDA, contiguous; kept as they are.

    Returns:
        Eigenvalues (B, N), rising, and in the columns of (B, N, N) their vectors.

    Raises:
        NotTimed: the library is missing, older than CUDA 12.6, or refuses.
    """
    batch, size = matrices.shape[:2]
    vectors = matrices.clone()  # solved in place; symmetric, so rows may be read as columns
    values = matrices.new_empty(batch, size)
    status = torch.empty(batch, dtype=torch.int32, device=matrices.device)
    handle, params = _handles()
    _call("cusolverDnSetStream", handle, torch.cuda.current_stream().cuda_stream)
    problem = (
        *(handle, params, _VECTORS, _LOWER, size),
        *(_FLOAT32, vectors.data_ptr(), size, _FLOAT32, values.data_ptr(), _FLOAT32),
    )
    sizes = ctypes.c_size_t(), ctypes.c_size_t()
    _call("cusolverDnXsyevBatched_bufferSize", *problem, *map(ctypes.byref, sizes), batch)
    on_device = torch.empty(sizes[0].value, dtype=torch.uint8, device=matrices.device)
    on_host = ctypes.create_string_buffer(max(sizes[1].value, 1))
    work = (on_device.data_ptr(), sizes[0].value, on_host, sizes[1].value)
    _call("cusolverDnXsyevBatched", *problem, *work, status.data_ptr(), batch)
    return values, vectors.mT


@cache
def _library() -> ctypes.CDLL:
    """Return the library, by preference the one that PyTorch has loaded."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    try:
        library = ctypes.CDLL(load_nvidia_dynamic_lib("cusolver").abs_path)
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
    except (AttributeError, OSError, RuntimeError) as error:
        raise NotTimed(f"no cuSOLVER with cusolverDnXsyevBatched: {error}") from error
    return library


@cache
def _handles() -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """Return a handle and default parameters, for the rest of the process."""
    handle, params = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cusolverDnCreate", ctypes.byref(handle))
    _call("cusolverDnCreateParams", ctypes.byref(params))
    return handle, params


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise NotTimed(f"{name} failed with status {status}")
