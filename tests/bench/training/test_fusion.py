"""Readings of finished runs, in the folders of both benches."""

import shutil
from pathlib import Path

import pytest
import typer

from microclip_deploy.artifact import read_json
from microclip_deploy.bench.training.ablations import OWN
from microclip_deploy.bench.training.answers import ANSWERS, read_answers
from microclip_deploy.bench.training.fusion import ACCURACY, main, readings
from microclip_deploy.demo.benchmark import Split
from microclip_deploy.demo.objects.benchmark import OBJECTS


def test_runs_are_asked_once_and_read_alike_in_both_layouts(
    finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    out, run = tmp_path / "ablations", tmp_path / "ablations" / OWN / "seed-0"
    shutil.copytree(finished_run, run)
    (out / OWN / "seed-1").mkdir()  # not finished
    names = list(OBJECTS.descriptions)[:3]
    for number, (folder, name) in enumerate(zip(sorted(photos.iterdir()), names, strict=True)):
        shutil.copytree(folder, out / "images" / "test" / name)
        for photo in folder.iterdir():
            target = out / "images" / "adapt" / f"{number}-{photo.name}"
            target.parent.mkdir(exist_ok=True)
            shutil.copy(photo, target)
    main(out, benchmark="objects", results_to=tmp_path / "found")
    told = read_answers(run / ANSWERS)
    assert told["test.labels"].tolist() == sorted(8 * [0, 1, 2], key=lambda place: names[place])
    assert told["folder.labels"].tolist() == OBJECTS.labels(Split.ADAPT, 24).tolist()
    assert readings(told, "test")["half and half"] == pytest.approx(
        told["test.adapted.logits"], abs=1e-3
    )
    found = read_json(tmp_path / "found.json")["results"]
    (own,) = found[OWN]
    right = told["test.adapted.logits"].argmax(axis=1) == told["test.labels"]
    assert own[ACCURACY]["test"] == right.mean()
    assert own["half and half"] == {"folder": 0, "test": 0}

    kept = tmp_path / "long-tail" / "microclip" / "balanced" / "seed-0" / ANSWERS
    kept.parent.mkdir(parents=True)
    shutil.move(run / ANSWERS, kept)
    main(tmp_path / "long-tail", results_to=tmp_path / "found")
    assert read_json(tmp_path / "found.json")["results"] == {"microclip, balanced": [own]}


def test_a_folder_without_runs_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="found none; run long_tail first"):
        main(tmp_path)
