"""The CUDA kernels of the cut, compiled by g++ and run on the CPU: the unchanged .cu files."""

import ctypes
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import microclip_deploy
from microclip_deploy.cuda.layout import KernelLayout
from microclip_deploy.cuda.source import CudaSource
from microclip_deploy.ncut.steps import Saliency

HERE = Path(__file__).parent / "on_cpu"
SOURCES = Path(microclip_deploy.__file__).parent / "cuda"
FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing")

_builds = tempfile.TemporaryDirectory(prefix="ncut-on-cpu-")


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


@lru_cache
def build(driver: str, source: CudaSource) -> ctypes.CDLL:
    """Compile a driver of on_cpu/ with the source's constants."""
    require_compiler()
    target = Path(_builds.name) / f"{driver}-{abs(hash(source))}.so"
    defines = [f"-D{name}={value}" for name, value in source.defines]
    command = [
        "g++",
        *FLAGS,
        "-shared",
        "-fPIC",
        f"-I{SOURCES}",
        f"-I{HERE}",
        *defines,
    ]
    subprocess.run([*command, str(HERE / driver), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def cut_edges(
    layout: KernelLayout, edges: NDArray[np.bool_], *, defects: Any = None, order: int = 0
) -> tuple[Saliency, Facts]:
    """Run `ncut_cut` on bool (B, N, N) graphs; `order` permutes the threads."""
    batch = len(edges)
    return cut_bits(
        layout,
        packed(layout, edges),
        np.zeros((batch, layout.tiles), np.int32) if defects is None else defects,
        order,
    )


def cut_bits(
    layout: KernelLayout, bits: NDArray[np.uint32], defects: NDArray[np.int32], order: int = 0
) -> tuple[Saliency, Facts]:
    """Run `ncut_cut` on bits as `ncut_affinity` writes them."""
    library = build("ncut_on_cpu.cpp", layout.cut_source())
    batch, count = len(bits), layout.count
    spilled = np.full((batch, max(layout.spilled_rows, 1), layout.threads), np.nan, np.float32)
    mask, degenerate, complete = (
        np.full(shape, 7, np.uint8) for shape in ((batch, count), (batch,), (batch,))
    )
    vector = np.full((batch, count), np.nan, np.float32)
    residual = np.full(batch, np.nan, np.float32)
    rows = np.full((batch, count), 60000, np.uint16)
    counts, steps, components = (np.full(batch, -1, np.int32) for _ in range(3))
    size = library.ncut_cut_on_cpu(
        *map(_pointer, (bits, defects)),
        batch,
        *map(_pointer, (spilled, mask, vector, degenerate, complete, residual, counts, rows)),
        *map(_pointer, (steps, components)),
        order,
    )
    assert size == layout.cut_bytes(), "the layout and sizeof(Shared) disagree"
    assert set(np.unique(mask)) <= {0, 1}
    found = Saliency(
        mask.astype(bool), vector, degenerate.astype(bool), complete.astype(bool), residual
    )
    return found, Facts(counts, rows, steps, components)


def affinity(
    layout: KernelLayout, tokens: NDArray[Any], *, order: int = 0
) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """Run the affinity kernels on (B, N, D) tokens, bfloat16 as bits; return bits and defects.

    Images may lie apart in memory.
    """
    batch, count = tokens.shape[:2]
    if tokens.strides[1:] != (layout.width * tokens.itemsize, tokens.itemsize):
        tokens = np.ascontiguousarray(tokens)
    stride = tokens.strides[0] // tokens.itemsize
    lengths, source = None, layout.affinity_source()
    if layout.spec.affinity != "dot":
        lengths = np.full((batch, count), np.nan, np.float32)
        centred = np.full((batch, count, layout.width), np.nan, np.float32)
        library = build("affinity_on_cpu.cpp", layout.lengths_source())
        library.ncut_lengths_on_cpu(
            _pointer(tokens),
            ctypes.c_longlong(stride),
            batch,
            _pointer(lengths),
            _pointer(centred),
            order,
        )
        if layout.spec.affinity == "centered_cosine":
            tokens, source = centred, layout.centred_affinity_source()
            stride = count * layout.width
    bits = np.full((batch, layout.words, layout.threads), 0xEEEEEEEE, np.uint32)
    defects = np.full((batch, layout.tiles), -1, np.int32)
    size = build("affinity_on_cpu.cpp", source).ncut_affinity_on_cpu(
        _pointer(tokens),
        ctypes.c_longlong(stride),
        batch,
        None if lengths is None else _pointer(lengths),
        _pointer(bits),
        _pointer(defects),
        order,
    )
    assert size == layout.affinity_bytes(), "the layout and sizeof(Shared) disagree"
    return bits, defects


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


def _pointer(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
