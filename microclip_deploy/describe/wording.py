"""Sentences as checks see them: cleaned text, words, and the class names among them."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from microclip_deploy.data.names import clean_text, name_key
from microclip_deploy.describe.vocabulary import COLOURS, EMPTY, singular
from microclip_deploy.errors import DataError

Words = tuple[str, ...]

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_IN_BRACKETS = re.compile(r"\s*[(\[].*?[)\]]\s*")
_LIST_MARK = re.compile(r"(?:[-*\u2022\u2013]\s+|\(?\d{1,3}[.):]\s+)+")
_EMPHASIS = re.compile(r"(\*{1,3}|__|`)(\S(?:.*?\S)?)\1")
_QUOTED = re.compile(r"\"(.*)\"|\u201c(.*)\u201d|'(.*)'")


class Unusable(ValueError):
    """A text that no cleaning makes a sentence; the message is the reason."""


def cleaned(text: str) -> str:
    """Return a sentence without what formats it: list marks, quotes, emphasis, line ends.

    Raises:
        Unusable: control characters or direction changes, which no sentence needs.
    """
    try:
        text = clean_text(re.sub(r"[\t\r\n]", " ", text), "sentence")
    except DataError as error:
        raise Unusable("control characters") from error
    text = _EMPHASIS.sub(r"\2", _LIST_MARK.sub("", text, count=1))
    quoted = _QUOTED.fullmatch(text)
    return (next((part for part in quoted.groups() if part), "") if quoted else text).strip()


def words(text: str) -> Words:
    """Return the words in lower case, hyphens split, without the s of plurals and possessives."""
    found = _WORD.findall(name_key(text).replace("-", " "))
    return tuple(singular(word.removesuffix("'s")) for word in found)


def content(said: Words, name: Words) -> Words:
    """Return the words that tell something, in order, without the class name."""
    return tuple(word for word in without(said, name) if word not in EMPTY)


def without(said: Words, name: Words) -> Words:
    """Return the words without the places where the name stands."""
    kept: list[str] = []
    place = 0
    while place < len(said):
        if name and said[place : place + len(name)] == name:
            place += len(name)
        else:
            kept.append(said[place])
            place += 1
    return tuple(kept)


@lru_cache(maxsize=1024)  # sentences come by class
def name_words(name: str) -> Words:
    """Return the words of a class name without what brackets add to tell it from others."""
    return words(_IN_BRACKETS.sub(" ", name)) or words(name)


class Named(NamedTuple):
    """The class names in a sentence."""

    own: bool
    others: tuple[str, ...]


class NameFinder:
    """Finds class names in sentences, whatever the number of classes."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names: dict[Words, list[str]] = {}
        for name in names:
            self._names.setdefault(name_words(name), []).append(name)
        self._lengths = sorted({len(key) for key in self._names}, reverse=True)

    def find(self, said: Words, own: str) -> Named:
        """Return which names stand in a sentence; of names inside each other the longest counts.

        Not counted as others are names that are part of the own one ("woodpecker" of "hairy
        woodpecker") and names that are colours ("orange").
        """
        key = name_words(own)
        others = [
            name
            for found in self._scan(said)
            if not set(found) <= set(key) and not (len(found) == 1 and found[0] in COLOURS)
            for name in self._names[found]
            if name != own
        ]
        return Named(_holds(said, key), tuple(dict.fromkeys(others)))

    def _scan(self, said: Words) -> list[Words]:
        found: list[Words] = []
        place = 0
        while place < len(said):
            spans = (said[place : place + length] for length in self._lengths)
            name = next((span for span in spans if span in self._names), None)
            found += [name] if name else []
            place += len(name) if name else 1
        return found


def _holds(said: Words, name: Words) -> bool:
    return any(said[place : place + len(name)] == name for place in range(len(said)))
