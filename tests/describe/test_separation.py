"""The filter in CLIP's text space, and what judges sentences with it."""

import numpy as np
import pytest

from microclip_deploy.demo.letters.glyphs import class_names, descriptions_by_name
from microclip_deploy.describe.judge import judged
from microclip_deploy.describe.sentence import Sentence
from microclip_deploy.describe.separation import margins, neutral, separating
from microclip_deploy.model.clip import BackboneSpec, Clip, load_clip

NAMES = class_names()[::7]  # letters and marks all differ


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip(BackboneSpec(model="demo"))


def test_margin_is_the_cosine_with_the_own_class_less_that_with_the_worst_neighbour() -> None:
    classes = np.eye(3, dtype=np.float32)
    rows = np.array([[0.8, 0.6, 0.0], [0.0, 0.6, 0.8]], np.float32)
    neighbours = np.array([[1, 2], [0, 2], [0, 1]])
    found = margins(rows, np.array([0, 1]), classes, neighbours)
    assert found.values == pytest.approx([0.2, -0.2])
    assert found.rivals.tolist() == [1, 2]


def test_every_class_keeps_its_best_sentences() -> None:
    margin = np.array([-0.3, -0.1, 0.2, -0.2, -0.4, -0.4], np.float32)
    owners = np.array([0, 0, 0, 1, 1, 1])
    assert separating(margin, owners, 2).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("A robin has a red breast.", "it has a red breast."),
        ("robin: red breast", "it red breast"),
        ("The ROBIN's breast is red.", "it breast is red."),
        ("A robinia has leaves.", "A robinia has leaves."),
    ],
)
def test_the_name_is_taken_out_of_a_sentence(text: str, left: str) -> None:
    assert neutral(text, "robin") == left


def test_a_sentence_of_another_class_does_not_separate(clip: Clip) -> None:
    texts, last = descriptions_by_name(), NAMES[-1]
    said = [Sentence(name, text, {}) for name in NAMES[:-1] for text in texts[name]]
    wrong = Sentence(NAMES[0], texts[last][1], {})
    found = judged([*said, wrong], NAMES, None, clip)
    (verdict,) = (v for v in found.dropped if v.sentence.text.endswith(wrong.text))
    assert verdict.reason == f"does not separate: {last}"
    assert found.empty == (last,)


def test_classes_are_compared_before_and_after(clip: Clip) -> None:
    texts = descriptions_by_name()
    said = [Sentence(name, text, {}) for name in NAMES[1:] for text in texts[name]]
    found = judged(said, NAMES, "letters", clip, filtering=False)
    alike = found.similarity
    assert alike is not None
    assert found.empty == NAMES[:1]
    assert not found.filtered
    assert len(alike.names) == len(alike.sentences) == len(NAMES)
    assert alike.names != alike.sentences
    assert all(0 < pair.names < 1 for pair in alike.pairs)


def test_the_order_of_the_sentences_does_not_change_what_is_kept(clip: Clip) -> None:
    texts = descriptions_by_name()
    said = [Sentence(name, text, {}) for name in NAMES for text in texts[name]]
    by_class = sorted(said, key=lambda sentence: sentence.class_name)
    assert judged(said, NAMES, None, clip).kept == judged(by_class, NAMES, None, clip).kept
