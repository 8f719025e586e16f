"""The class list of the letters benchmark."""

from microclip_deploy.demo.letters.glyphs import (
    CLASS_CHARACTERS,
    class_names,
    descriptions,
    descriptions_by_name,
    parts,
)


def test_there_are_82_classes_with_names_of_their_own() -> None:
    assert len(set(class_names())) == 82
    assert tuple(descriptions_by_name()) == class_names()


def test_every_class_has_five_descriptions_of_its_own() -> None:
    sentences = [sentence for c in CLASS_CHARACTERS for sentence in set(descriptions(c))]
    assert len(sentences) == 5 * 82
    assert len({descriptions(c) for c in CLASS_CHARACTERS}) == 82


def test_mark_under_a_tall_letter_is_called_a_comma() -> None:
    assert parts("ķ") == ("k", "comma")
    assert parts("ç") == ("c", "cedilla")
    assert parts("a") == ("a", "")
