"""Inference sessions: one protocol, one backend a file."""

from pathlib import Path

from microclip_deploy.errors import require
from microclip_deploy.serving.session import Prediction, Session

__all__ = ["Prediction", "Session", "open_session"]


def open_session(path: Path, device: str = "cpu") -> Session:
    """Open a run directory with the backend its manifest asks for.

    Args:
        path: directory that `adapt` wrote.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        CheckpointError: missing, damaged or of an unknown schema.
        EnvironmentProblem: the backend's packages or the device are missing.
    """
    # Through `require`, so that whichever package is missing comes with its install line.
    require("microclip_deploy.serving.torch_backend", "adapt")
    from microclip_deploy.serving.torch_backend import TorchSession

    return TorchSession.open(path, device)
