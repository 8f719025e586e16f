"""How the kernels of the cut are built and launched for one shape of tokens.

Plain arithmetic on the constants of `NCutSpec` and the limits of a device, the same for the GPU,
for the compiler and for the CPU on which the tests run the kernels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from microclip_deploy.cuda.arrays import Array, Empty, readable
from microclip_deploy.cuda.source import TOKEN_TYPES, CudaSource, Launch, TokenType
from microclip_deploy.errors import UsageError
from microclip_deploy.ncut.foreground import square_side
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

AFFINITY_THREADS, LENGTHS_THREADS = 128, 256  # of a block

FLOAT, WORD = 4, 4  # bytes


class Device(NamedTuple):
    """What the layout depends on."""

    compute_capability: int
    """Such as 90."""
    shared_bytes: int
    """Of shared memory that one block may have."""


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
    agreement: Array
    """float32 (B, N): each token's with [CLS], written before K2 runs; empty where the side does
    not ask for it."""


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

    def workspace(self, batch: int, empty: Empty) -> Workspace:
        """Return what the kernels keep between them."""
        cosine, centred = (self.spec.affinity != "dot", self.spec.affinity == "centered_cosine")
        return Workspace(
            edges=empty("int32", batch, self.words, self.threads),
            defects=empty("int32", batch, self.tiles),
            lengths=empty("float32", batch if cosine else 0, self.count),
            centred=empty("float32", batch if centred else 0, self.count, self.width),
            spilled=empty("float32", batch, self.spilled_rows, self.threads),
            agreement=empty("float32", batch if self.spec.asks_cls else 0, self.count),
        )

    def outputs(self, batch: int, empty: Empty) -> Cut:
        """Return where the results go."""
        return Cut(
            mask=empty("bool", batch, self.count),
            vector=empty("float32", batch, self.count),
            degenerate=empty("bool", batch),
            complete=empty("bool", batch),
            residual=empty("float32", batch),
            salient=empty("int32", batch),
            rows=empty("int16", batch, self.count),
            steps=empty("int32", batch),
            components=empty("int32", batch),
        )

    def affinity_launches(self, tokens: Array, work: Workspace) -> tuple[Launch, ...]:
        """K1: tokens (B, N, D) of this layout's type -> bits in the workspace."""
        batch, dot = len(tokens), self.spec.affinity == "dot"
        tokens, stride = readable(tokens, self.width)
        pairs = self.tiles * (self.tiles + 1) // 2

        def affinity(source: CudaSource, tokens: Array, stride: int) -> Launch:
            lengths = np.uint64(0) if dot else work.lengths
            arguments = (tokens, np.int64(stride), lengths, work.edges, work.defects)
            shared = self.affinity_bytes()
            return Launch(
                source, "ncut_affinity", (pairs, batch), AFFINITY_THREADS, arguments, shared
            )

        if dot:
            return (affinity(self.affinity_source(), tokens, stride),)
        lengths = Launch(
            self.lengths_source(),
            "ncut_lengths",
            (batch, 1),
            LENGTHS_THREADS,
            (tokens, np.int64(stride), work.lengths, work.centred),
            self.lengths_bytes(),
        )
        if self.spec.affinity == "cosine":
            return lengths, affinity(self.affinity_source(), tokens, stride)
        centred = self.count * self.width
        return lengths, affinity(self.centred_affinity_source(), work.centred, centred)

    def cut_launch(self, work: Workspace, cut: Cut) -> Launch:
        """K2: bits -> mask and what belongs to it."""
        arguments = (work.edges, work.defects, work.spilled, work.agreement, *cut)
        grid, shared = (len(cut.mask), 1), self.cut_bytes()
        return Launch(self.cut_source(), "ncut_cut", grid, self.threads, arguments, shared)

    def sources(self) -> tuple[CudaSource, ...]:
        """Return all that the launches need."""
        if self.spec.affinity == "dot":
            return self.affinity_source(), self.cut_source()
        centred = self.spec.affinity == "centered_cosine"
        affinity = self.centred_affinity_source() if centred else self.affinity_source()
        return self.lengths_source(), affinity, self.cut_source()

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
            "NCUT_THRESHOLD": ("std", "mean", "otsu").index(spec.threshold),
            "NCUT_ASKS_CLS": spec.asks_cls,
            "NCUT_BORDER_SIDE": square_side(self.count) if spec.asks_border else 0,
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
            "NCUT_TILE": TILE,
            "NCUT_THREADS": AFFINITY_THREADS,
            "NCUT_LENGTHS_THREADS": LENGTHS_THREADS,
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
