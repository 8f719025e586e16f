"""Texts that cannot work are found before anything is computed from them."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from microclip_deploy.data.classes import ClassTexts
from microclip_deploy.errors import DataError
from microclip_deploy.model.clip import BackboneSpec, Clip, TextEncoder, load_clip
from microclip_deploy.model.text import cut_warning, first_same, text_heads

LONG = "a bird with a long bill that dives in the cold lakes of the far north "
"""16 words, each a token; the tiny model reads 14 and two that mark start and end."""


@pytest.fixture(scope="module")
def clip(tiny_model_dir: Path) -> Clip:
    return load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))


def texts_of(names: Sequence[str], *descriptions: Sequence[str]) -> ClassTexts:
    filled = descriptions or [(f"a {name}",) for name in names]
    return ClassTexts(tuple(names), tuple(map(tuple, filled)), ("a {}",))


def test_sentences_that_are_cut_are_counted_and_named(
    clip: Clip, caplog: pytest.LogCaptureFixture
) -> None:
    loon = ["black", LONG + "of Canada", LONG + "of Norway and Iceland"]
    with caplog.at_level(logging.WARNING):
        text_heads(clip.text, texts_of(["loon", "grebe"], loon, ["brown"]))
    assert caplog.messages == [
        "warning: 2 of 6 sentences are longer than the 16 tokens that the text tower reads, and "
        "their ends are cut off: 'loon' (20 tokens), 'loon' (22 tokens); shorten them"
    ]


def test_a_sentence_that_just_fits_is_not_cut(clip: Clip) -> None:
    words = LONG.split()
    assert clip.text.uncut_length(" ".join(words[:14])) is None
    assert clip.text.uncut_length(" ".join([*words[:14], "indeed"])) == 17
    assert cut_warning(clip.text, texts_of(["loon", "grebe"])) is None
    assert str(cut_warning(clip.text, texts_of(["loon", LONG]))).startswith("1 of 2 sentences")


@pytest.mark.parametrize("end", [0, 2, 9])
def test_tokenizers_may_pad_with_anything(end: int) -> None:
    """Also with the token that ends a text, as Hugging Face's CLIP tokenizer does."""

    class Words:
        context_length = 4

        def __call__(self, texts: Sequence[str], context_length: int = 4) -> Tensor:
            rows = [(1, *map(len, text.split()))[: context_length - 1] for text in texts]
            filled = [(*row, 2, *[end] * context_length)[:context_length] for row in rows]
            return torch.tensor(filled)

    encode = TextEncoder(None, Words())
    lengths = [encode.uncut_length(text) for text in ("", "loon", "one loon", "two big loons")]
    assert lengths == [None, None, None, 5]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (texts_of(["loon", "grebe"], ["a", "b"], ["b", "a"]), "their sentences are the same"),
        (
            texts_of(["loon", "grebe"], [LONG + "of Canada"], [LONG + "of Norway"]),
            "differ only behind the 16 tokens",
        ),
        (
            texts_of(["Café &amp; bar", "café & bar"]),
            "the tokenizer reads their sentences alike; spell them otherwise",
        ),
    ],
)
def test_classes_of_one_row_are_refused_with_the_reason(
    clip: Clip, texts: ClassTexts, reason: str
) -> None:
    with pytest.raises(DataError, match=f"'{texts.names[0]}' and '{texts.names[1]}'.*{reason}"):
        text_heads(clip.text, texts)


def test_all_classes_of_a_row_are_named_and_other_rows_counted(clip: Clip) -> None:
    said = [["same"]] * 7 + [["other"], ["third"], ["other"]]
    texts = texts_of([f"class {i}" for i in range(10)], *said)
    with pytest.raises(DataError, match=r"'class 4' and 2 more \(and for 1 other groups"):
        text_heads(clip.text, texts)


def test_a_tower_that_tells_nothing_apart_is_refused(clip: Clip) -> None:
    class Deaf(TextEncoder):
        def __call__(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
            return torch.ones(len(texts), 4)

    deaf = Deaf(clip.text._clip, clip.text._tokenizer)
    with pytest.raises(DataError, match="gives all of their sentences one row"):
        text_heads(deaf, texts_of(["loon", "grebe"]))


def test_a_name_of_which_the_tokenizer_leaves_nothing_is_refused(clip: Clip) -> None:
    with pytest.raises(DataError, match=r"'&nbsp;': .*spell it in words"):
        text_heads(clip.text, texts_of(["loon", "&nbsp;"]))


def test_one_other_word_in_hundred_sentences_is_enough(clip: Clip) -> None:
    shared = [f"the {number}th sentence" for number in range(99)]
    texts = texts_of(["loon", "grebe"], [*shared, "it is black"], [*shared, "it is brown"])
    rows = text_heads(clip.text, texts).initial
    assert first_same(rows, rows) == [0, 1]
    assert first_same(rows, rows[1:]) == [None, 0]
