"""Arrays on a CUDA device as kernels take them: pointers, strides and streams of torch and CuPy.

Kernels read and write the memory of either library where it is. What they return is allocated by
the library that asked, so that its own pool and its own graph captures see it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import array_api_compat
import cupy

from microclip_deploy.errors import UsageError

Array: TypeAlias = Any  # a torch tensor or a CuPy array; no static type covers both

_ALIGNMENT = 16  # bytes that are moved at once


class Allocator:
    """Makes empty arrays: CuPy's, or those of the library and device of another array."""

    def __init__(self, like: Array) -> None:
        self._xp = cupy if like is None else array_api_compat.array_namespace(like)
        self._device = {} if like is None else {"device": array_api_compat.device(like)}

    def __call__(self, dtype: str, *shape: int) -> Array:
        """Return an array whose contents are not defined."""
        return self._xp.empty(shape, dtype=getattr(self._xp, dtype), **self._device)


@contextmanager
def current(tokens: Array) -> Iterator[None]:
    """Make the device and the stream of the array's library CuPy's own."""
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
    """Return the name of a dtype of either library, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def pointer(array: Array) -> int:
    """Return the address of an array's first element."""
    address: int = array.data.ptr if array_api_compat.is_cupy_array(array) else array.data_ptr()
    return address


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
        return tokens.clone(memory_format=_contiguous_format()), tokens.shape[1] * width
    return cupy.array(tokens, order="C", copy=True), tokens.shape[1] * width


def _contiguous_format() -> Any:
    import torch

    return torch.contiguous_format
