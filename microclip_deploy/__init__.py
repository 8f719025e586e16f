"""microclip-deploy: adapt a CLIP ViT to unlabeled photos, export it, serve it, measure it.

from pathlib import Path
from microclip_deploy import open_session, read_image

with open_session(Path("runs/birds")) as session:
    prediction = session.predict_photos([read_image("new/1.jpg")])
"""

from microclip_deploy.data.decode import read_image
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.serving import Prediction, Session, open_session

__all__ = ["Prediction", "Preprocess", "Session", "open_session", "read_image"]
