"""The page about descriptions."""

from pathlib import Path

import pytest

from microclip_deploy.describe.judge import Judgement, Pair, Similarity, judged
from microclip_deploy.describe.report import LISTED, render, write_report
from microclip_deploy.describe.sentence import Sentence, Verdict

HOSTILE = "<script>alert('x')</script> &lt;b&gt; \u202eright\u202c \u200f \x1b[31m =1+1 {{ 7*7 }}"


def test_everything_from_the_model_is_escaped() -> None:
    sentence = Sentence(HOSTILE, HOSTILE, {})
    pair = Pair(HOSTILE, HOSTILE, 0.9, 0.8)
    alike = Similarity(HOSTILE, (0.9, 0.9), (0.8, 0.8), (pair,))
    verdicts = (Verdict(sentence, ""), Verdict(sentence, f"markup: {HOSTILE}"))
    page = render(
        Judgement((HOSTILE, "robin"), verdicts, (), alike, True),
        provenance={"model": HOSTILE, HOSTILE: "x"},
        spend={"cost": HOSTILE},
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 8
    assert not any(character in page for character in "\x1b\u202e\u202c\u200f")
    assert "49" not in page.partition("<main>")[2].replace("&#39;", "")
    assert "default-src 'none'" in page


def test_kept_and_dropped_stand_with_their_reason(tmp_path: Path) -> None:
    said = [
        Sentence("robin", "A robin has a red breast.", {}),
        Sentence("robin", "A robin sings loudly.", {}),
    ]
    found = judged(said, ("robin", "crane"), None, None)
    write_report(tmp_path / "page.html", found, provenance={"file": "d.jsonl", "sha256": "0a"})
    page = (tmp_path / "page.html").read_text("utf-8")
    for text in (
        "A robin has a red breast.",
        "<bdi>sound</bdi>",
        "No sentence is left for 1 of the classes",
        "has several meanings",
        "0a",
    ):
        assert text in page
    assert "cosine" not in page  # nothing was measured
    assert "cost" not in page


def test_a_page_about_many_classes_stays_small() -> None:
    names = tuple(f"class {number}" for number in range(10_000))
    said = tuple(Verdict(Sentence(name, f"{name} is {'big ' * 20}", {}), "") for name in names)
    dropped = tuple(verdict._replace(reason="markup") for verdict in said)
    page = render(Judgement(names, said + dropped, (), None, False), provenance={})
    assert len(page) < 400_000
    assert page.count("<summary>") == LISTED + 1


@pytest.mark.parametrize("value", [0.5, 1.0])
def test_equal_cosines_are_drawn(value: float) -> None:
    alike = Similarity("demo", (value, value), (value, value), (Pair("a", "b", value, value),))
    assert "Most alike" in render(Judgement(("a", "b"), (), (), alike, False), provenance={})
