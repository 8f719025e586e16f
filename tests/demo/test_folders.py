"""The benchmarks as PNG folders."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from microclip_deploy.demo.benchmark import BATCH, Benchmark, Split
from microclip_deploy.demo.folders import (
    write_benchmark,
    write_class_texts,
    write_images,
    write_long_tails,
)
from microclip_deploy.demo.letters.benchmark import LETTERS
from microclip_deploy.demo.long_tail import long_tail
from microclip_deploy.demo.objects.benchmark import OBJECTS
from microclip_deploy.errors import UsageError

both = pytest.mark.parametrize("benchmark", [LETTERS, OBJECTS], ids=lambda each: each.name)


def test_unlabelled_images_lie_flat_and_are_named_by_number(tmp_path: Path) -> None:
    folder = write_images(LETTERS, tmp_path, Split.ADAPT, 3)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000000.png", "000001.png", "000002.png"]


def test_labelled_images_lie_in_class_folders_beside_their_cover(tmp_path: Path) -> None:
    folder = write_images(OBJECTS, tmp_path, Split.TEST, BATCH + 2, seed=5)
    assert sorted(path.name for path in folder.iterdir()) == sorted(OBJECTS.descriptions)
    for index, example in enumerate(OBJECTS.examples(Split.TEST, BATCH, 2, seed=5), BATCH):
        name = list(OBJECTS.descriptions)[index % 42]
        written, cover = (
            np.asarray(Image.open(tmp_path / top / name / f"{index:06}.png"))
            for top in ("test", "test-cover")
        )
        np.testing.assert_array_equal(written, example.image)
        np.testing.assert_array_equal(cover, np.rint(example.cover * 255).astype(np.uint8))


@both
def test_splits_and_seeds_share_no_image(benchmark: Benchmark) -> None:
    images = {
        example.image.tobytes()
        for split in Split
        for seed in (0, 1)
        for example in benchmark.examples(split, 0, 10, seed=seed)
    }
    assert len(images) == 60


@both
def test_labels_are_those_of_the_images(benchmark: Benchmark) -> None:
    labels = {split: benchmark.labels(split, BATCH + 3) for split in Split}
    for split in Split:
        shown = [each.label for each in benchmark.examples(split, BATCH, 3)]
        assert shown == labels[split][BATCH:].tolist()
    # The order of the unlabelled images tells nothing.
    assert np.count_nonzero(labels[Split.ADAPT] == labels[Split.VAL]) < 8


@both
def test_class_texts_name_the_same_classes(benchmark: Benchmark, tmp_path: Path) -> None:
    write_class_texts(benchmark, tmp_path)
    names = (tmp_path / "classes.txt").read_text(encoding="utf-8").splitlines()
    sentences = json.loads((tmp_path / "descriptions.json").read_text(encoding="utf-8"))
    assert names == list(sentences) == list(benchmark.descriptions)


def test_no_images_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        write_images(LETTERS, tmp_path, Split.ADAPT, 0)


def test_a_folder_of_the_other_benchmark_is_left_alone(tmp_path: Path) -> None:
    write_class_texts(LETTERS, tmp_path)
    with pytest.raises(UsageError, match="expected the images of objects or nothing, found others"):
        write_benchmark(OBJECTS, tmp_path, Console(quiet=True))
    assert not (tmp_path / "adapt").exists()


def test_long_tails_thin_the_unlabelled_images(tmp_path: Path) -> None:
    write_long_tails(LETTERS, tmp_path)
    assert len(list((tmp_path / "long-tail").iterdir())) == 6
    lines = (tmp_path / "long-tail" / "imbalance-50-order-1.txt").read_text().splitlines()
    assert lines[0].startswith("../adapt/")
    kept = np.array([int(Path(line).stem) for line in lines])
    counts = np.sort(np.bincount(LETTERS.labels(Split.ADAPT, 3072)[kept], minlength=82))
    assert counts[0] == 1  # round(38 / 50)
    assert counts[-1] == 38
    assert np.all(np.diff(kept) > 0)


def test_no_imbalance_keeps_as_many_of_every_class() -> None:
    labels = np.repeat(np.arange(5), 20)
    kept = long_tail(labels, 1, 0, most=7)
    np.testing.assert_array_equal(np.bincount(labels[kept]), np.full(5, 7))
