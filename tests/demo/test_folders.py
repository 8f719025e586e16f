"""The benchmark as PNG folders."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.demo.folders import (
    Split,
    hidden_labels,
    target_image,
    write_class_texts,
    write_images,
    write_long_tails,
)
from microclip_deploy.demo.glyphs import class_names
from microclip_deploy.demo.long_tail import long_tail
from microclip_deploy.errors import UsageError


def test_unlabelled_images_lie_flat_and_are_named_by_number(tmp_path: Path) -> None:
    folder = write_images(tmp_path, Split.ADAPT, 3)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000000.png", "000001.png", "000002.png"]


def test_labelled_images_lie_in_class_folders_beside_their_ink(tmp_path: Path) -> None:
    folder = write_images(tmp_path, Split.TEST, 2, seed=5)
    assert sorted(path.name for path in folder.iterdir()) == sorted(class_names())
    for index, name in enumerate(class_names()[:2]):
        _, glyph = target_image(Split.TEST, index, seed=5)
        written, ink = (
            np.asarray(Image.open(tmp_path / top / name / f"{index:06}.png"))
            for top in ("test", "test-ink")
        )
        np.testing.assert_array_equal(written, glyph.image)
        np.testing.assert_array_equal(ink, np.rint(glyph.ink * 255).astype(np.uint8))


def test_splits_and_seeds_share_no_image() -> None:
    images = {
        target_image(split, index, seed=seed)[1].image.tobytes()
        for split in Split
        for index in range(10)
        for seed in (0, 1)
    }
    assert len(images) == 60


def test_order_of_unlabelled_images_does_not_follow_the_classes() -> None:
    drawn, ordered = (
        [target_image(split, index)[0] for index in range(30)] for split in (Split.ADAPT, Split.VAL)
    )
    assert sum(a == b for a, b in zip(drawn, ordered, strict=True)) < 5


def test_class_texts_name_the_same_classes(tmp_path: Path) -> None:
    write_class_texts(tmp_path)
    names = (tmp_path / "classes.txt").read_text(encoding="utf-8").splitlines()
    sentences = json.loads((tmp_path / "descriptions.json").read_text(encoding="utf-8"))
    assert tuple(names) == tuple(sentences) == class_names()


def test_no_images_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        write_images(tmp_path, Split.ADAPT, 0)


def test_long_tails_thin_the_unlabelled_images(tmp_path: Path) -> None:
    write_long_tails(tmp_path)
    assert len(list((tmp_path / "long-tail").iterdir())) == 6
    lines = (tmp_path / "long-tail" / "imbalance-50-order-1.txt").read_text().splitlines()
    assert lines[0].startswith("../adapt/")
    kept = np.array([int(Path(line).stem) for line in lines])
    counts = np.sort(np.bincount(hidden_labels(3072)[kept], minlength=82))
    assert counts[0] == 1  # round(38 / 50)
    assert counts[-1] == 38
    assert np.all(np.diff(kept) > 0)


def test_no_imbalance_keeps_as_many_of_every_class() -> None:
    labels = np.repeat(np.arange(5), 20)
    kept = long_tail(labels, 1, 0, most=7)
    np.testing.assert_array_equal(np.bincount(labels[kept]), np.full(5, 7))
