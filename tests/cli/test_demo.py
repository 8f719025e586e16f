"""The benchmark end to end, on a handful of images."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.cli.main import main
from microclip_deploy.demo.benchmark import Split
from microclip_deploy.demo.objects.benchmark import OBJECTS, Objects
from microclip_deploy.demo.truth import mask_iou, object_tokens
from microclip_deploy.serving import open_session


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the folder that `demo --write-images` wrote, with a handful of images."""
    folder = tmp_path_factory.mktemp("demo") / "images"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objects, "sizes", {Split.ADAPT: 64, Split.VAL: 42, Split.TEST: 42})
        assert main(["demo", "--write-images", str(folder)]) == 0
        yield folder


def test_write_images_gives_ordinary_folders(images: Path) -> None:
    assert len(list((images / "adapt").glob("*.png"))) == 64
    assert len(list((images / "test").glob("*/*.png"))) == 42
    assert len((images / "classes.txt").read_text("utf-8").splitlines()) == 42


@pytest.mark.slow
def test_demo_measures_before_and_after(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = images.parent
    assert main(["demo", "-o", str(out), "--device", "cpu", "--json"]) == 0
    shown = capsys.readouterr()
    assert "already written" in shown.err
    found = json.loads(shown.out.splitlines()[-1])
    assert found["images"] == 42
    assert {row["model"] for row in found["rows"]} == {"adapted", "zero-shot"}
    adapted = [row for row in found["rows"] if row["model"] == "adapted"]
    assert found["exported"] == adapted  # the graph in ONNX Runtime says the same
    assert (out / "seed-0" / "report.html").is_file()
    with open_session(out / "seed-0") as session:
        assert 0 < mask_iou(session, OBJECTS, images) < 1


def test_a_folder_that_cannot_be_written_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--write-images", str(tmp_path / "file")]) == 4
    assert "could not be written" in capsys.readouterr().err


def test_object_tokens_are_those_it_covers(tmp_path: Path) -> None:
    cover = np.zeros((64, 64), np.uint8)
    cover[8:16, 16:24] = 255
    Image.fromarray(cover).save(tmp_path / "cover.png")
    found = object_tokens(tmp_path / "cover.png", 64, 0.1)
    np.testing.assert_array_equal(np.flatnonzero(found), [1 * 8 + 2])
