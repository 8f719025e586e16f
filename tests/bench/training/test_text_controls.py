"""The table of class texts."""

from pathlib import Path

import pytest
from rich.console import Console

from microclip_deploy.bench.training.text_controls import (
    COLUMNS,
    differences,
    markdown,
    run_all,
    text_sets,
)
from microclip_deploy.demo.benchmark import Split
from microclip_deploy.demo.folders import write_class_texts, write_images
from microclip_deploy.demo.letters.benchmark import LETTERS
from microclip_deploy.model.clip import BackboneSpec, load_clip

ROWS = ["names only", "templates", "descriptions", "filtered", "random words", "shuffled words"]


def test_every_row_has_texts_for_every_class(tmp_path: Path) -> None:
    write_class_texts(LETTERS, tmp_path)
    encode = load_clip(BackboneSpec(model="demo")).text
    sets = text_sets(tmp_path, encode, 0)
    assert list(sets) == ROWS
    assert {len(texts.descriptions) for texts in sets.values()} == {82}
    sizes = {title: sum(map(len, texts.descriptions)) for title, texts in sets.items()}
    assert sizes["random words"] == sizes["shuffled words"] == sizes["descriptions"] == 410
    assert sizes["filtered"] < 410
    again = text_sets(tmp_path, encode, 1)
    assert [title for title in ROWS if again[title] != sets[title]] == ROWS[4:]


def test_the_table_holds_every_row_and_what_follows() -> None:
    run = {**dict.fromkeys(COLUMNS.values(), 0.5), "pseudo_labels": [0.4]}
    better = {**run, "fused": 0.6}
    results = {title: [run, run] for title in ROWS} | {"descriptions": [run, better]}
    assert all(f"| {title} | 2 |" in markdown(results) for title in ROWS)
    assert differences(results)[0] == (
        "Adapted, fused: descriptions minus random words +5.0 points on average, above it with 1 "
        "of 2 seeds."
    )


@pytest.mark.slow
def test_a_tiny_benchmark_runs_through_and_is_not_repeated(tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_class_texts(LETTERS, images)
    write_images(LETTERS, images, Split.TEST, 82)
    write_images(LETTERS, images, Split.ADAPT, 32)
    tiny = ["adapt.epochs=1", "adapt.batch_size=16", "views.crops=1"]
    quiet = Console(quiet=True)
    results = run_all(tmp_path, [0], quiet, sets=tiny)
    assert list(results) == ROWS
    assert run_all(tmp_path, [0], quiet, sets=tiny) == results
