"""The device's part of a CUDA session: an encoder, then the kernels of cut and fusion.

    pinned pixels -> upload -> encoder -> cut -> pooling and fusion -> download -> pinned answers

Everything runs on one stream. Each bucket has its own buffers, and its work is captured in a CUDA
graph by the encoder, as far as the encoder itself can be captured: kernels find the same addresses
at every replay, so a batch costs one upload, one launch and one download.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import cupy
import numpy as np
from numpy.typing import NDArray

from microclip_deploy.cuda.ncut import NCutKernels
from microclip_deploy.cuda.soap import CudaFusion
from microclip_deploy.errors import EnvironmentProblem
from microclip_deploy.head import Head
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.serving.answer_block import Sizes, block_bytes, block_views
from microclip_deploy.serving.session import Prediction

CAPTURE = threading.Lock()
"""While a stream is captured no other thread may wait for the whole device, as freeing memory does
and as PyTorch does before each capture: sessions build and release buckets one after the other."""

_OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation, and CUDA_ERROR_OUT_OF_MEMORY of the driver."""


Tokens = Mapping[str, cupy.ndarray]
"""What an encoder writes, by name."""


class Launches(NamedTuple):
    """Two ways to launch the same work on a stream; an encoder may be waited for, no kernel is."""

    replay: Callable[[], None]
    """As a CUDA graph, as far as the encoder can be captured: what serves."""
    eager: Callable[[], None]
    """Operator by operator, to show what the graph saves."""


class Encoder(Protocol):
    """The vision tower on a stream."""

    tokens: int
    """N: patch tokens of an image."""

    def capture(
        self,
        pixels: cupy.ndarray,
        tokens: Tokens,
        rest: Callable[[], None],
    ) -> Launches:
        """Prepare the work on static buffers.

        Args:
            pixels: uint8 (B, S, S, 3), read.
            tokens: buffers by the names of backbone.onnx's outputs, written: "cls", float32 (B, E),
                unit rows; "patches", float32 (B, N, D); and "agreement", float32 (B, N), where the
                cut asks for it.
            rest: launches what follows on the current stream; neither waits nor allocates.

        Returns:
            What launches the encoder and `rest`.

        Raises:
            EnvironmentProblem: the device is out of memory.
        """

    def close(self) -> None:
        """Release the weights."""


class Kernels(NamedTuple):
    """What launches each kernel of a bucket by itself."""

    edges: Callable[[], None]
    cut: Callable[[], None]
    fuse: Callable[[], None]


class Bucket(NamedTuple):
    """Buffers for a batch size, and the work on them."""

    host_pixels: NDArray[np.uint8]
    pixels: cupy.ndarray
    host_block: NDArray[np.uint8]
    block: cupy.ndarray
    answers: Prediction
    """Views of `host_block`."""
    tokens: Tokens
    launches: Launches
    """Encoder and kernels."""
    kernels: Kernels
    """Keep the buffers alive whose addresses the graph holds."""


class CudaPipeline:
    """A model on one stream; for one thread at a time."""

    def __init__(
        self, stream: cupy.cuda.Stream, encoder: Encoder, head: Head, ncut: NCutSpec, side: int
    ) -> None:
        """Compile the kernels and upload the head's matrices; takes over the encoder.

        Args:
            stream: what everything runs on.
            encoder: on the stream's device.
            head: what follows the encoder, on the host.
            ncut: constants of the cut.
            side: S, pixels.

        Raises:
            EnvironmentProblem: the device fails, or is out of memory.
        """
        self.device = f"cuda:{stream.device_id}"
        self.stream = stream
        self.encoder = encoder
        self._side = side
        self._width = head.project.shape[1]
        self._sizes = Sizes(encoder.tokens, len(head.project), len(head.classifier))
        self._pool = cupy.cuda.MemoryPool()
        self._pinned = cupy.cuda.PinnedMemoryPool()
        self._buckets: dict[int, Bucket] = {}
        with self.current():
            self._kernels = NCutKernels.of(
                count=encoder.tokens, width=self._width, token="float32", spec=ncut
            )
            self._fusion = CudaFusion(*head)
            stream.synchronize()

    def pixels(self, bucket: int) -> NDArray[np.uint8]:
        """Return the pinned buffer (bucket, S, S, 3) that `run` reads.

        Raises:
            EnvironmentProblem: the device fails, or is out of memory; the other buckets remain.
        """
        if bucket not in self._buckets:
            problem = self._add(bucket)
            if problem is not None:
                with CAPTURE, self.current():
                    self._pool.free_all_blocks()
                raise EnvironmentProblem(problem)
        return self._buckets[bucket].host_pixels

    def run(self, bucket: int) -> Prediction:
        """Classify the buffer's images; the answers are views of another pinned buffer.

        Raises:
            EnvironmentProblem: the device fails, or is out of memory.
        """
        found = self._buckets[bucket]
        with self.current():
            self.launch(found, found.launches.replay)
            self.stream.synchronize()
        return found.answers

    def bucket(self, size: int) -> Bucket:
        """Return the buffers and the work of a batch size; `pixels` has made it."""
        return self._buckets[size]

    def launch(self, bucket: Bucket, work: Callable[[], None]) -> None:
        """Upload the buffer, launch work of the bucket, and download, without waiting for it."""
        bucket.pixels.set(bucket.host_pixels, stream=self.stream)
        work()
        bucket.block.get(stream=self.stream, out=bucket.host_block, blocking=False)

    def close(self) -> None:
        """Release graphs, buffers, weights and stream."""
        with CAPTURE, self.current():
            # Callbacks that ONNX Runtime left on the stream hold memory of the encoder; they must
            # not be the last to hold it (see OnnxGraph).
            self.stream.synchronize()
            self._buckets.clear()
            del self._kernels, self._fusion
            self.encoder.close()
            self._pool.free_all_blocks()
            self._pinned.free_all_blocks()
        del self.stream

    def _add(self, bucket: int) -> str | None:
        """Build a bucket or return why not; the error itself would hold the buffers it had."""
        try:
            with CAPTURE, self.current():
                self._buckets[bucket] = self._build(bucket)
        except EnvironmentProblem as error:
            return str(error)
        return None

    def _build(self, batch: int) -> Bucket:
        """Allocate a bucket's buffers and capture the work on them."""
        size = block_bytes(batch, self._sizes)
        block = cupy.zeros(size, cupy.uint8)
        host_block = self._pinned_bytes(size)
        answers = block_views(block, batch, self._sizes)
        pixels = cupy.zeros((batch, self._side, self._side, 3), cupy.uint8)
        host_pixels = self._pinned_bytes(pixels.nbytes).reshape(pixels.shape)
        patches = cupy.empty((batch, self._sizes.tokens, self._width), cupy.float32)
        kernels, fusion = self._kernels, self._fusion
        work = kernels.workspace(batch)
        cut = kernels.outputs(batch)._replace(mask=answers.mask, complete=answers.complete)
        fused = fusion.outputs(batch, self._sizes.tokens)._replace(
            fg=answers.fg, logits=answers.logits, attention=answers.attention
        )

        each = Kernels(
            edges=partial(kernels.affinity, patches, work),
            cut=partial(kernels.solve, work, cut),
            fuse=partial(fusion.run, answers.cls, patches, cut, fused),
        )

        def rest() -> None:
            for launch in each:
                launch()

        tokens = {"cls": answers.cls, "patches": patches}
        if len(work.agreement):
            tokens["agreement"] = work.agreement
        launches = self.encoder.capture(pixels, tokens, rest)
        views = block_views(host_block, batch, self._sizes)
        return Bucket(host_pixels, pixels, host_block, block, views, tokens, launches, each)

    def _pinned_bytes(self, size: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._pinned.malloc(size), np.uint8, size)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make device, stream and memory pool CuPy's current ones; turn its errors into ours."""
        with (
            cuda_errors(self.device),
            cupy.cuda.Device(self.stream.device_id),
            self.stream,
            cupy.cuda.using_allocator(self._pool.malloc),
        ):
            yield


def open_stream(device: str) -> cupy.cuda.Stream:
    """Return a stream of its own on "cuda" or "cuda:N".

    Raises:
        EnvironmentProblem: there is no such device.
    """
    with cuda_errors(device), cupy.cuda.Device(int(device.partition(":")[2] or 0)):
        return cupy.cuda.Stream(non_blocking=True)


def captured(work: Callable[[], None], stream: cupy.cuda.Stream) -> Launches:
    """Run work once, and capture it in a CUDA graph."""
    work()  # loads kernels and settles shapes, which a capture must not
    stream.synchronize()
    stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
    try:
        work()
    finally:
        graph = stream.end_capture()

    def replay() -> None:
        graph.launch(stream)

    return Launches(replay, work)


@contextmanager
def cuda_errors(device: str) -> Iterator[None]:
    """Turn CuPy's errors into ours.

    Raises:
        EnvironmentProblem: the device is missing, fails, or is out of memory.
    """
    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise out_of_memory(device, str(error)) from error
    except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError) as error:
        if error.status == _OUT_OF_MEMORY:
            raise out_of_memory(device, str(error)) from error
        raise EnvironmentProblem(
            f"--device {device}: expected a CUDA device that works, found: {error}; run "
            "`microclip-deploy doctor` to see why, or use --device cpu"
        ) from error


def out_of_memory(device: str, detail: str) -> EnvironmentProblem:
    """Return the error of a device that has too little memory."""
    return EnvironmentProblem(
        f"--device {device}: out of memory: {detail}; lower --batch-size, or use another device"
    )
