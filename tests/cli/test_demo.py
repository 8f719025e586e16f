"""The benchmark end to end, on a handful of images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.cli.main import main
from microclip_deploy.demo import folders
from microclip_deploy.demo.folders import Split, hidden_labels, target_image
from microclip_deploy.demo.glyphs import CLASS_CHARACTERS
from microclip_deploy.demo.ink import inked_tokens, mask_ink_iou
from microclip_deploy.serving import open_session


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that `demo --write-images` wrote, with a handful of images."""
    folder = tmp_path_factory.mktemp("demo") / "images"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "SIZES", {Split.ADAPT: 24, Split.VAL: 82, Split.TEST: 82})
        assert main(["demo", "--write-images", str(folder)]) == 0
    return folder


def test_write_images_gives_ordinary_folders(images: Path) -> None:
    assert len(list((images / "adapt").glob("*.png"))) == 24
    assert len(list((images / "test").glob("*/*.png"))) == 82
    assert len((images / "classes.txt").read_text("utf-8").splitlines()) == 82


@pytest.mark.slow
def test_demo_measures_before_and_after(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = images.parent
    assert main(["demo", "-o", str(out), "--device", "cpu", "--json"]) == 0
    shown = capsys.readouterr()
    assert "already written" in shown.err
    found = json.loads(shown.out.splitlines()[-1])
    assert found["images"] == 82
    assert {row["model"] for row in found["rows"]} == {"adapted", "zero-shot"}
    adapted = [row for row in found["rows"] if row["model"] == "adapted"]
    assert found["exported"] == adapted  # the graph in ONNX Runtime says the same
    assert (out / "seed-0" / "report.html").is_file()
    with open_session(out / "seed-0") as session:
        assert 0 < mask_ink_iou(session, images) < 1


def test_a_folder_that_cannot_be_written_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--write-images", str(tmp_path / "file")]) == 4
    assert "could not be written" in capsys.readouterr().err


def test_hidden_labels_are_the_rendered_characters() -> None:
    drawn = [target_image(Split.ADAPT, index)[0] for index in range(5)]
    assert [CLASS_CHARACTERS[label] for label in hidden_labels(5)] == drawn


def test_inked_tokens_cover_the_glyph(tmp_path: Path) -> None:
    ink = np.zeros((64, 64), np.uint8)
    ink[8:16, 16:24] = 255
    Image.fromarray(ink).save(tmp_path / "ink.png")
    found = inked_tokens(tmp_path / "ink.png", 64)
    np.testing.assert_array_equal(np.flatnonzero(found), [1 * 8 + 2])
