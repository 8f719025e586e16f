"""microclip-deploy: adapt a CLIP ViT to unlabeled photos, export it, serve it, measure it.

from pathlib import Path
from microclip_deploy import open_session

with open_session(Path("runs/birds")) as session:
    prediction = session.predict(images)  # uint8 (B, S, S, 3)
"""

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.serving import Prediction, Session, open_session

__all__ = ["Prediction", "Preprocess", "Session", "open_session"]
