"""CUDA sources of this package and how they are compiled: one set of options for every use.

Sources are package data, compiled by NVRTC for the device at hand when they are first needed; CuPy
keeps the result on disk. Nothing here needs CuPy until `module` is called.
"""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple, Self, get_args

from microclip_deploy.errors import EnvironmentProblem, require

OPTIONS = ("--std=c++17", "--fmad=false")
"""Contraction is off: every device rounds alike, and so does a CPU that runs these files."""


TokenType = Literal["float16", "bfloat16", "float32"]

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

    def module(self) -> Any:
        """Return the cupy.RawModule of the current device, compiled on first use.

        Raises:
            EnvironmentProblem: CuPy is not installed, or the source cannot be compiled here.
        """
        cupy = require("cupy", "gpu")
        return _compiled(self, cupy.cuda.runtime.getDevice())


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
