"""Joint reading: the classes of a folder's photos, each with the help of all others."""

from microclip_deploy.joint.folder import Folder, joint_probabilities
from microclip_deploy.joint.shortlist import Shortlist

__all__ = ["Folder", "Shortlist", "joint_probabilities"]
