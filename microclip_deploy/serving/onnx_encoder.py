"""The encoder of a CUDA session in ONNX Runtime: backbone.onnx, without PyTorch."""

from collections.abc import Callable
from pathlib import Path

import cupy
import numpy as np

from microclip_deploy.errors import CheckpointError
from microclip_deploy.serving.cuda_pipeline import (
    CudaPipeline,
    Launches,
    Tokens,
    captured,
    open_stream,
)
from microclip_deploy.serving.cuda_session import CudaSession
from microclip_deploy.serving.exported import (
    BACKBONE,
    ExportManifest,
    read_export,
    read_head,
)
from microclip_deploy.serving.onnx_graph import Buffer, OnnxGraph


def open_export(path: Path, device: str) -> CudaSession:
    """Verify an export and load its backbone for the kernels.

    Args:
        path: directory that `export` wrote.
        device: "cuda" or "cuda:N".

    Raises:
        CheckpointError: missing, damaged, or older than the kernels.
        EnvironmentProblem: the device, its provider or its memory is missing.
    """
    stream = open_stream(device)
    export = read_export(path)
    known, head = export.manifest, read_head(export)
    graph = OnnxGraph(path / BACKBONE, f"cuda:{stream.device_id}", stream=stream.ptr)
    encoder = OnnxEncoder(graph, _tokens(path, known), stream)
    pipeline = CudaPipeline(stream, encoder, head, known.ncut_spec(), known.preprocess.size)
    return CudaSession(pipeline, export.facts())


class OnnxEncoder:
    """backbone.onnx on the static buffers.

    It is launched node by node, and waited for, before a graph of what follows it: ONNX Runtime
    allocates inside a run, so another library cannot capture it.
    """

    def __init__(self, graph: OnnxGraph, tokens: int, stream: cupy.cuda.Stream) -> None:
        """Take a graph that runs on the stream."""
        self.tokens = tokens
        self._graph: OnnxGraph | None = graph
        self._stream = stream

    def capture(
        self,
        pixels: cupy.ndarray,
        tokens: Tokens,
        rest: Callable[[], None],
    ) -> Launches:
        """Bind the encoder to the buffers and capture `rest`.

        Raises:
            CheckpointError: the graph is no backbone.
            EnvironmentProblem: the device is out of memory.
        """
        assert self._graph is not None, "a closed session captures nothing"
        encode = self._graph.bind(
            {"image": _buffer(pixels)}, {name: _buffer(each) for name, each in tokens.items()}
        )
        encode()  # so that `rest`, which runs once before its capture, has tokens to read
        after = captured(rest, self._stream)

        def replay() -> None:
            encode()
            after.replay()

        def eager() -> None:
            encode()
            after.eager()

        return Launches(replay, eager)

    def close(self) -> None:
        """Drop the graph."""
        self._graph = None


def _buffer(array: cupy.ndarray) -> Buffer:
    return Buffer(array.data.ptr, np.dtype(array.dtype).type, array.shape)


def _tokens(path: Path, manifest: ExportManifest) -> int:
    """Return N as the manifest tells it."""
    outputs = manifest.graphs[BACKBONE].outputs if BACKBONE in manifest.graphs else ()
    for output in outputs:
        if output.name == "patches" and len(output.shape) == 3:
            return int(output.shape[1])
    raise CheckpointError(
        f"{path}: expected a {BACKBONE} with the output patches (batch, N, D), found none; export "
        "again, or use --device cpu"
    )
