"""The encoder of a CUDA session in TensorRT: backbone.plan, in one CUDA graph with the kernels."""

from collections.abc import Callable
from pathlib import Path

import cupy

from microclip_deploy.serving.cuda_pipeline import (
    CudaPipeline,
    Launches,
    Tokens,
    captured,
    open_stream,
)
from microclip_deploy.serving.cuda_session import CudaSession
from microclip_deploy.serving.engines import BACKBONE_PLAN, EngineManifest, find_engines
from microclip_deploy.serving.exported import Export, read_export, read_head
from microclip_deploy.serving.tensorrt_engine import Engine, target


def open_engines(path: Path, device: str) -> CudaSession:
    """Verify an export and load its engine for this machine.

    Args:
        path: directory that `export --trt` completed.
        device: "cuda" or "cuda:N".

    Raises:
        CheckpointError: export or engines are damaged, or TensorRT refuses the plan.
        EnvironmentProblem: no engines for this machine; the device or its memory is missing.
    """
    stream = open_stream(device)  # first: without a device TensorRT crashes
    export = read_export(path)
    here = target(stream.device_id)
    engines = find_engines(export, here)
    plan, kernels = engines.plan(BACKBONE_PLAN), engines.kernels(here)
    engine = Engine(plan, stream, BACKBONE_PLAN, kernels)
    return session_of(export, engines.manifest, engine, stream)


def session_of(
    export: Export, manifest: EngineManifest, engine: Engine, stream: cupy.cuda.Stream
) -> CudaSession:
    """Serve a backbone plan that is loaded.

    Raises:
        CheckpointError, EnvironmentProblem: as `open_engines`.
    """
    known, head = export.manifest, read_head(export)
    encoder = TensorRTEncoder(engine, manifest, stream)
    pipeline = CudaPipeline(stream, encoder, head, known.ncut_spec(), known.preprocess.size)
    return CudaSession(pipeline, export.facts(), buckets=manifest.buckets())


class TensorRTEncoder:
    """backbone.plan on the static buffers, captured with what follows; a context a bucket."""

    def __init__(self, engine: Engine, manifest: EngineManifest, stream: cupy.cuda.Stream) -> None:
        """Take over an engine that runs on the stream."""
        outputs = {each.name: each for each in manifest.plans[BACKBONE_PLAN].tensors.outputs}
        self.tokens = int(outputs["patches"].shape[1])
        self._engine: Engine | None = engine
        self._manifest = manifest
        self._stream = stream

    def capture(
        self,
        pixels: cupy.ndarray,
        tokens: Tokens,
        rest: Callable[[], None],
    ) -> Launches:
        """Capture encoder and `rest` in one graph.

        Raises:
            CheckpointError: the plan is no backbone, or refuses the batch.
            EnvironmentProblem: the device fails, or is out of memory.
        """
        assert self._engine is not None, "a closed session captures nothing"
        profile = self._manifest.profile_of(len(pixels))
        encode = self._engine.bind(profile, {"image": pixels, **tokens})

        def work() -> None:
            encode()
            rest()

        return captured(work, self._stream)

    def close(self) -> None:
        """Drop the engine."""
        self._engine = None
