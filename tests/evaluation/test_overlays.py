"""Overlays of predicted photos, in a folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.errors import EnvironmentProblem
from microclip_deploy.evaluation.overlays import OverlayWriter, overlay_name
from microclip_deploy.evaluation.predict import FailedImage, ImagePrediction
from tests.serving.test_overlay import centre_mask, grey_image, preprocess


def made_up(path: Path) -> ImagePrediction:
    return ImagePrediction(
        3, path, (), "", "", centre_mask(), np.ones(17, np.float32), False, grey_image(32)
    )


def test_overlays_have_the_photos_size_and_are_told(tmp_path: Path) -> None:
    photo = tmp_path / "naïve name?.png"
    Image.new("RGB", (90, 50)).save(photo)
    writer = OverlayWriter(tmp_path / "deep" / "down")
    failed = FailedImage(0, Path("x"), "empty")
    gone = made_up(tmp_path / "gone.png")
    drawn, *told = writer.drawn([made_up(photo), failed, gone], preprocess())
    assert told == [failed, gone]
    assert isinstance(drawn, ImagePrediction)
    assert drawn.overlay == tmp_path / "deep" / "down" / "000003-na-ve-name.png"
    with Image.open(drawn.overlay) as picture:
        assert picture.size == (90, 50)


def test_an_overlay_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="could not be written"):
        OverlayWriter(tmp_path / "file")


def test_overlay_names_never_leave_the_folder() -> None:
    assert overlay_name(made_up(Path("/etc/.."))) == "000003-image.png"
