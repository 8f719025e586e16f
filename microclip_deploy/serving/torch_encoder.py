"""The encoder of a CUDA session in PyTorch: one CUDA graph from pixels to logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cupy
import torch
from torch.utils.dlpack import from_dlpack

from microclip_deploy.calibration import Calibration
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.clip import exact_float32
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.ncut.foreground import agreement_with
from microclip_deploy.serving.cuda_pipeline import (
    CudaPipeline,
    Launches,
    Tokens,
    open_stream,
    out_of_memory,
)
from microclip_deploy.serving.cuda_session import CudaSession
from microclip_deploy.serving.session import Facts


def session_of(
    model: MicroCLIP,
    classes: tuple[str, ...],
    preprocess: Preprocess,
    device: str,
    calibration: Calibration | None = None,
) -> CudaSession:
    """Serve a model with the kernels.

    Args:
        model: on the device.
        classes: in the order of the logits.
        preprocess: of its images.
        device: "cuda" or "cuda:N".
        calibration: how its logits are read.

    Raises:
        EnvironmentProblem: the device is missing, fails, or is out of memory.
    """
    stream = open_stream(device)
    encoder = TorchEncoder(model.backbone, preprocess, stream)
    head = model.head()
    pipeline = CudaPipeline(stream, encoder, head, model.ncut, preprocess.size)
    # A run's classes are those it adapted to.
    facts = Facts(classes, frozenset(), preprocess, head.classifier, calibration)
    return CudaSession(pipeline, facts)


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
        tokens: Tokens,
        rest: Callable[[], None],
    ) -> Launches:
        """Capture encoder and `rest` in one graph.

        Raises:
            EnvironmentProblem: the device is out of memory.
        """
        try:
            return self._captured(pixels, tokens, rest)
        except torch.cuda.OutOfMemoryError as error:
            problem = out_of_memory(str(self._device), str(error))
        torch.cuda.empty_cache()  # here, where the error no longer holds tensors
        raise problem

    def _captured(
        self,
        pixels: cupy.ndarray,
        tokens: Tokens,
        rest: Callable[[], None],
    ) -> Launches:
        backbone = self._backbone
        assert backbone is not None, "a closed session captures nothing"
        graph = torch.cuda.CUDAGraph()
        with self._inference():
            images = from_dlpack(pixels)
            written = {name: from_dlpack(array) for name, array in tokens.items()}

            def work() -> None:
                seen = backbone(self._preprocess.normalize(images))
                written["cls"].copy_(seen.cls)
                written["patches"].copy_(seen.patches)
                if "agreement" in written:
                    direction = backbone.unproject(seen.cls)
                    written["agreement"].copy_(agreement_with(direction, seen.patches))
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
        with torch.cuda.stream(self._stream), torch.inference_mode(), exact_float32:
            yield

    def close(self) -> None:
        """Drop the backbone and give its memory back to the device."""
        self._backbone = None
        torch.cuda.empty_cache()
