"""ONNX Runtime session: an export, run without PyTorch."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.data.classes import LOGIT_SCALE
from microclip_deploy.errors import CheckpointError
from microclip_deploy.serving.exported import FULL, Export, ExportManifest, read_export
from microclip_deploy.serving.onnx_graph import Input, OnnxGraph
from microclip_deploy.serving.session import Prediction, checked_images, closed_session

_OUTPUTS = Prediction._fields
"""The graph's outputs have the names of a prediction's fields; others are not computed."""


class OnnxSession:
    """An export behind the Session protocol.

    The class matrix is an input of the graph, so classes change without another export. `predict`
    may be called from several threads at once: the session holds no state that a call changes.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        classifier: NDArray[np.float32],
        manifest: ExportManifest,
    ) -> None:
        self.classes = manifest.classes
        self.unadapted = frozenset(manifest.unadapted)
        self.preprocess = manifest.preprocess
        self.device = graph.device
        self._graph: OnnxGraph | None = graph
        self._classifier = classifier
        self._classifier.flags.writeable = False
        self._cls_share = np.float32(manifest.cls_share)

    @classmethod
    def open(cls, path: Path, device: str = "cpu", *, threads: int | None = None) -> Self:
        """Verify an export and load its whole graph.

        Args:
            path: directory that `export` wrote.
            device: "auto", "cpu", "cuda", "cuda:N" or "openvino".
            threads: of one operator on the CPU; None for one a core.

        Raises:
            CheckpointError: missing, damaged, or with a graph that cannot be run.
            EnvironmentProblem: the device, its provider or its memory is missing.
            UsageError: an unknown device, or fewer than one thread.
        """
        export = read_export(path)
        graph = OnnxGraph(path / FULL, device, threads=threads)
        _require_contract(graph, export)
        return cls(graph, export.classifier, export.manifest)

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        """Classify uint8 (B, S, S, 3) images that `preprocess.test_view` made.

        Raises:
            DataError: another dtype, size or layout, or no image.
            CheckpointError: the graph fails on them.
            EnvironmentProblem: the device fails, or is out of memory.
            UsageError: the session is closed.
        """
        graph = self._graph
        if graph is None:
            raise closed_session()
        image = checked_images(images, self.preprocess.size)
        feeds: dict[str, NDArray[Any]] = {"image": image, "classifier": self._classifier}
        if self.device != "openvino":
            return Prediction(*graph.run(_OUTPUTS, feeds))
        # OpenVINO takes an input's default for a constant: it would answer for the classes that
        # there were when the graph was written.
        names = [name for name in _OUTPUTS if name != "logits"]
        found = dict(zip(names, graph.run(names, feeds), strict=True))
        return Prediction(logits=self._fused_logits(found["cls"], found["fg"]), **found)

    def classifier(self) -> NDArray[np.float32]:
        """Return the class matrix, (C, E), unit rows; read-only."""
        return self._classifier

    def _fused_logits(
        self, cls: NDArray[np.float32], fg: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return TokenFusion's logits (B, C) of unit rows (B, E).

        Source: docs/numerics.md section 5.
        """
        fused = self._cls_share * cls + (1 - self._cls_share) * fg
        logits: NDArray[np.float32] = (np.float32(LOGIT_SCALE) * fused) @ self._classifier.T
        return logits

    def close(self) -> None:
        """Drop the graph; its memory goes with it once no call uses it."""
        self._graph = None

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the session."""
        self.close()


def _require_contract(graph: OnnxGraph, export: Export) -> None:
    """Refuse a graph that other images, other class matrices or other outputs belong to."""
    side, width = export.manifest.preprocess.size, export.classifier.shape[1]
    wanted = {
        "image": Input("tensor(uint8)", (side, side, 3)),
        "classifier": Input("tensor(float)", (width,)),
    }
    found = {name: node._replace(shape=node.shape[1:]) for name, node in graph.inputs().items()}
    missing = set(_OUTPUTS) - set(graph.outputs())
    if found != wanted or missing:
        raise CheckpointError(
            f"{export.directory / FULL}: expected the inputs {_listed(wanted)} and the outputs "
            f"{', '.join(_OUTPUTS)}, found {_listed(found)}"
            f"{' without ' + ', '.join(sorted(missing)) if missing else ''}; export again"
        )


def _listed(inputs: dict[str, Input]) -> str:
    """Name inputs with the sizes of one row."""
    return ", ".join(f"{name} {node.dtype} {node.shape}" for name, node in sorted(inputs.items()))
