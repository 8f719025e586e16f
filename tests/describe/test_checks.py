"""Checks of sentences by their wording."""

from collections.abc import Sequence

import pytest

from microclip_deploy.describe.checks import check, kind
from microclip_deploy.describe.name_remarks import name_remarks
from microclip_deploy.describe.sentence import Sentence, Verdict
from tests.describe.labelled_sentences import BAD, GOOD, NAMES

CLASSES = ("robin", "blue jay", "house wren")


def judged(*said: tuple[str, str], names: Sequence[str] = CLASSES) -> list[Verdict]:
    return check([Sentence(name, text, {}) for name, text in said], names, None)


def reasons(*said: tuple[str, str], names: Sequence[str] = CLASSES) -> list[str]:
    return [kind(verdict.reason) for verdict in judged(*said, names=names)]


def test_precision_and_recall_on_sentences_that_a_reader_judged() -> None:
    said = [*GOOD, *((name, text) for _, name, text in BAD)]
    found = reasons(*said, names=NAMES)
    good, bad = found[: len(GOOD)], found[len(GOOD) :]
    dropped, caught = sum(map(bool, found)), sum(map(bool, bad))
    precision, recall = caught / dropped, caught / len(BAD)
    print(f"precision {precision:.3f}, recall {recall:.3f}")
    assert [text for (_, text), reason in zip(GOOD, good, strict=True) if reason] == []
    assert bad == [expected for expected, _, _ in BAD]
    assert [precision, recall] == [1.0, 29 / 30]


def test_formatting_is_cleaned_and_not_dropped() -> None:
    found = judged(
        ("robin", '2) "A robin has  a\nred breast."'),
        ("robin", "- The **robin** has a thin `yellow` bill."),
        ("robin", "\u201cThe robin\u2019s legs are slender.\u201d\u200b"),
    )
    assert [verdict.sentence.text for verdict in found] == [
        "A robin has a red breast.",
        "The robin has a thin yellow bill.",
        "The robin\u2019s legs are slender.",
    ]
    assert not any(verdict.reason for verdict in found)


def test_a_sentence_without_its_class_gets_the_name_in_front() -> None:
    (found,) = judged(("blue jay", "It has a crest."))
    assert found == Verdict(Sentence("blue jay", "blue jay: It has a crest.", {}), "")


def test_the_name_is_left_out_where_it_would_cut_the_sentence() -> None:
    def six_words(text: str) -> int | None:
        count = len(text.split())
        return count if count > 6 else None

    said = ["It has one very large crest.", "The blue jay has one very large crest."]
    found = check([Sentence("blue jay", text, {}) for text in said], CLASSES, six_words)
    assert found[0] == Verdict(Sentence("blue jay", said[0], {}), "")
    assert found[1].reason == "too long: 8 tokens"


@pytest.mark.parametrize(
    ("names", "name", "text", "reason"),
    [
        (("orange", "rose"), "rose", "A rose may have orange petals.", ""),
        (("woodpecker", "hairy woodpecker"), "hairy woodpecker", "This woodpecker is black.", ""),
        (("cars", "truck"), "truck", "The truck is taller than a car.", "another class named"),
        (
            ("Bewick's wren", "robin"),
            "robin",
            "Bewick\u2019s wren is brown.",
            "another class named",
        ),
        (("crane (bird)", "crane (machine)"), "crane (bird)", "The crane has thin legs.", ""),
        (("\u72d7", "\u732b"), "\u72d7", "\u6709\u8033\u6735", ""),
    ],
)
def test_class_names_are_found_as_words(
    names: tuple[str, ...], name: str, text: str, reason: str
) -> None:
    assert reasons((name, text), names=names) == [reason]


def test_what_is_said_of_several_classes_is_dropped_from_all() -> None:
    found = judged(
        ("robin", "A robin has two wings."),
        ("blue jay", "The blue jay has two wings."),
        ("house wren", "A house wren has two barred wings."),
    )
    assert [verdict.reason for verdict in found] == [
        "said of another class too: blue jay",
        "said of another class too: robin",
        "",
    ]


def test_of_near_duplicates_the_first_is_kept() -> None:
    assert reasons(
        ("robin", "The robin has a red breast above a pale grey belly."),
        ("robin", "Robins have a RED breast above the pale gray belly!"),
        ("robin", "A robin has a red breast above its pale grey belly."),
    ) == ["", "", "repeated"]


@pytest.mark.parametrize(
    ("said", "against"),
    [
        (["red breast", "a breast that curves", "The breast is bright red", "blue breast"], 3),
        (["black and white wings", "white wings", "The wings are green"], 2),
        (["red breast", "The male has a black breast"], None),
        (["black wings", "white wing bars"], None),
        (["brown upper wings are long", "white under wings"], None),
        (["grey head", "The head is gray or black"], None),
        (["brown back", "a tan back"], None),
    ],
)
def test_two_colours_of_one_part_contradict(said: list[str], against: int | None) -> None:
    found = reasons(*(("robin", text) for text in said))
    assert [row for row, reason in enumerate(found) if reason == "against the others"] == (
        [] if against is None else [against]
    )


def test_hostile_sentences_end_quickly_and_never_raise() -> None:
    hostile = ["", " ", "\x00", "\ud800", "*" * 500, '"' * 500, "a" * 10**6, "(" * 599, "1. " * 190]
    assert all(reasons(*(("robin", text) for text in hostile)))


@pytest.mark.parametrize("name", ["crane", "Jaguar", "bats", "Passer domesticus", "Canis lupus"])
def test_names_to_look_at(name: str) -> None:
    (remark,) = name_remarks(["house wren", name, "crane (bird)", "American robin"], None)
    assert remark.name == name


@pytest.mark.parametrize("name", ["crane", "Boeing 737", "Red panda", "Canada goose", "a", "DC-10"])
def test_a_domain_settles_ambiguous_names(name: str) -> None:
    assert name_remarks([name], "bird species") == []


def test_a_latin_name_is_told_with_a_domain_too() -> None:
    assert "common" in name_remarks(["Quercus robur", "oak"], "trees")[0].text
