"""Pretraining captions: what a print shows, in many words.

Plain and stroked letters exist only in pretraining: they teach the model that a mark can be absent.
"""

from random import Random

from microclip_deploy.demo.letters.glyphs import (
    CLASS_CHARACTERS,
    LETTER_SHAPES,
    MARKS,
    Parts,
    glyph_name,
    parts,
)
from microclip_deploy.demo.letters.render import PrintStyle

_STROKED = "øłđħŧ"
_PLAIN = "abcdefghijklmnopqrstuvwxyz"
PRETRAINING_CHARACTERS = CLASS_CHARACTERS + _STROKED + _PLAIN

_OPENINGS = (
    "a photo of",
    "an image of",
    "a picture of",
    "",
    "",
    "a print of",
    "this is",
    "close up of",
    "a view of",
)
_ADJECTIVES = ("", "", "", "small ", "lowercase ", "printed ", "plain ")
_ENDINGS = (
    "",
    "",
    "",
    "",
    " on {paper} paper",
    " in {ink} ink",
    " in {style} type",
    ", {style}",
    ", {ink} on {paper}",
)
_NAME_SHARE = 0.35  # share of captions that use the Unicode name; the rest describe


def caption(character: str, rng: Random, style: PrintStyle) -> str:
    """Draw one random pretraining caption.

    Args:
        character: one of `PRETRAINING_CHARACTERS`.
        rng: source of every choice; same state, same caption.
        style: what the rendered print looks like, for captions that mention it.

    Returns:
        One lower-case phrase: the Unicode name or a description, sometimes with the print style.
    """
    opening = rng.choice(_OPENINGS)
    ending = rng.choice(_ENDINGS).format(**style._asdict())
    if rng.random() < _NAME_SHARE:
        body = _name_phrase(character, rng)
    elif parts(character).mark:
        body = _marked_phrase(parts(character), rng)
    else:
        body = _plain_phrase(parts(character).letter, rng)
    return f"{opening} {body}{ending}".strip()


def _name_phrase(character: str, rng: Random) -> str:
    name = glyph_name(character)
    if rng.random() >= 0.7:
        name = name.replace("latin small ", "")
    return f"the {name}" if rng.random() < 0.3 else name


def _plain_phrase(letter: str, rng: Random) -> str:
    shape, adjective = rng.choice(LETTER_SHAPES[letter]), rng.choice(_ADJECTIVES)
    return rng.choice(
        (
            f"a {adjective}letter {letter} without accent",
            f"the {adjective}letter {letter} with no mark",
            f"a bare {letter} with nothing above or below it",
            f"{letter}, {shape}, and no accent",
            f"only a {adjective}{letter}: {shape}",
            f"{shape}, the letter {letter}, without any mark",
        )
    )


def _marked_phrase(glyph: Parts, rng: Random) -> str:
    letter, mark = glyph.letter, MARKS[glyph.mark]
    shape, noun, place = rng.choice(mark.shapes), rng.choice(mark.nouns), mark.position
    body, adjective = rng.choice(LETTER_SHAPES[letter]), rng.choice(_ADJECTIVES)
    return rng.choice(
        (
            f"a {adjective}letter {letter} with {noun}",
            f"the {adjective}letter {letter} with {shape} {place} it",
            f"{shape} {place} a {adjective}{letter}",
            f"{noun} {place} the letter {letter}",
            f"a {adjective}{letter} that has {noun}",
            f"the letter {letter} carries {shape}",
            f"{body} and {shape} {place} it",
            f"{letter}, {body}, with {noun}",
            f"a {adjective}{letter}: {body}, {shape} {place} it",
            f"you see {shape} {place} the {adjective}letter {letter}",
            f"there is {noun} {place} the {letter}",
            f"look for {shape} {place} the {letter}",
            f"it is a {letter} and {place} it {shape}",
            f"a {letter} wearing {noun}, {shape}",
        )
    )
