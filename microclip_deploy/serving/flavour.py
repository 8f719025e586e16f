"""TensorRT or TensorRT for RTX: which of NVIDIA's two libraries this process uses.

Both have the calls that are used here. TensorRT builds for the GPU at hand and runs on every NVIDIA
GPU. TensorRT for RTX builds on any machine, for GeForce and RTX PRO from Ampere on.
"""

import importlib.util
from collections.abc import Mapping
from typing import Literal

Flavour = Literal["TensorRT", "TensorRT for RTX"]
TENSORRT: Flavour = "TensorRT"
RTX: Flavour = "TensorRT for RTX"

MODULES: Mapping[Flavour, str] = {TENSORRT: "tensorrt", RTX: "tensorrt_rtx_bindings"}
"""The Python module of each; that of RTX is there with or without NVIDIA's package of packages."""

EXTRA_OF: Mapping[Flavour, str] = {TENSORRT: "gpu", RTX: "rtx"}
"""The extra of this package that installs it."""


def flavour_here() -> Flavour | None:
    """Return the library to use: of two, TensorRT where there is a GPU for it; None of none."""
    found = [each for each, module in MODULES.items() if importlib.util.find_spec(module)]
    if len(found) == 2:
        return TENSORRT if devices() else RTX
    return found[0] if found else None


def devices() -> int:
    """Count CUDA devices; before TensorRT is touched, which crashes without one."""
    if importlib.util.find_spec("cupy") is None:
        return 0
    import cupy

    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0
