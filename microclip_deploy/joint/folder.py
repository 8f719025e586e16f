"""All photos of a folder, read together.

A photo's class probabilities follow three things at once: what the texts say of it, which class of
the folder its feature lies nearest to, and what its most similar photos are read as. Nothing is
learnt that outlives the folder.

Source: docs/joint.md. After TransCLIP (arXiv 2406.01837) and StatA (arXiv 2501.03729).
"""

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.errors import DataError, VerificationError
from microclip_deploy.joint.mixture import Mixture
from microclip_deploy.joint.neighbours import Messages, graph_of
from microclip_deploy.joint.shortlist import Shortlist, shortlisted

NEIGHBOURS = 5
"""Photos that each photo is compared to."""
ROUNDS = 10
"""Updates of the mixture."""
STEPS = 5
"""Updates of the probabilities between two of the mixture."""
_LEAST = 1e-30  # probability; its logarithm is finite


class Folder:
    """Features and texts' scores of photos as they come, and then the answer for all of them.

    Holds E float32 numbers and K = min(C, 32) classes with their scores a photo.
    """

    def __init__(self, class_matrix: NDArray[np.float32]) -> None:
        """Take the class matrix (C, E), unit rows, that the features are compared to."""
        self._texts = _checked("class matrix", class_matrix, class_matrix.shape[-1])
        self._features: list[NDArray[np.float32]] = []
        self._scores: list[Shortlist] = []

    def add(self, features: NDArray[np.float32], scores: NDArray[np.float32]) -> None:
        """Add the next photos.

        Args:
            features: (B, E), unit rows.
            scores: (B, C), logits, or logs of the texts' probabilities.

        Raises:
            DataError: other shapes, or rows that are not of norm 1.
            VerificationError: a number is NaN or infinite.
        """
        count, size = self._texts.shape
        rows = _checked("features", features, size).copy()  # sessions may use their arrays again
        if np.shape(scores) != (len(rows), count):
            raise DataError(
                f"joint reading: expected scores ({len(rows)}, {count}), found {np.shape(scores)}; "
                "give a row for each photo and a column for each class"
            )
        if not np.isfinite(scores).all():
            raise _not_finite("scores")
        self._features.append(rows)
        self._scores.append(shortlisted(np.asarray(scores, np.float32)))

    def read(self) -> Shortlist:
        """Return the joint probabilities of all photos, in the order they were added.

        Raises:
            DataError: there is no photo.
        """
        if not self._features:
            raise DataError("joint reading: expected photos, found none; add some")
        return _read(np.concatenate(self._features), self.scores(), self._texts)

    def scores(self) -> Shortlist:
        """Return the scores of all photos' shortlists, in the order they were added."""
        return Shortlist(*(np.concatenate(parts) for parts in zip(*self._scores, strict=True)))


def joint_probabilities(
    features: NDArray[np.float32],
    text_probabilities: NDArray[np.float32],
    class_matrix: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return joint probabilities, float32 (N, C) with rows that sum to 1.

    Args:
        features: float32 (N, E), unit rows.
        text_probabilities: float32 (N, C): what the texts say of each photo alone.
        class_matrix: float32 (C, E), unit rows.

    Raises:
        DataError: other shapes, no photo, or rows that are not of norm 1.
        VerificationError: a number is NaN or infinite.
    """
    folder = Folder(class_matrix)
    folder.add(features, np.log(np.maximum(text_probabilities, np.float32(_LEAST))))
    return folder.read().dense(len(class_matrix))


def _read(
    features: NDArray[np.float32], scores: Shortlist, texts: NDArray[np.float32]
) -> Shortlist:
    classes = scores.classes
    read = Shortlist(classes, _softmax(scores.values))
    neighbours = min(NEIGHBOURS, len(features) - 1)
    graph = graph_of(features, neighbours) if neighbours else None
    messages = Messages(graph, classes, len(texts)) if graph else None
    mixture = Mixture(features, texts, read)
    for moved in range(ROUNDS + 1):
        if moved:
            mixture.update(read)
        alone = scores.values + mixture.log_likelihood(classes)
        for _ in range(STEPS if messages else 1):
            heard = messages.told(read.values) if messages else 0
            read = Shortlist(classes, _softmax(alone + heard))
    return read


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares: NDArray[np.float32] = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _checked(name: str, rows: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return float32 (B, `size`) rows of norm 1."""
    if np.ndim(rows) != 2 or np.shape(rows)[1] != size or not np.size(rows):
        raise DataError(
            f"joint reading: expected {name} (rows, {size}), found {np.shape(rows)}; give what one "
            "session says"
        )
    if not np.isfinite(rows).all():
        raise _not_finite(name)
    norms = np.linalg.norm(rows, axis=1)
    if abs(norms - 1).max() > 0.01:  # half precision stays far below
        raise DataError(
            f"joint reading: expected {name} with rows of norm 1, found {norms.min():.3g} to "
            f"{norms.max():.3g}; divide each row by its norm"
        )
    return np.asarray(rows, np.float32)


def _not_finite(name: str) -> VerificationError:
    return VerificationError(
        f"joint reading: expected finite {name}, found NaN or infinity; the model is damaged or "
        "its precision too low; adapt again, or use --device cpu"
    )
