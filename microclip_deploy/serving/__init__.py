"""Inference sessions: one protocol, one session or encoder a file."""

from microclip_deploy.serving.classification import Classification
from microclip_deploy.serving.opening import (
    RunSessions,
    is_export,
    open_graphs,
    open_run,
    open_session,
)
from microclip_deploy.serving.session import Prediction, Session

__all__ = [
    "Classification",
    "Prediction",
    "RunSessions",
    "Session",
    "is_export",
    "open_graphs",
    "open_run",
    "open_session",
]
