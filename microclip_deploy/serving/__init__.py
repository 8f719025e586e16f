"""Inference sessions: one protocol, one backend a file."""

from microclip_deploy.serving.session import Prediction, Session, open_session

__all__ = ["Prediction", "Session", "open_session"]
