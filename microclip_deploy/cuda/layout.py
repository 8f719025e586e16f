"""How the kernels of the cut are built for one shape of tokens: constants and shared memory.

Plain arithmetic on the constants of `NCutSpec` and the limits of a device, the same for the GPU,
for the compiler and for the CPU on which the tests run the kernels.
"""

from dataclasses import dataclass
from typing import NamedTuple

from microclip_deploy.cuda.source import TOKEN_TYPES, CudaSource, TokenType
from microclip_deploy.errors import UsageError
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import MIN_TOKENS

MAX_TOKENS = 1024
"""A block has a thread for every token."""

WIDTH_STEP = 16
"""Rows of tokens are read 16 bytes at a time, and multiplied 16 numbers at a time."""

MAX_WIDTH = 12288
"""An image's mean token fits into the shared memory that every device gives unasked."""

TILE = 64
"""Rows and columns of the affinity that one block computes."""

FLOAT, WORD = 4, 4  # bytes


class Device(NamedTuple):
    """What the layout depends on."""

    compute_capability: int
    """Such as 90."""
    shared_bytes: int
    """Of shared memory that one block may have."""


@dataclass(frozen=True)
class KernelLayout:
    """The build of the kernels for N tokens of D numbers on a device."""

    count: int
    """N, 4 to 1024."""
    width: int
    """D, a multiple of 16."""
    token: TokenType
    spec: NCutSpec
    device: Device

    @property
    def words(self) -> int:
        """32-bit words of a row of the graph; a block has 32 threads a word."""
        return -(-self.count // 32)

    @property
    def threads(self) -> int:
        """Threads of the block that cuts a graph."""
        return 32 * self.words

    @property
    def tiles(self) -> int:
        """Tiles of 64 tokens."""
        return -(-self.count // TILE)

    @property
    def basis(self) -> int:
        """Krylov vectors before a restart: more than nearly every graph needs."""
        return min(self.count - 1, 64 if self.count < 300 else 96)

    @property
    def first_check(self) -> int:
        """Steps before the first look at convergence; half of made-up ViT graphs take no more."""
        return min(self.basis, 14 if self.count < 64 else 12)

    @property
    def edges_in_shared(self) -> bool:
        """Whether the graph fits into shared memory beside what must be there."""
        return self._needed_bytes() + self._edge_bytes() <= self.device.shared_bytes

    @property
    def basis_in_shared(self) -> int:
        """Rows of the basis in shared memory; the others lie in a workspace, in the L2 cache."""
        left = self.device.shared_bytes - self._needed_bytes()
        left -= self._edge_bytes() if self.edges_in_shared else 0
        return min(self.basis + 1, left // (self._row() * FLOAT))

    @property
    def spilled_rows(self) -> int:
        """Rows of the basis in the workspace."""
        return self.basis + 1 - self.basis_in_shared

    def cut_bytes(self) -> int:
        """Dynamic shared memory of `ncut_cut`: sizeof(Shared) in ncut.cu."""
        edges = self._edge_bytes() if self.edges_in_shared else 0
        return self._needed_bytes() + edges + self.basis_in_shared * self._row() * FLOAT

    def affinity_bytes(self) -> int:
        """Dynamic shared memory of `ncut_affinity`: sizeof(Shared) in affinity.cu."""
        row = 128 + 16  # a chunk of a row, and the padding against bank conflicts
        return self.stages * min(self.tiles, 2) * TILE * row + TILE * 2 * WORD

    def lengths_bytes(self) -> int:
        """Dynamic shared memory of `ncut_lengths`: the image's mean, if it is removed."""
        return self.width * FLOAT if self.spec.affinity == "centered_cosine" else 0

    @property
    def stages(self) -> int:
        """Chunks of tokens on their way at one time; Turing cannot copy in the background."""
        if self.device.compute_capability < 80:
            return 2
        return 4 if self.tiles == 1 else 3

    def affinity_source(self) -> CudaSource:
        """Return tokens -> bits."""
        return self._affinity("dot" if self.spec.affinity == "dot" else "cosine", self.token)

    def lengths_source(self) -> CudaSource:
        """Return tokens -> lengths, and centred tokens if the affinity asks for them."""
        return self._affinity(self.spec.affinity, self.token)

    def centred_affinity_source(self) -> CudaSource:
        """Return centred float32 tokens -> bits."""
        return self._affinity("cosine", "float32")

    def cut_source(self) -> CudaSource:
        """Return bits -> mask."""
        spec = self.spec
        constants: dict[str, int | float | bool] = {
            "NCUT_TOKENS": self.count,
            "NCUT_WORDS": self.words,
            "NCUT_TILES": self.tiles,
            "NCUT_EPS": spec.eps,
            "NCUT_TIE": spec.tie_tolerance_iterative,
            "NCUT_GAP": spec.gap_tolerance,
            "NCUT_RESIDUAL": spec.lanczos_residual,
            "NCUT_RESTARTS": spec.lanczos_restarts,
            "NCUT_LEVEL_IS_MEAN": spec.threshold == "mean",
            "NCUT_BASIS": self.basis,
            "NCUT_BASIS_SHARED": self.basis_in_shared,
            "NCUT_FIRST_CHECK": self.first_check,
            "NCUT_EDGES_SHARED": self.edges_in_shared,
        }
        return CudaSource.of("ncut.cu", constants)

    def _affinity(self, affinity: str, token: TokenType) -> CudaSource:
        constants: dict[str, int | float | bool] = {
            "NCUT_TOKENS": self.count,
            "NCUT_WORDS": self.words,
            "NCUT_TILES": self.tiles,
            "NCUT_WIDTH": self.width,
            "TOKEN_TYPE": TOKEN_TYPES.index(token),
            "NCUT_TAU": self.spec.tau,
            "NCUT_STAGES": self.stages,
            "NCUT_CENTRED": affinity == "centered_cosine",
        }
        return CudaSource.of("affinity.cu", constants)

    def _row(self) -> int:
        """Floats from one row of the basis to the next: ROW in ncut.cu."""
        return self.threads + (16 if self.count < 66 else 0)

    def _edge_bytes(self) -> int:
        return self.words * self.threads * WORD

    def _needed_bytes(self) -> int:
        """Shared memory without graph and basis: every other member of Shared in ncut.cu."""
        tables = self.words * 8 * 16 + self.threads + 32
        tridiagonal = 9 * (self.basis + 4)
        sums = 32 + 64 + 2
        components = 2 * (self.threads // 2 + 2) + 2 * self.words
        return -(-(tables + tridiagonal + sums + components) * FLOAT // 16) * 16


def check_shape(count: int, width: int, token: str, compute_capability: int) -> None:
    """Refuse tokens that the kernels are not made for.

    Raises:
        UsageError: N outside 4 to 1024, D no multiple of 16, or a type that the device lacks.
    """
    if not MIN_TOKENS <= count <= MAX_TOKENS:
        raise UsageError(
            f"patch tokens: expected {MIN_TOKENS} to {MAX_TOKENS} an image on a GPU, found "
            f"{count}; use saliency_iterative"
        )
    if width % WIDTH_STEP or not WIDTH_STEP <= width <= MAX_WIDTH:
        raise UsageError(
            f"patch tokens: expected a width that is a multiple of {WIDTH_STEP} of at most "
            f"{MAX_WIDTH} on a GPU, found {width}; pad them with zeros, which changes no product, "
            "or use saliency_iterative"
        )
    if token not in TOKEN_TYPES:
        raise UsageError(
            f"patch tokens: expected {', '.join(TOKEN_TYPES)} on a GPU, found {token}; "
            "convert them to float32"
        )
    if token == "bfloat16" and compute_capability < 80:
        raise UsageError(
            "patch tokens: bfloat16 needs compute capability 8.0, found "
            f"{compute_capability / 10:.1f}; convert them to float32"
        )
