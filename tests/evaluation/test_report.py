import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from microclip_deploy import artifact
from microclip_deploy.adapt.log import read_history
from microclip_deploy.adapt.run_directory import read_inputs
from microclip_deploy.data.classes import class_texts
from microclip_deploy.errors import CheckpointError
from microclip_deploy.evaluation.chart import epoch_chart
from microclip_deploy.evaluation.evaluate import EVALUATION, evaluate
from microclip_deploy.evaluation.page import shortened, visible
from microclip_deploy.evaluation.report import Montage, render, write_report
from microclip_deploy.model.checkpoint import SCHEMA
from microclip_deploy.verdict import Move, Verdict

HOSTILE = '<script>alert("x")</script>'


class Elements(HTMLParser):
    """Collects start tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    run = shutil.copytree(finished_run, tmp_path_factory.mktemp("report") / "run")
    return write_report(run, sample_images=3).read_text("utf-8")


@pytest.fixture
def manifest(finished_run: Path) -> dict[str, Any]:
    return artifact.read_manifest(finished_run, SCHEMA)


@pytest.fixture
def history(finished_run: Path) -> list[dict[str, Any]]:
    return read_history(finished_run / "history.jsonl")


def rendered(manifest: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """Return the page of a run of which nothing else is known."""
    return render(manifest, history, None, Montage((), ""), None)


def test_the_page_stands_alone(page: str) -> None:
    elements = Elements(page)
    assert elements.count("script") == elements.count("link") == elements.count("iframe") == 0
    sources = [a["src"] or "" for _, a in elements.found if "src" in a]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert not any(key in a for _, a in elements.found for key in ("href", "onload", "onerror"))
    assert re.findall(r"https?://|url\(|@import", page) == []
    assert "default-src 'none'" in page


def test_an_image_is_shown_at_a_glance_and_with_all_its_pictures(page: str) -> None:
    pictures = [a["src"] or "" for tag, a in Elements(page).found if tag == "img"]
    assert sum("image/jpeg" in source for source in pictures) == 3 * (2 + 5)


def test_the_page_tells_what_happened(page: str) -> None:
    for text in ("red circle", "the file is empty", "batch_size", "classes.sha256"):
        assert text in page
    assert "80.0 %" in page
    assert page.count('<img class="chart"') == page.count('<source media="(max-width') == 4


@pytest.mark.parametrize(("model", "pretrained", "name", "remark"), [
    ("ViT-B-32", "openai", "ViT-B-32", "openai, 32 pixels"),
    ("ViT-B-32", "/photos/weights.safetensors", "ViT-B-32", "weights.safetensors, 32 pixels"),
    ("local-dir:/models/tiny", None, "tiny", "a local folder, 32 pixels"),
    ("hf-hub:org/repo", None, "repo", "org, 32 pixels"),
    ("demo", None, "demo", "a tiny model of this package, 32 pixels"),
])  # fmt: skip
def test_the_backbone_is_named(
    manifest: dict[str, Any], model: str, pretrained: str | None, name: str, remark: str
) -> None:
    manifest["backbone"] |= {"model": model, "pretrained": pretrained}
    text = rendered(manifest, [])
    assert f'<bdi title="{name}">{name}</bdi>' in text
    assert f'<div class="remark">{remark}</div>' in text


def test_long_names_lose_their_middle_and_keep_it_as_a_title(
    manifest: dict[str, Any], history: list[dict[str, Any]]
) -> None:
    long = f"first {'of many ' * 12}last"
    manifest["classes"][0] = long
    text = rendered(manifest, history)
    assert f'<bdi title="{long}">{shortened(long, 36)}</bdi>' in text
    assert (len(shortened(long, 36)), shortened(long, 200)) == (36, long)
    assert re.fullmatch("first .*….* last", shortened(long, 36))


def test_an_evaluation_gives_the_headline(finished_run: Path, photos: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    measured = evaluate(run, photos).to_json()
    artifact.write_json(run / EVALUATION, measured)
    text = write_report(run, sample_images=0).read_text("utf-8")
    before, after = measured["rows"][3]["top1"], measured["rows"][0]["top1"]
    assert f"{100 * before:.1f} → {100 * after:.1f} %" in text
    assert "Mean per class" in text


def test_where_the_descriptions_come_from_is_told(manifest: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("robin\ncrow\n")
    said = [
        {"class": name, "text": f"A {name} is a bird.", "model": HOSTILE, "prompt_sha256": "ab12"}
        for name in ("robin", "crow")
    ]
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in said))
    texts = class_texts(tmp_path / "classes.txt", path)
    manifest["texts"]["provenance"] = texts.provenance
    page = rendered(manifest, [])
    for told in ("said.jsonl", hashlib.sha256(path.read_bytes()).hexdigest(), "ab12", "&lt;script"):
        assert told in page
    assert HOSTILE not in page


@pytest.mark.parametrize("classes", [3, 200])
def test_confused_classes_are_drawn_and_listed(
    manifest: dict[str, Any], history: list[dict[str, Any]], classes: int
) -> None:
    names = [f"{HOSTILE} $x$ 日本 {'long ' * 30}{i}" for i in range(classes)]
    evaluation: dict[str, Any] = {
        "rows": [],
        "warnings": [],
        "bad": [],
        "whole_image_masks": 0.0,
        "mask_share": 0.5,
        "images": 4 * classes,
        "per_class": [
            {"class": n, "images": 4, "correct": 3, "zero_shot_correct": 1} for n in names
        ],
        "confusions": [{"class": a, "predicted": b, "images": 1} for a, b in pairwise(names)],
    }
    text = render(manifest, history, None, Montage((), ""), evaluation)
    assert "Which classes are confused" in text
    assert text.count("1 of 4") == min(classes - 1, 12)
    assert "<script" not in text
    evaluation["confusions"] = []
    assert "are confused" not in render(manifest, history, None, Montage((), ""), evaluation)


def test_the_verdict_names_moves_and_classes_and_shows_photos(
    finished_run: Path, manifest: dict[str, Any], history: list[dict[str, Any]]
) -> None:
    inputs, classes = read_inputs(finished_run), manifest["classes"]
    said = Verdict(
        decision="cannot tell",
        change=None,
        photos=10,
        agreement=(0.5, 0.4),
        changed=0.3,
        moves=(Move(0, 1, 7, (0, 1)),),
        effective=(2, 2),
        missing=0,
        harmed=(1,),
    )
    manifest |= {"verdict": said.model_dump(mode="json"), "rolled_back": [classes[0]]}
    page = render(manifest, history, inputs, Montage((), ""), None)
    assert "Did it help?" in page
    assert "rolled back to zero-shot" in page
    rows = re.findall(r"<tr>.*?class=\"moved\".*?</tr>", page)
    assert len(rows) == 1
    assert rows[0].count("data:image/jpeg") == 2
    assert all(part in rows[0] for part in (classes[0], classes[1], ">7<"))
    del manifest["verdict"]  # an older run
    assert "Did it help?" not in rendered(manifest, history)


def test_validation_is_drawn(manifest: dict[str, Any], history: list[dict[str, Any]]) -> None:
    for number, epoch in enumerate(history):
        epoch["validation"] = {"top1": 0.5 + 0.1 * number, "cls_top1": 0.4, "fg_top1": 0.3}
    text = rendered(manifest, history)
    assert "Validation accuracy" in text
    assert "70.0 %" in text


def test_hostile_texts_stay_texts(
    manifest: dict[str, Any], history: list[dict[str, Any]], finished_run: Path
) -> None:
    manifest["classes"][0] = HOSTILE
    manifest["warnings"] = [f'"><img src=x onerror=alert(1)>{HOSTILE}']
    manifest["texts"]["provenance"]["classes.file"] = "\x1b[31m\u202eevil\udcff\x00.txt"
    inputs = read_inputs(finished_run).model_copy(
        update={
            "classes": (HOSTILE, "b", "c"),
            "descriptions": ((HOSTILE,), ("b",), ("c",)),
            "bad_images": (("</td><script>x</script>", HOSTILE),),
        }
    )
    text = render(manifest, history, inputs, Montage((), HOSTILE), None)
    elements = Elements(text)
    assert elements.count("script") == 0
    assert not any("onerror" in attributes for _, attributes in elements.found)
    assert "[31mevil.txt" in text
    assert "&lt;script&gt;" in text
    text.encode("utf-8")
    assert not set(map(ord, text)) & (set(range(32)) - {10})


def test_warnings_are_shown(manifest: dict[str, Any], history: list[dict[str, Any]]) -> None:
    manifest["warnings"] = ["the pseudo-labels collapsed: one class holds 99%"]
    text = rendered(manifest, history)
    assert "One thing needs your attention" in text
    assert "collapsed" in text


def test_many_classes_show_the_extremes(
    manifest: dict[str, Any], history: list[dict[str, Any]]
) -> None:
    manifest["classes"] = [f"class {i}" for i in range(1000)]
    history[-1]["label_counts"] = list(range(1000))
    text = rendered(manifest, history)
    assert "Most frequent" in text
    assert text.count('class="fill"') == 24
    assert "no image was given to 1 class." in text


def test_lost_images_leave_a_note(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    inputs = json.loads((run / "inputs.json").read_text())
    inputs["images"] = [str(tmp_path / "gone.png")]
    (run / "inputs.json").write_text(json.dumps(inputs))
    assert "No pictures: " in write_report(run).read_text("utf-8")


def test_a_checkpoint_alone_gives_a_report(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "inputs.json").unlink()
    assert "does not name its images" in write_report(run).read_text("utf-8")


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--resume"):
        write_report(tmp_path)


def test_visible_keeps_joiners_and_drops_control() -> None:
    assert visible("a\u200cb\u200d\u202e\x07\n\u2028é") == "a\u200cb\u200d é"


def test_nothing_to_draw_is_no_chart() -> None:
    assert epoch_chart({"a": [None, None]}) == ""


def test_measurements_other_than_accuracy_are_no_headline(
    manifest: dict[str, Any], history: list[dict[str, Any]]
) -> None:
    for epoch in history:
        epoch["validation"] = {"pseudo_label_accuracy": 0.5}
    assert "Accuracy on" not in rendered(manifest, history)
