"""Arrays as kernels take them: pointers, strides and streams of torch, CuPy and NumPy.

Kernels read and write the memory of either GPU library where it is. What they return is allocated
by the library that asked, so that its own pool and its own graph captures see it. NumPy's arrays
are for a CPU that runs the kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import array_api_compat
import numpy as np

from microclip_deploy.errors import UsageError

Array: TypeAlias = Any  # of torch, CuPy or NumPy; no static type covers them

Empty: TypeAlias = Callable[..., Array]
"""(dtype name, *shape) -> an array whose contents are not defined."""

_ALIGNMENT = 16  # bytes that are moved at once


def empty_like(array: Array) -> Empty:
    """Return what allocates in the library and on the device of an array; CuPy's for None."""
    if array is None:
        import cupy

        return lambda dtype, *shape: cupy.empty(shape, dtype)
    xp, device = array_api_compat.array_namespace(array), array_api_compat.device(array)
    return lambda dtype, *shape: xp.empty(shape, dtype=getattr(xp, dtype), device=device)


@contextmanager
def current(tokens: Array) -> Iterator[None]:
    """Make the device and the stream of the array's library CuPy's own."""
    import cupy

    if array_api_compat.is_cupy_array(tokens):
        with tokens.device:
            yield
        return
    if not array_api_compat.is_torch_array(tokens) or tokens.device.type != "cuda":
        raise UsageError(
            "patch tokens: expected a torch CUDA tensor or a CuPy array, found "
            f"{type(tokens).__module__}.{type(tokens).__name__} on "
            f"{array_api_compat.device(tokens)}; use saliency_exact there"
        )
    import torch

    stream = ForeignStream(torch.cuda.current_stream(tokens.device).cuda_stream)
    with cupy.cuda.Device(tokens.device.index), cupy.cuda.Stream.from_external(stream):
        yield


class ForeignStream:
    """A stream of another library in the form CuPy asks for; not every torch has it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the protocol's version and the stream's address."""
        return 0, self._handle


def type_name(dtype: Any) -> str:
    """Return the name of a dtype of any of the libraries, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def pointer(array: Array) -> int:
    """Return the address of an array's first element."""
    if isinstance(array, np.ndarray):
        return int(array.ctypes.data)
    return int(array.data.ptr if array_api_compat.is_cupy_array(array) else array.data_ptr())


def readable(tokens: Array, width: int) -> tuple[Array, int]:
    """Return tokens whose rows lie one after another, and elements from image to image.

    Class tokens left out in front of each image cost nothing; other gaps cost a copy.
    """
    torch_array = array_api_compat.is_torch_array(tokens)
    size = tokens.element_size() if torch_array else tokens.itemsize
    strides = tokens.stride() if torch_array else tuple(s // size for s in tokens.strides)
    aligned = (pointer(tokens) | strides[0] * size) % _ALIGNMENT == 0
    if strides[1:] == (width, 1) and aligned:
        return tokens, strides[0]
    if torch_array:
        import torch

        return tokens.clone(memory_format=torch.contiguous_format), tokens.shape[1] * width
    return tokens.copy(order="C"), tokens.shape[1] * width
