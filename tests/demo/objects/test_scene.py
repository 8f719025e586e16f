"""Scenes and the drawings in them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from microclip_deploy.demo.benchmark import Split
from microclip_deploy.demo.objects.benchmark import OBJECTS, TARGET, _drawings
from microclip_deploy.demo.objects.drawings import (
    TARGET_ARTISTS,
    TILE,
    Drawings,
    read_sheet,
    sheet_image,
    target_sheets,
)
from microclip_deploy.demo.objects.names import CLASSES, CLUTTER
from microclip_deploy.demo.objects.scene import Domain, render, token_cover


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_artist_has_drawn_everything() -> None:
    for artist, sheet in target_sheets().items():
        assert artist in TARGET_ARTISTS
        assert list(sheet) == [*CLASSES, *CLUTTER]
        for tile in sheet.values():
            assert tile[..., 3].max() == 255  # no tile is empty


def test_a_sheet_is_read_as_it_was_written(tmp_path: Path) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (30, TILE, TILE, 4), np.uint8)
    sheet_image(list(tiles)).save(tmp_path / "a.png")
    names = [f"thing {i}" for i in range(30)]
    read = read_sheet(tmp_path / "a.png", names)
    assert list(read) == names
    np.testing.assert_array_equal(np.stack([*read.values()]), tiles)


def test_artists_take_turns_and_a_missing_drawing_is_the_others_share() -> None:
    tile = np.ones((TILE, TILE, 4), np.uint8)
    sheets = {"a": {"x": tile, "y": tile}, "b": {"x": 2 * tile}}
    drawings = Drawings(sheets, ("x", "y", "z"))
    assert drawings.things == ("x", "y")
    drawn = drawings.draw(torch.tensor([0] * 200 + [1] * 20), generator()) * 255
    values = drawn[:, 0, 0, 0].round()
    assert 70 < (values[:200] == 1).sum() < 130
    assert (values[200:] == 1).all()


def test_validation_and_test_show_different_drawings() -> None:
    val, test, adapt = (_drawings(split)[0] for split in (Split.VAL, Split.TEST, Split.ADAPT))
    which = torch.arange(len(CLASSES))
    shown = {
        name: {
            tile.numpy().tobytes()
            for seed in range(8)
            for tile in each.draw(which, generator(seed))
        }
        for name, each in (("val", val), ("test", test), ("adapt", adapt))
    }
    assert not shown["val"] & shown["test"]
    assert len(shown["val"]) == len(shown["test"]) == 42
    assert shown["val"] | shown["test"] == shown["adapt"]


def test_the_cover_is_where_the_object_changed_the_ground() -> None:
    animals, clutter = _drawings(Split.TEST)
    scene = render(animals, clutter, 16, TARGET, generator(3))
    assert scene.images.shape == (16, 3, 96, 96)
    assert scene.images.min() >= 0
    assert scene.images.max() <= 1
    assert (scene.labels[:, 1:] == -1).all()
    assert (scene.cover[:, 1:] == 0).all()
    share = scene.cover[:, 0].mean((1, 2))
    assert share.min() > 0.02
    assert share.max() < 0.25
    tokens = token_cover(scene.cover)
    assert tokens.shape == (16, 3, 144)
    torch.testing.assert_close(tokens[:, 0, 13], scene.cover[:, 0, 8:16, 8:16].mean((1, 2)))


def test_a_domain_decides_how_many_objects_there_are() -> None:
    animals, clutter = _drawings(Split.TEST)
    many = Domain(number=(0.0, 0.0, 1.0))
    scene = render(animals, clutter, 8, many, generator(1))
    assert (scene.labels >= 0).all()
    assert all(len(set(row.tolist())) == 3 for row in scene.labels)
    assert (scene.cover.sum(1) <= 1 + 1e-5).all()  # who lies on top hides the other


@pytest.mark.parametrize("split", list(Split))
def test_a_batch_does_not_depend_on_how_many_are_asked_for(split: Split) -> None:
    one, many = (list(OBJECTS.examples(split, 64, count)) for count in (2, 5))
    for a, b in zip(one, many, strict=False):
        np.testing.assert_array_equal(a.image, b.image)
        assert a.label == b.label
