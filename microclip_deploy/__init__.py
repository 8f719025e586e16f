"""microclip-deploy: adapt a CLIP ViT to unlabeled photos, export it, serve it, measure it.

from microclip_deploy import open_session

with open_session("runs/birds") as session:
    print(session.classify("new/1.jpg"))
"""

from microclip_deploy.data.decode import read_image
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.serving import Classification, Prediction, Session, open_session

__all__ = [
    "Classification",
    "Prediction",
    "Preprocess",
    "Session",
    "open_session",
    "read_image",
]
