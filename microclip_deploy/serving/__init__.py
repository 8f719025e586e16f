"""Inference sessions: one protocol, one backend a file."""

from pathlib import Path

from microclip_deploy import artifact
from microclip_deploy.errors import CheckpointError, require
from microclip_deploy.serving.session import Prediction, Session

__all__ = ["Prediction", "Session", "is_export", "open_session"]

_CHECKPOINT = "microclip.checkpoint/"
_EXPORT = "microclip.export/"


def open_session(path: Path, device: str = "cpu") -> Session:
    """Open a run or an export with the backend that the schema in its manifest asks for.

    Args:
        path: directory that `adapt` or `export` wrote.
        device: "auto", "cpu", "cuda" or "cuda:N"; for an export also "openvino". "auto" is a GPU
            where the backend has one that works, otherwise the CPU; the session's `device` says
            which.

    Raises:
        CheckpointError: missing, damaged or of an unknown schema.
        EnvironmentProblem: the backend's packages or the device are missing.
        UsageError: not a device that this backend knows.
    """
    schema = artifact.read_schema(path)
    # Through `require`, so that whichever package is missing comes with its install line.
    if schema.startswith(_CHECKPOINT):
        require("microclip_deploy.serving.torch_backend", "adapt")
        from microclip_deploy.serving.torch_backend import TorchSession

        return TorchSession.open(path, device)
    if schema.startswith(_EXPORT):
        require("microclip_deploy.serving.onnx_backend", "cpu")
        from microclip_deploy.serving.onnx_backend import OnnxSession

        return OnnxSession.open(path, device)
    raise CheckpointError(
        f"{path / artifact.MANIFEST}: expected schema {_CHECKPOINT}N or {_EXPORT}N, found "
        f"{schema}; give a directory that `adapt` or `export` wrote"
    )


def is_export(path: Path) -> bool:
    """Say whether a directory is an export, which holds the adapted model alone.

    Raises:
        CheckpointError: it has no manifest with a schema.
    """
    return artifact.read_schema(path).startswith(_EXPORT)
