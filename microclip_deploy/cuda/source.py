"""CUDA sources of this package, how they are compiled, and how their kernels are launched.

Sources are package data, compiled by NVRTC for the device at hand when they are first needed; CuPy
keeps the result on disk. Nothing here needs CuPy until a kernel is launched.
"""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np

from microclip_deploy.cuda.arrays import pointer
from microclip_deploy.errors import EnvironmentProblem, UsageError, require

OPTIONS = ("--std=c++17", "--fmad=false")
"""Contraction is off: every device rounds alike, and so does a CPU that runs these files."""


TokenType = Literal["float16", "bfloat16", "float32"]

MAX_GRID_Y = 65535
"""Blocks along the second axis of CUDA's grid, where kernels put a batch's images."""

SHARED_UNASKED = 49152
"""Bytes of shared memory that every device gives a block unasked."""

TOKEN_TYPES: tuple[TokenType, ...] = get_args(TokenType)
"""In the order of TOKEN_TYPE in token.cuh."""

_FILES = resources.files("microclip_deploy.cuda")


class CudaSource(NamedTuple):
    """A .cu file of this package with the constants it is compiled with."""

    file: str
    """Name in this folder, such as "ncut.cu"."""
    defines: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, file: str, defines: Mapping[str, int | float | bool]) -> Self:
        """Name a source and its constants."""
        return cls(file, tuple((name, _literal(value)) for name, value in defines.items()))

    def text(self) -> str:
        """Return the source as it stands in the file."""
        return _FILES.joinpath(self.file).read_text("utf-8")

    def options(self) -> tuple[str, ...]:
        """Return the compiler's options; the architecture is the device's."""
        return (*OPTIONS, f"-I{_FILES}", *(f"-D{name}={value}" for name, value in self.defines))

    def compile(self) -> None:
        """Compile for the current device, once.

        Raises:
            EnvironmentProblem: CuPy is not installed, or the source cannot be compiled here.
        """
        cupy = require("cupy", "gpu")
        _compiled(self, cupy.cuda.runtime.getDevice())


class Launch(NamedTuple):
    """One launch of a kernel: everything but the device and the stream.

    What launches on a GPU is what the tests run on a CPU: grid, threads and memory are chosen once.
    """

    source: CudaSource
    kernel: str
    grid: tuple[int, int]
    """Blocks; the second number is at most `MAX_GRID_Y`."""
    threads: int
    """Of a block."""
    arguments: tuple[Any, ...]
    """Arrays of any library, and NumPy scalars of the C type."""
    shared_bytes: int = 0
    """Dynamic shared memory of a block."""

    def parameters(self) -> tuple[np.generic, ...]:
        """Return the arguments as the kernel takes them: arrays by their address."""
        return tuple(
            each if isinstance(each, np.generic) else np.uint64(pointer(each))
            for each in self.arguments
        )

    def __call__(self) -> None:
        """Launch on the current device and stream of CuPy, and return at once.

        Raises:
            UsageError: more images than one launch can take.
            EnvironmentProblem: CuPy is not installed, or the source cannot be compiled here.
        """
        cupy = require("cupy", "gpu")
        if self.grid[1] > MAX_GRID_Y:
            raise UsageError(
                f"images: expected at most {MAX_GRID_Y} in a batch, found {self.grid[1]}; split "
                "the batch"
            )
        if all(self.grid):  # CUDA refuses an empty grid
            device = cupy.cuda.runtime.getDevice()
            kernel = _kernel(self.source, self.kernel, self.shared_bytes, device)
            shared = self.shared_bytes
            kernel(self.grid, (self.threads,), self.parameters(), shared_mem=shared)


@cache
def _kernel(source: CudaSource, name: str, shared_bytes: int, device: int) -> Any:
    kernel = _compiled(source, device).get_function(name)
    if shared_bytes > SHARED_UNASKED:
        kernel.max_dynamic_shared_size_bytes = shared_bytes
    return kernel


@cache
def _compiled(source: CudaSource, device: int) -> Any:
    import cupy
    from cupy.cuda.compiler import CompileException
    from cupy_backends.cuda.libs.nvrtc import NVRTCError

    module = cupy.RawModule(code=source.text(), options=source.options())
    try:
        module.compile()
    except (CompileException, NVRTCError, ImportError, OSError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise EnvironmentProblem(
            f"{source.file}: expected NVRTC to compile it for cuda:{device}, found: "
            f"{' '.join(reason)}; run `microclip-deploy doctor`; it takes a CuPy for the "
            "driver's CUDA version and NVRTC: pip install nvidia-cuda-nvrtc"
        ) from error
    return module


def _literal(value: int | float | bool) -> str:
    return str(int(value)) if isinstance(value, bool) else repr(value)
