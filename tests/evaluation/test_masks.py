"""What an evaluation tells of masks: where they lie, and how far they are the true ones."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError
from microclip_deploy.evaluation.masks import MaskTally, TrueMasks, overlap

SQUARE = Preprocess(size=32, mean=(0, 0, 0), std=(1, 1, 1))
CENTRE = np.zeros((4, 4), bool)
CENTRE[1:3, 1:3] = True


def tally(*masks: np.ndarray) -> MaskTally:
    found = MaskTally()
    none = np.zeros(len(masks), bool)
    found.add(np.stack([mask.ravel() for mask in masks]), none, ~none)
    return found


def test_masks_that_hug_the_border_are_counted_and_warned_of() -> None:
    facts = tally(CENTRE, ~CENTRE, ~CENTRE, np.ones((4, 4), bool)).result()
    assert facts.share == pytest.approx((4 + 12 + 12 + 16) / 64)
    assert (facts.whole, facts.border, facts.hugging) == (1 / 4, 2 / 3, 2 / 3)
    assert "probably inverted: 67% of the masks" in str(facts.warning())
    assert "--recipe object, or with --set ncut.side=cls if" in str(facts.warning())
    assert tally(CENTRE, ~CENTRE).result().warning() is None
    assert tally(np.ones((4, 4), bool)).result().warning() is None


def test_overlap_is_intersection_over_union() -> None:
    masks = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    truth = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]], bool)
    np.testing.assert_array_equal(overlap(masks, truth), [1, 0.25, 0, 0.25])
    found = tally(CENTRE)
    found.compare(CENTRE.reshape(1, 16), CENTRE.reshape(1, 16))
    facts = found.result()
    assert (facts.true_masks, facts.overlap) == (1, 1)
    assert "overlap with 1 true masks (IoU): 100.0 %" in facts.lines()[2]


def photo_of(folder: Path, size: tuple[int, int] = (64, 64)) -> Path:
    path = folder / "photos" / "bird" / "1.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


@pytest.mark.parametrize("kind", ["grey", "ones", "alpha", "opaque", "palette", "16 bit"])
def test_true_masks_are_read_as_they_are_kept(tmp_path: Path, kind: str) -> None:
    drawn = np.kron(CENTRE, np.ones((16, 16), bool))
    image = Image.fromarray(drawn.astype(np.uint8) * (1 if kind == "ones" else 255))
    if kind == "alpha":
        colour = Image.new("RGB", image.size, "white")
        colour.putalpha(image)
        image = colour
    elif kind == "opaque":
        image = image.convert("RGBA")
    elif kind == "palette":
        image = Image.fromarray(drawn.astype(np.uint8)).convert("P")
    elif kind == "16 bit":
        image = Image.fromarray(drawn.astype(np.uint16) * 4095)
    (tmp_path / "masks" / "bird").mkdir(parents=True)
    image.save(tmp_path / "masks" / "bird" / "1.png")
    (tmp_path / "masks" / "bird" / "1.json").write_text("{}")
    photo = photo_of(tmp_path)
    masks = TrueMasks.find(tmp_path / "masks", [photo])
    found = masks.read(photo, SQUARE, 16)
    assert found is not None
    np.testing.assert_array_equal(found, CENTRE.ravel())
    assert masks.read(tmp_path / "other.jpg", SQUARE, 16) is None


def test_masks_may_lie_in_one_folder_where_names_are_unique(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 255).save(tmp_path / "1.png")
    masks = TrueMasks.find(tmp_path, [Path("photos/bird/1.jpg"), Path("photos/bird/2.jpg")])
    assert masks.files == {"photos/bird/1.jpg": tmp_path / "1.png"}
    with pytest.raises(DataError, match=r"such as bird/1\.png, found none"):
        TrueMasks.find(tmp_path, [Path("photos/bird/1.jpg"), Path("photos/fish/1.jpg")])


def test_what_a_view_adds_around_a_photo_is_no_object(tmp_path: Path) -> None:
    Image.new("L", (64, 32), 255).save(tmp_path / "1.png")
    photo = photo_of(tmp_path, (128, 64))
    padded = SQUARE.model_copy(update={"resize_mode": "longest", "fill_color": 200})
    found = TrueMasks.find(tmp_path, [photo]).read(photo, padded, 16)
    assert found is not None
    assert found.reshape(4, 4).all(axis=1).tolist() == [False, True, True, False]


def test_what_is_no_mask_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"such as bird/1\.png, found none"):
        TrueMasks.find(tmp_path, [Path("bird/1.jpg")])
    (tmp_path / "1.png").write_bytes(b"text")
    photo = photo_of(tmp_path, (30, 40))
    with pytest.raises(DataError, match="expected an image, found"):
        TrueMasks.find(tmp_path, [photo]).read(photo, SQUARE, 16)
    Image.new("L", (40, 30)).save(tmp_path / "1.png")
    with pytest.raises(DataError, match="upright is 30 x 40 pixels, found 40 x 30; turn"):
        TrueMasks.find(tmp_path, [photo]).read(photo, SQUARE, 16)
