"""The 82 classes of the benchmark: characters, names and descriptions.

A class is a precomposed small Latin letter with one combining mark. Its name comes from the
Unicode standard; its five descriptions stand in for the sentences a language model would write
about a fine-grained class.
"""

import unicodedata
from typing import NamedTuple

_BY_MARK = (
    "áéíóúýćĺńŕśźẃ",
    "âêîôûĉĝĥĵŝŵŷ",
    "čěňřšž",
    "çşţ",
    "ķļņŗ",
    "àèìòùẁỳ",
    "äëïöüÿẅ",
    "ăĕğĭŏŭ",
    "ãñõĩũ",
    "āēīōū",
    "ąęįų",
    "ċėġż",
    "åů",
    "őű",
    "ơư",
)
CLASS_CHARACTERS = "".join(_BY_MARK)


class Parts(NamedTuple):
    """A glyph taken apart: its base letter and the key of its mark ('' when it has none)."""

    letter: str
    mark: str


class Mark(NamedTuple):
    """Wording of one mark."""

    nouns: tuple[str, str]
    shapes: tuple[str, str, str, str]
    """One for each of the last four descriptions."""
    position: str = "above"


MARKS = {
    "acute": Mark(
        ("an acute accent", "an acute"),
        (
            "a short slanted stroke rising to the right",
            "a single slash leaning to the right",
            "one slanted line whose upper end points right",
            "a small tick climbing from left to right",
        ),
    ),
    "grave": Mark(
        ("a grave accent", "a grave"),
        (
            "a short slanted stroke falling to the right",
            "a single slash leaning to the left",
            "one slanted line whose upper end points left",
            "a small tick dropping from left to right",
        ),
    ),
    "circumflex": Mark(
        ("a circumflex", "a circumflex accent"),
        (
            "a small hat with its peak in the middle",
            "a pointed roof",
            "two short lines that meet in a peak",
            "a small arrow head pointing up",
        ),
    ),
    "caron": Mark(
        ("a caron", "a hacek"),
        (
            "a small wedge with its point at the bottom",
            "an upside down hat",
            "two short lines that meet in a valley",
            "a small arrow head pointing down",
        ),
    ),
    "tilde": Mark(
        ("a tilde", "a tilde accent"),
        (
            "a small wave",
            "a wavy line",
            "one curl going up and then down",
            "a short ripple lying flat",
        ),
    ),
    "macron": Mark(
        ("a macron", "a long mark"),
        (
            "a flat bar",
            "a straight level line",
            "one horizontal stroke",
            "a short bar lying flat",
        ),
    ),
    "breve": Mark(
        ("a breve", "a breve accent"),
        (
            "a small bowl open at the top",
            "a round cup",
            "one curved line sagging in the middle",
            "a little smile",
        ),
    ),
    "dot above": Mark(
        ("a dot above", "an overdot"),
        (
            "a single round dot",
            "one small point",
            "one dot in the middle",
            "a lone dot",
        ),
    ),
    "diaeresis": Mark(
        ("a diaeresis", "an umlaut"),
        (
            "two dots side by side",
            "a pair of small points",
            "two round dots in a row",
            "twin dots",
        ),
    ),
    "ring above": Mark(
        ("a ring above", "a ring"),
        (
            "a small circle",
            "a little round ring with a hole",
            "one hollow circle",
            "a tiny ring",
        ),
    ),
    "double acute": Mark(
        ("a double acute", "a double acute accent"),
        (
            "two slanted strokes rising to the right",
            "a pair of slashes leaning to the right",
            "two slanted lines side by side",
            "twin ticks climbing from left to right",
        ),
    ),
    "cedilla": Mark(
        ("a cedilla", "a cedilla mark"),
        (
            "a small hook attached at the bottom",
            "a little tail curling to the left",
            "one hook hanging from the middle",
            "a tiny curl like a five",
        ),
        "below",
    ),
    "comma": Mark(
        ("a comma below", "a cedilla drawn as a comma"),
        (
            "a small comma",
            "a little comma hanging free",
            "one short comma under the stem",
            "a detached comma",
        ),
        "below",
    ),
    "ogonek": Mark(
        ("an ogonek", "an ogonek tail"),
        (
            "a small tail curling to the right",
            "a little hook opening to the right",
            "one tail hanging from the lower right",
            "a tiny nose at the lower right",
        ),
        "below",
    ),
    "horn": Mark(
        ("a horn", "a horn mark"),
        (
            "a small hook at the shoulder",
            "a little curl on the right side",
            "one horn growing from the corner",
            "a tiny whisker",
        ),
        "at the upper right of",
    ),
    "stroke": Mark(
        ("a stroke", "a bar"),
        (
            "a line cutting through",
            "one straight line crossing it",
            "a slash running through",
            "a thin bar",
        ),
        "across",
    ),
}

LETTER_SHAPES = {
    "a": ("a round bowl with a stem on the right", "a closed bowl"),
    "b": ("a tall stem with a bowl on the right", "a tall stem on the left and a bowl"),
    "c": ("an open curve with a gap on the right", "a half circle open to the right"),
    "d": ("a tall stem with a bowl on the left", "a tall stem on the right and a bowl"),
    "e": ("a round curve with a level bar inside", "a closed eye over an open curve"),
    "f": ("a tall stem with a curved top and a crossbar", "a tall hook with a crossbar"),
    "g": ("a bowl with a tail below the line", "a round bowl and a hanging tail"),
    "h": ("a tall stem with one arch", "a tall stem on the left and an arch"),
    "i": ("a single short stem", "one upright stem"),
    "j": ("a stem that curls below the line to the left", "one stem with a hanging tail"),
    "k": ("a tall stem with two arms", "a tall stem with two slanted arms on the right"),
    "l": ("a single tall stem", "one tall upright stem"),
    "m": ("three stems with two arches", "two arches side by side"),
    "n": ("two stems joined by an arch", "a single arch"),
    "o": ("a closed round loop", "a full oval"),
    "p": ("a stem going below the line with a bowl on the right", "a low stem and a bowl"),
    "q": ("a stem going below the line with a bowl on the left", "a bowl and a low stem"),
    "r": ("a short stem with a small arm", "one stem with a short arm on the right"),
    "s": ("a double curve like a snake", "a curve that turns twice"),
    "t": ("a stem with a crossbar", "a short cross with a curved foot"),
    "u": ("two stems joined by a curve at the bottom", "a cup with a stem on the right"),
    "v": ("two slanted lines meeting at the bottom", "a single sharp valley"),
    "w": ("two valleys side by side", "four slanted lines"),
    "x": ("two crossing lines", "a cross of two slanted lines"),
    "y": ("two slanted lines with a tail below the line", "a fork with a hanging tail"),
    "z": ("two level bars joined by a slanted line", "a sharp zigzag"),
}


def glyph_name(character: str) -> str:
    """Return the Unicode name in lower case, e.g. 'latin small letter e with acute'."""
    return unicodedata.name(character).lower()


def class_names() -> tuple[str, ...]:
    """Return the 82 class names in class order."""
    return tuple(glyph_name(character) for character in CLASS_CHARACTERS)


def parts(character: str) -> Parts:
    """Split a glyph into base letter and mark.

    Unicode calls the mark under k, l, n and r a cedilla, but every face draws a comma: the
    descriptions follow what is seen.
    """
    letter, _, mark = glyph_name(character).removeprefix("latin small letter ").partition(" with ")
    if mark == "cedilla" and letter in "klnr":
        mark = "comma"
    return Parts(letter, mark)


def descriptions(character: str) -> tuple[str, ...]:
    """Return the five descriptive sentences of one class character."""
    letter, key = parts(character)
    mark, shape = MARKS[key], LETTER_SHAPES[letter][0]
    place = mark.position
    return (
        f"The letter {letter} carries {mark.nouns[0]}.",
        f"There is {mark.shapes[0]} {place} the {letter}.",
        f"It is {shape}, and {place} it you see {mark.shapes[1]}.",
        f"Look {place} the letter {letter} for {mark.shapes[2]}.",
        f"A small {letter} that has {mark.shapes[3]} {place} it.",
    )


def descriptions_by_name() -> dict[str, list[str]]:
    """Return {class name: five sentences}, the content of a descriptions.json file."""
    return {glyph_name(c): list(descriptions(c)) for c in CLASS_CHARACTERS}
