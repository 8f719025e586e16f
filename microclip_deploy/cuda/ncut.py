"""The normalised cut on an NVIDIA GPU: two kernels, from tokens to masks.

    K1  affinity.cu   tokens -> one bit a pair, on tensor cores
    K2  ncut.cu       bits -> second eigenvector -> mask, one block a graph

`saliency_cuda` takes torch tensors and CuPy arrays where they are, launches on the stream their
library is using, returns arrays of the same library, and never waits for the device. Servers that
capture graphs hold `NCutKernels` with a workspace and outputs of their own.

Nothing is compiled at import; kernels of a shape are compiled once a device, when first used.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import cupy

from microclip_deploy.cuda.arrays import (
    Allocator,
    Array,
    current,
    pointer,
    readable,
    type_name,
)
from microclip_deploy.cuda.layout import Device, KernelLayout, check_shape
from microclip_deploy.cuda.source import TokenType
from microclip_deploy.errors import UsageError
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import Saliency

MAX_BATCH = 65535
"""Images of one launch: the second axis of CUDA's grid ends there."""


class Workspace(NamedTuple):
    """What the kernels keep between them, of a batch."""

    edges: Array
    """int32 (B, WORDS, THREADS): bits, word by word."""
    defects: Array
    """int32 (B, TILES): 1 where tokens are no numbers."""
    lengths: Array
    """float32 (B, N), or empty for the dot affinity."""
    centred: Array
    """float32 (B, N, D), or empty unless the affinity is centred."""
    spilled: Array
    """float32 (B, rows, THREADS): Krylov vectors that shared memory has no room for."""


class Cut(NamedTuple):
    """What `ncut_cut` says about a batch. The first five are those of `Saliency`."""

    mask: Array
    """bool (B, N), never all False."""
    vector: Array
    """float32 (B, N), oriented, of unit length; 0 where degenerate."""
    degenerate: Array
    """bool (B,)."""
    complete: Array
    """bool (B,)."""
    residual: Array
    """float32 (B,): of the Ritz vector, relative to the spread of the spectrum."""
    salient: Array
    """int32 (B,): how many tokens are in the foreground."""
    rows: Array
    """int16 (B, N): their numbers, ascending, in the first `salient` places."""
    steps: Array
    """int32 (B,): products with the graph; 0 where no eigenvector was needed."""
    components: Array
    """int32 (B,): parts of the graph, isolated tokens counted."""


def saliency_cuda(tokens: Array, spec: NCutSpec) -> Saliency:
    """As `steps.saliency`, by the kernels.

    Args:
        tokens: torch CUDA tensor or CuPy array, float16, bfloat16 or float32 (B, N, D); N from 4 to
            1024, D a multiple of 16. Images may lie apart; other layouts are copied first.
        spec: constants and rules.

    Returns:
        Arrays of the library of `tokens`, on its device, not yet computed.

    Raises:
        UsageError: another shape or type, or not on a CUDA device.
        EnvironmentProblem: the kernels cannot be compiled here.

    Source: docs/numerics.md section 2.
    """
    if tokens.ndim != 3:
        raise UsageError(
            f"patch tokens: expected (B, N, D), found {tuple(tokens.shape)}; add the batch's axis"
        )
    with current(tokens):
        kernels = NCutKernels.of(tokens.shape[1], tokens.shape[2], type_name(tokens.dtype), spec)
        work = kernels.workspace(len(tokens), tokens)
        cut = kernels.outputs(len(tokens), tokens)
        kernels.run(tokens, work, cut)
    return Saliency(*cut[: len(Saliency._fields)])


def takes(tokens: Array) -> bool:
    """Say whether the kernels are made for the shape and type of these tokens."""
    if tokens.ndim != 3:
        return False
    with current(tokens):
        try:
            count, width = tokens.shape[1:]
            check_shape(count, width, type_name(tokens.dtype), _capability())
        except UsageError:
            return False
    return True


class NCutKernels:
    """The kernels of one shape on one device, with the buffers they need.

    Every method launches on the current CuPy stream and returns at once. With a workspace and
    outputs made before, nothing is allocated, so the launches can be captured in a graph.
    """

    def __init__(self, layout: KernelLayout) -> None:
        """Compile, or take from CuPy's cache."""
        self.layout = layout
        self._affinity = layout.affinity_source().module().get_function("ncut_affinity")
        self._lengths: Any = None
        if layout.spec.affinity != "dot":
            self._lengths = layout.lengths_source().module().get_function("ncut_lengths")
        if layout.spec.affinity == "centered_cosine":
            centred = layout.centred_affinity_source().module()
            self._affinity = centred.get_function("ncut_affinity")
        self._cut = layout.cut_source().module().get_function("ncut_cut")
        self._cut.max_dynamic_shared_size_bytes = layout.cut_bytes()
        self._affinity.max_dynamic_shared_size_bytes = layout.affinity_bytes()

    @staticmethod
    def of(count: int, width: int, token: str, spec: NCutSpec) -> "NCutKernels":
        """Return the kernels for (B, count, width) tokens on the current device.

        Raises:
            UsageError: the kernels are not made for this shape or type.
            EnvironmentProblem: they cannot be compiled here.
        """
        return _kernels(count, width, token, spec, cupy.cuda.runtime.getDevice())

    def workspace(self, batch: int, like: Array = None) -> Workspace:
        """Return buffers between the kernels, in CuPy or in the library of `like`."""
        layout = self.layout
        empty = Allocator(like)
        cosine, centred = (layout.spec.affinity != "dot", layout.spec.affinity == "centered_cosine")
        return Workspace(
            edges=empty("int32", batch, layout.words, layout.threads),
            defects=empty("int32", batch, layout.tiles),
            lengths=empty("float32", batch if cosine else 0, layout.count),
            centred=empty("float32", batch if centred else 0, layout.count, layout.width),
            spilled=empty("float32", batch, layout.spilled_rows, layout.threads),
        )

    def outputs(self, batch: int, like: Array = None) -> Cut:
        """Return buffers for the results, in CuPy or in the library of `like`."""
        empty, count = Allocator(like), self.layout.count
        return Cut(
            mask=empty("bool", batch, count),
            vector=empty("float32", batch, count),
            degenerate=empty("bool", batch),
            complete=empty("bool", batch),
            residual=empty("float32", batch),
            salient=empty("int32", batch),
            rows=empty("int16", batch, count),
            steps=empty("int32", batch),
            components=empty("int32", batch),
        )

    def run(self, tokens: Array, work: Workspace, cut: Cut) -> None:
        """Cut a batch: both kernels."""
        self.affinity(tokens, work)
        self.solve(work, cut)

    def affinity(self, tokens: Array, work: Workspace) -> None:
        """K1: tokens (B, N, D) -> bits.

        Raises:
            UsageError: more images than one launch can take.
        """
        batch, layout = len(tokens), self.layout
        if not batch:
            return
        if batch > MAX_BATCH:
            raise UsageError(
                f"patch tokens: expected at most {MAX_BATCH} images, found {batch}; split the batch"
            )
        tokens, stride = readable(tokens, layout.width)
        lengths = work.lengths if self._lengths is not None else None
        if self._lengths is not None:
            lengths_of = (pointer(tokens), stride, pointer(work.lengths), pointer(work.centred))
            self._lengths((batch,), (256,), lengths_of, shared_mem=layout.lengths_bytes())
        if layout.spec.affinity == "centered_cosine":
            tokens, stride = work.centred, layout.count * layout.width
        pairs = layout.tiles * (layout.tiles + 1) // 2
        arguments = (
            pointer(tokens),
            stride,
            0 if lengths is None else pointer(lengths),
            pointer(work.edges),
            pointer(work.defects),
        )
        self._affinity((pairs, batch), (128,), arguments, shared_mem=layout.affinity_bytes())

    def solve(self, work: Workspace, cut: Cut) -> None:
        """K2: bits -> mask and what belongs to it."""
        if not len(cut.mask):
            return
        layout = self.layout
        arguments = tuple(map(pointer, (work.edges, work.defects, work.spilled, *cut)))
        self._cut((len(cut.mask),), (layout.threads,), arguments, shared_mem=layout.cut_bytes())


@lru_cache(maxsize=64)
def _kernels(count: int, width: int, token: TokenType, spec: NCutSpec, device: int) -> NCutKernels:
    check_shape(count, width, token, _capability())
    shared = cupy.cuda.runtime.getDeviceProperties(device)["sharedMemPerBlockOptin"]
    return NCutKernels(KernelLayout(count, width, token, spec, Device(_capability(), shared)))


def _capability() -> int:
    """Return the current device's compute capability, such as 90."""
    return int(cupy.cuda.Device().compute_capability)
