"""The class list of the embedded benchmark."""

from random import Random

from microclip_deploy.demo.glyphs import (
    CLASS_CHARACTERS,
    PRETRAINING_CHARACTERS,
    PrintStyle,
    caption,
    class_names,
    descriptions,
    descriptions_by_name,
    parts,
)

STYLE = PrintStyle("bold sans", "red", "white")


def test_there_are_82_classes_with_distinct_names() -> None:
    names = class_names()

    assert len(names) == 82
    assert len(set(names)) == 82


def test_every_class_has_five_distinct_descriptions() -> None:
    sentences = [descriptions(character) for character in CLASS_CHARACTERS]

    assert all(len(set(five)) == 5 for five in sentences)
    assert len({five for five in sentences}) == 82


def test_descriptions_file_follows_class_order() -> None:
    assert tuple(descriptions_by_name()) == class_names()


def test_mark_under_a_tall_letter_is_called_a_comma() -> None:
    assert parts("ķ") == ("k", "comma")
    assert parts("ç") == ("c", "cedilla")
    assert parts("a") == ("a", "")


def test_captions_are_repeatable_and_never_empty() -> None:
    first = [caption(c, Random(3), STYLE) for c in PRETRAINING_CHARACTERS]
    second = [caption(c, Random(3), STYLE) for c in PRETRAINING_CHARACTERS]

    assert first == second
    assert all(first)
