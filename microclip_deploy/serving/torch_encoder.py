"""The encoder of a CUDA session in PyTorch: one CUDA graph from pixels to logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cupy
import torch
from torch.utils.dlpack import from_dlpack

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.checkpoint import load_model, read_checkpoint
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.serving.cuda_pipeline import (
    CudaPipeline,
    Launches,
    open_stream,
    out_of_memory,
)
from microclip_deploy.serving.cuda_session import CudaSession
from microclip_deploy.serving.session import Facts


def open_run(path: Path, device: str) -> CudaSession:
    """Load the adapted model of a run directory for the kernels.

    Args:
        path: directory that `adapt` wrote.
        device: "cuda" or "cuda:N".

    Raises:
        CheckpointError: missing or damaged.
        EnvironmentProblem: the device is missing, fails, or is out of memory.
    """
    stream = open_stream(device)
    checkpoint = read_checkpoint(path)
    manifest = checkpoint.manifest
    model = load_model(checkpoint, f"cuda:{stream.device_id}")
    return session_of(model, manifest.preprocess, manifest.classes, stream)


def session_of(
    model: MicroCLIP, preprocess: Preprocess, classes: tuple[str, ...], stream: cupy.cuda.Stream
) -> CudaSession:
    """Serve a model that is on the stream's device.

    Raises:
        EnvironmentProblem: the device fails, or is out of memory.
    """
    encoder = TorchEncoder(model.backbone, preprocess, stream)
    head = model.head()
    pipeline = CudaPipeline(stream, encoder, head, model.ncut, preprocess.size)
    # A run's classes are those it adapted to.
    return CudaSession(pipeline, Facts(classes, frozenset(), preprocess, head.classifier))


class TorchEncoder:
    """MicroCLIP's backbone, float32 without TF32, captured together with what follows it.

    PyTorch captures, because its allocator must know of the capture; CuPy's kernels join it on the
    same stream.
    """

    def __init__(
        self, backbone: VisionBackbone, preprocess: Preprocess, stream: cupy.cuda.Stream
    ) -> None:
        """Take a backbone that is on the stream's device."""
        self.tokens = backbone.grid**2
        self._backbone: VisionBackbone | None = backbone
        self._preprocess = preprocess
        self._device = torch.device("cuda", stream.device_id)
        self._stream = torch.cuda.ExternalStream(stream.ptr, device=self._device)
        # No graph's memory is read after its replay, so all graphs may share it.
        self._pool = torch.cuda.graph_pool_handle()

    def capture(
        self,
        pixels: cupy.ndarray,
        cls: cupy.ndarray,
        patches: cupy.ndarray,
        rest: Callable[[], None],
    ) -> Launches:
        """Capture encoder and `rest` in one graph.

        Raises:
            EnvironmentProblem: the device is out of memory.
        """
        try:
            return self._captured(pixels, cls, patches, rest)
        except torch.cuda.OutOfMemoryError as error:
            problem = out_of_memory(str(self._device), str(error))
        torch.cuda.empty_cache()  # here, where the error no longer holds tensors
        raise problem

    def _captured(
        self,
        pixels: cupy.ndarray,
        cls: cupy.ndarray,
        patches: cupy.ndarray,
        rest: Callable[[], None],
    ) -> Launches:
        backbone = self._backbone
        assert backbone is not None, "a closed session captures nothing"
        graph = torch.cuda.CUDAGraph()
        with self._inference():
            images, class_rows, token_rows = (
                from_dlpack(array) for array in (pixels, cls, patches)
            )

            def work() -> None:
                seen = backbone(self._preprocess.normalize(images))
                class_rows.copy_(seen.cls)
                token_rows.copy_(seen.patches)
                rest()

            work()  # loads kernels and creates handles, which a capture must not
            self._stream.synchronize()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        def eager() -> None:
            with self._inference():
                work()

        return Launches(replay, eager)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream), torch.inference_mode(), _exact_float32():
            yield

    def close(self) -> None:
        """Drop the backbone and give its memory back to the device."""
        self._backbone = None
        torch.cuda.empty_cache()


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Switch TF32 off for what is launched: it would move edges of the graph that is cut.

    The switches are the process's, so they are put back.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
