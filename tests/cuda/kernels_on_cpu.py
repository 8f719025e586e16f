"""The CUDA kernels of the cut, compiled by g++ and run on the CPU: the unchanged .cu files."""

import ctypes
import hashlib
import math
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

import microclip_deploy
from microclip_deploy.cuda.layout import KernelLayout
from microclip_deploy.cuda.source import CudaSource, Launch
from microclip_deploy.ncut.foreground import Saliency

HERE = Path(__file__).parent / "on_cpu"
SOURCES = Path(microclip_deploy.__file__).parent / "cuda"
FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing")

builds = Path()
"""Where compiled kernels lie; conftest.py gives the workers of a test run one folder."""


class Facts(NamedTuple):
    """What `ncut_cut` writes beside the saliency."""

    salient: NDArray[np.int32]
    rows: NDArray[np.uint16]
    steps: NDArray[np.int32]
    components: NDArray[np.int32]


def require_compiler() -> None:
    """Skip the test where the kernels cannot be built."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to run the kernels on the CPU: apt-get install g++")
    if platform.machine() != "x86_64":
        pytest.skip("the fibers that stand for CUDA's threads are written for x86-64")


def run(launch: Launch, *, order: int = 0) -> None:
    """Run a launch of the product on the CPU; `order` permutes the threads of a block."""
    parameters = [ctypes.create_string_buffer(each.tobytes()) for each in launch.parameters()]
    addresses = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))
    kernel = getattr(build(launch.source), f"{launch.kernel}_on_cpu")
    shared = ctypes.c_size_t(launch.shared_bytes)
    kernel(*launch.grid, launch.threads, shared, order, addresses, len(parameters))


@lru_cache
def build(source: CudaSource) -> ctypes.CDLL:
    """Compile a source with its constants behind the driver of its name in on_cpu/."""
    require_compiler()
    driver = HERE / source.file.replace(".cu", "_on_cpu.cpp")
    name = hashlib.sha256(repr(source).encode()).hexdigest()
    target = builds / f"{driver.stem}-{name}.so"
    defines = [f"-D{name}={value}" for name, value in source.defines]
    folders = [f"-I{SOURCES}", f"-I{HERE}"]
    command = ["g++", *FLAGS, "-shared", "-fPIC", *folders, *defines, str(driver), "-o"]
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            subprocess.run([*command, str(target)], check=True)
    return ctypes.CDLL(str(target))


def poisoned(dtype: str, *shape: int) -> NDArray[Any]:
    """Return a NumPy array that no kernel should leave as it is."""
    held = np.dtype(dtype)
    size = math.prod(shape) * held.itemsize
    return np.full(size, 0xEE, np.uint8).view(held).reshape(shape)


def cut_edges(
    layout: KernelLayout,
    edges: NDArray[np.bool_],
    *,
    defects: Any = None,
    order: int = 0,
    agreement: NDArray[np.float32] | None = None,
) -> tuple[Saliency, Facts]:
    """Run `ncut_cut` on bool (B, N, N) graphs, and float32 (B, N) agreement if it is asked for."""
    batch = len(edges)
    return cut_bits(
        layout,
        packed(layout, edges),
        np.zeros((batch, layout.tiles), np.int32) if defects is None else defects,
        order,
        agreement,
    )


def cut_bits(
    layout: KernelLayout,
    bits: NDArray[np.uint32],
    defects: NDArray[np.int32],
    order: int = 0,
    agreement: NDArray[np.float32] | None = None,
) -> tuple[Saliency, Facts]:
    """Run `ncut_cut` on bits as `ncut_affinity` writes them."""
    work = layout.workspace(len(bits), poisoned)._replace(edges=bits, defects=defects)
    if agreement is not None:
        work = work._replace(agreement=agreement)
    cut = layout.outputs(len(bits), poisoned)
    run(layout.cut_launch(work, cut), order=order)
    assert set(np.unique(cut.mask.view(np.uint8))) <= {0, 1}
    facts = Facts(cut.salient, cut.rows.view(np.uint16), cut.steps, cut.components)
    return Saliency(*cut[: len(Saliency._fields)]), facts


def affinity(
    layout: KernelLayout, tokens: NDArray[Any], *, order: int = 0
) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """Run the affinity kernels on (B, N, D) tokens, bfloat16 as bits; return bits and defects.

    Images may lie apart in memory.
    """
    work = layout.workspace(len(tokens), poisoned)
    for launch in layout.affinity_launches(tokens, work):
        run(launch, order=order)
    return work.edges.view(np.uint32), work.defects


def packed(layout: KernelLayout, edges: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Return bool (B, N, N) edges as the kernels' bits, uint32 (B, WORDS, THREADS)."""
    batch, count = edges.shape[:2]
    padded = np.zeros((batch, layout.threads, layout.threads), bool)
    padded[:, :count, :count] = edges
    words = np.packbits(padded, axis=2, bitorder="little").view(np.uint32)
    return np.ascontiguousarray(words.transpose(0, 2, 1))


def unpacked(layout: KernelLayout, bits: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return bits as bool (B, THREADS, THREADS), padding included."""
    rows = np.ascontiguousarray(bits.transpose(0, 2, 1)).view(np.uint8)
    return np.unpackbits(rows, axis=2, bitorder="little").astype(bool)
