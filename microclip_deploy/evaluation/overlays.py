"""Overlays of predicted photos, in a folder."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from microclip_deploy import artifact
from microclip_deploy.data.decode import BadImage
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.evaluation.predict import FailedImage, ImagePrediction, Result
from microclip_deploy.serving.overlay import photo_overlay


class OverlayWriter:
    """One PNG a photo, of its own size."""

    def __init__(self, directory: Path) -> None:
        """Make the folder.

        Raises:
            EnvironmentProblem: it cannot be made.
        """
        artifact.make_directory(directory)
        self._directory = directory

    def drawn(self, results: Iterable[Result], preprocess: Preprocess) -> Iterator[Result]:
        """Write INDEX-NAME.png of every prediction, and tell each result with its overlay.

        A photo that has gone since its prediction gets none.

        Args:
            results: what `predict` returns.
            preprocess: of the session that predicted.

        Raises:
            EnvironmentProblem: the disk is full or the folder cannot be written.
        """
        for result in results:
            yield result if isinstance(result, FailedImage) else self._drawn(result, preprocess)

    def _drawn(self, result: ImagePrediction, preprocess: Preprocess) -> ImagePrediction:
        try:
            photo = preprocess.read(result.path)
        except BadImage:
            return result
        seen = preprocess.seen(photo.size)
        picture, buffer = photo_overlay(photo, seen, result.mask, result.attention), io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)  # the higher ones take seconds a photo
        path = self._directory / overlay_name(result)
        artifact.write_bytes(path, buffer.getvalue())
        return replace(result, overlay=path)


def overlay_name(result: Result) -> str:
    """Return a file name that is unique in its run and plain on every system."""
    kept = "".join(c if c.isalnum() and c.isascii() else "-" for c in result.path.stem)
    return f"{result.index:06d}-{kept[:60].strip('-') or 'image'}.png"
