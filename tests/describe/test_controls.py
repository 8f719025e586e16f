"""Texts that descriptions must beat, and what is said where they do not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from microclip_deploy.adapt.run_directory import INPUTS
from microclip_deploy.cli.commands import run_evaluate
from microclip_deploy.data.classes import ClassTexts, class_texts
from microclip_deploy.describe.controls import control_rows, random_words, words_of
from microclip_deploy.describe.vocabulary import RANDOM_WORDS, VISIBLE, singular
from microclip_deploy.errors import UsageError
from microclip_deploy.evaluation.comparison import compared
from microclip_deploy.model.clip import BackboneSpec, load_clip

NAMES = ("robin", "blue jay")
SAID = (
    ("A robin has a red breast.", "grey back"),
    ("The blue jay has a tall crest.", "The blue jay has white bars on its wings."),
)
QUIET = Console(quiet=True)


def test_random_sentences_have_the_name_and_as_many_other_words() -> None:
    found = random_words(SAID, NAMES, 0)
    assert [[len(text.split(": ")[1].split()) for text in group] for group in found] == [
        [5, 2],
        [5, 7],
    ]
    assert all(text.startswith(f"{n}: ") for n, g in zip(NAMES, found, strict=True) for text in g)


def test_draws_are_the_same_everywhere_and_shared_by_the_classes() -> None:
    found = random_words(SAID, NAMES, 0)
    assert found[0][0] == "robin: captain thunder slowly holding hammer"
    assert found[0][0].split(": ")[1] == found[1][0].split(": ")[1]
    assert found == random_words(SAID, NAMES, 0) != random_words(SAID, NAMES, 1)


def test_random_words_describe_nothing() -> None:
    assert len(set(RANDOM_WORDS)) == len(RANDOM_WORDS) > 90
    assert not VISIBLE & set(map(singular, RANDOM_WORDS))


def test_shuffled_words_are_those_of_the_descriptions() -> None:
    among = words_of(SAID, NAMES)
    assert {"red", "crest", "bar"} <= set(among)
    assert not {"robin", "jay"} & set(among)
    told = random_words(SAID, NAMES, 0, among)
    assert set(told[1][1].partition(": ")[2].split()) <= set(among)


def test_only_bare_names_without_descriptions(classes_file: Path, tiny_model_dir: Path) -> None:
    encode = load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}")).text
    texts = class_texts(classes_file)
    assert list(control_rows(encode, texts)) == ["bare names"]
    described = ClassTexts(
        texts.names, tuple((f"{name} of one colour",) for name in texts.names), texts.templates
    )
    rows = control_rows(encode, described)
    assert {control: len(draws) for control, draws in rows.items()} == {
        "bare names": 1,
        "filtered": 1,
        "random words": 5,
        "shuffled words": 5,
    }
    matrices = [matrix for draws in rows.values() for matrix in draws]
    assert all(np.allclose(np.linalg.norm(matrix, axis=1), 1) for matrix in matrices)


def test_the_interval_holds_images_and_draws() -> None:
    right = np.array([1, 1, 1, 0] * 100, np.bool_)
    drawn = np.array([[1, 0, 1, 0] * 100, [1, 1, 0, 0] * 100, [0, 0, 1, 0] * 100], np.bool_)
    found = compared("random words", right, drawn)
    images = 1.96 * np.sqrt((right - drawn.mean(axis=0)).var(ddof=1) / 400)
    draws = 4.30 * np.sqrt(np.var([0.5, 0.5, 0.25], ddof=1) / 3)
    assert found.difference == pytest.approx(1 / 3)
    assert found.high - found.difference == pytest.approx(np.hypot(images, draws))
    assert found.low == pytest.approx(2 * found.difference - found.high)


def test_descriptions_that_win_on_the_same_images_are_told() -> None:
    right, drawn = np.arange(200) < 150, np.arange(200) < np.array([[100], [101], [99]])
    found = compared("random words", right, drawn)
    assert found.beaten
    assert "beat random words: +25.0 points" in found.sentence()


@pytest.mark.parametrize(
    ("right", "said"),
    [(0.5, "do not beat random words beyond chance"), (0.1, "are worse than random words")],
)
def test_descriptions_that_gain_nothing_are_told(right: float, said: str) -> None:
    images = np.arange(200) < 200 * right
    chance = np.random.default_rng(0).permuted(np.tile(np.arange(200) < 100, (3, 1)), axis=1)
    found = compared("random words", images, chance)
    assert not found.beaten
    assert said in found.sentence()
    assert "adapt with templates" in found.sentence()


def test_one_image_proves_nothing() -> None:
    assert not compared("random words", np.array([True]), np.array([[False]])).beaten


@pytest.fixture
def described_run(finished_run: Path, tmp_path: Path) -> Path:
    """Return a run whose inputs hold descriptions."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    inputs = json.loads((run / INPUTS).read_text())
    inputs["descriptions"] = [[f"{name} on dark noise", "it"] for name in inputs["classes"]]
    (run / INPUTS).write_text(json.dumps(inputs))
    return run


def test_evaluate_tells_terminal_json_and_report(described_run: Path, photos: Path) -> None:
    result = run_evaluate(described_run, photos, QUIET, controls=True, device="cpu")
    rows = [row.texts for row in result.rows[8:]]
    assert rows == ["bare names", "filtered", "random words", "shuffled words"]
    assert [control.control for control in result.controls] == [
        "random words",
        "shuffled words",
        "names",
    ]
    kept = json.loads((described_run / "evaluation.json").read_text())
    page = (described_run / "report.html").read_text("utf-8")
    console = Console(width=300)
    with console.capture() as captured:
        console.print(*result.tables())
    for control, stored in zip(result.controls, kept["controls"], strict=True):
        assert stored["sentence"] == control.sentence()
        assert control.sentence() in page
        assert control.sentence() in " ".join(captured.get().split())
        assert control.beaten or control.sentence() in result.warnings


def test_controls_need_a_run_with_zero_shot(
    finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--no-zero-shot"):
        run_evaluate(finished_run, photos, QUIET, controls=True, zero_shot=False)
    (tmp_path / "manifest.json").write_text('{"schema": "microclip.export/1"}')
    with pytest.raises(UsageError, match="an export"):
        run_evaluate(tmp_path, photos, QUIET, controls=True)
