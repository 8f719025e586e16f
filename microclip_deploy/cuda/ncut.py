"""The normalised cut on an NVIDIA GPU: two kernels, from tokens to masks.

    K1  affinity.cu   tokens -> one bit a pair, on tensor cores
    K2  ncut.cu       bits -> second eigenvector -> mask, one block a graph

`saliency_cuda` takes torch tensors and CuPy arrays where they are, launches on the stream their
library is using, returns arrays of the same library, and never waits for the device. Servers that
capture graphs hold `NCutKernels` with a workspace and outputs of their own.

Nothing is compiled at import; kernels of a shape are compiled once a device, when first used.
"""

from functools import lru_cache

import cupy

from microclip_deploy.cuda.arrays import Array, current, empty_like, type_name
from microclip_deploy.cuda.layout import Cut, Device, KernelLayout, Workspace, check_shape
from microclip_deploy.cuda.source import TokenType
from microclip_deploy.errors import UsageError
from microclip_deploy.ncut.foreground import Saliency, require_agreement
from microclip_deploy.ncut.spec import NCutSpec


def saliency_cuda(tokens: Array, spec: NCutSpec, agreement: Array | None = None) -> Saliency:
    """As `steps.saliency`, by the kernels.

    Args:
        tokens: torch CUDA tensor or CuPy array, float16, bfloat16 or float32 (B, N, D); N from 4 to
            1024, D a multiple of 16. Images may lie apart; other layouts are copied first.
        spec: constants and rules.
        agreement: as for `saliency_exact`, in the library of `tokens`.

    Returns:
        Arrays of the library of `tokens`, on its device, not yet computed.

    Raises:
        UsageError: another shape or type, not on a CUDA device, or no agreement where it counts.
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
        if spec.asks_cls:
            work = work._replace(agreement=require_agreement(agreement, spec))
        kernels.run(tokens, work, cut)
    return Saliency(*cut[: len(Saliency._fields)])


def takes(tokens: Array) -> bool:
    """Say whether the kernels are made for the shape and type of these tokens."""
    if tokens.ndim != 3 or not len(tokens):  # no grid of 0 blocks
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
        for source in layout.sources():
            source.compile()

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
        return self.layout.workspace(batch, empty_like(like))

    def outputs(self, batch: int, like: Array = None) -> Cut:
        """Return buffers for the results, in CuPy or in the library of `like`."""
        return self.layout.outputs(batch, empty_like(like))

    def run(self, tokens: Array, work: Workspace, cut: Cut) -> None:
        """Cut a batch: both kernels.

        Raises:
            UsageError: more images than one launch can take.
        """
        self.affinity(tokens, work)
        self.solve(work, cut)

    def affinity(self, tokens: Array, work: Workspace) -> None:
        """K1: tokens (B, N, D) -> bits; raises as `run`."""
        for launch in self.layout.affinity_launches(tokens, work):
            launch()

    def solve(self, work: Workspace, cut: Cut) -> None:
        """K2: bits, and agreement if asked for -> mask and what belongs to it; raises as `run`."""
        self.layout.cut_launch(work, cut)()


@lru_cache(maxsize=64)
def _kernels(count: int, width: int, token: TokenType, spec: NCutSpec, device: int) -> NCutKernels:
    check_shape(count, width, token, _capability())
    shared = cupy.cuda.runtime.getDeviceProperties(device)["sharedMemPerBlockOptin"]
    return NCutKernels(KernelLayout(count, width, token, spec, Device(_capability(), shared)))


def _capability() -> int:
    """Return the current device's compute capability, such as 90."""
    return int(cupy.cuda.Device().compute_capability)
