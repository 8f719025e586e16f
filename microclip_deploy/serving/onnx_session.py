"""ONNX Runtime session: an export, run without PyTorch."""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.errors import CheckpointError
from microclip_deploy.head import fused_logits
from microclip_deploy.paths import StrPath, as_path
from microclip_deploy.serving.exported import FULL, Export, read_export
from microclip_deploy.serving.onnx_graph import Input, OnnxGraph
from microclip_deploy.serving.session import (
    Facts,
    Prediction,
    Session,
    closed_session,
)

_OUTPUTS = Prediction._fields
"""The graph's outputs have the names of a prediction's fields; others are not computed."""


class OnnxSession(Session):
    """An export as a session.

    The class matrix is an input of the graph, so classes change without another export. Several
    threads may use it at once: it holds no state that a call changes.
    """

    def __init__(self, graph: OnnxGraph, facts: Facts, cls_share: float) -> None:
        super().__init__(facts, graph.device)
        self._graph: OnnxGraph | None = graph
        self._cls_share = cls_share

    @classmethod
    def open(cls, path: StrPath, device: str = "cpu", *, threads: int | None = None) -> Self:
        """Verify an export and load its whole graph.

        Args:
            path: directory that `export` wrote.
            device: "auto", "cpu", "cuda", "cuda:N" or "openvino".
            threads: of one operator on the CPU; None for one a core that this process may use.

        Raises:
            CheckpointError: missing, damaged, or with a graph that cannot be run.
            EnvironmentProblem: the device, its provider or its memory is missing.
            UsageError: an unknown device, or no number of threads.
        """
        export = read_export(as_path(path, "export"))
        graph = OnnxGraph(export.directory / FULL, device, threads=threads)
        _require_contract(graph, export)
        return cls(graph, export.facts(), export.manifest.cls_share)

    def _answer(self, pixels: NDArray[np.uint8]) -> Prediction:
        graph = self._graph
        if graph is None:  # closed by another thread meanwhile
            raise closed_session()
        feeds: dict[str, NDArray[Any]] = {"image": pixels, "classifier": self._classifier}
        if self.device != "openvino":
            return Prediction(*graph.run(_OUTPUTS, feeds))
        # OpenVINO takes an input's default for a constant: it would answer for the classes that
        # there were when the graph was written.
        names = [name for name in _OUTPUTS if name != "logits"]
        found = dict(zip(names, graph.run(names, feeds), strict=True))
        cls_share = np.float32(self._cls_share)
        logits = fused_logits(found["cls"], found["fg"], self._classifier, cls_share)
        return Prediction(logits=logits, **found)

    def _release(self) -> None:
        self._graph = None  # its memory goes once no call uses it


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
