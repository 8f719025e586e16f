"""Class names as people type them: the one definition of cleaning, comparing and finding them.

    clean_text   sentences and templates: what is shown and what the text tower reads
    clean_name   the same for names, which must be made of the letters they seem to be made of
    name_key     equal for two names that a reader cannot tell apart
    NameIndex    label, JSON key or argument -> the class that is meant

Class files, descriptions, `classes add` and the labels of `evaluate` all go through here.
"""

import difflib
import re
import unicodedata
from collections.abc import Callable, Sequence

from microclip_deploy.errors import DataError

# Characters that reorder the text around them; marks that only hint at a direction are dropped.
_BIDI_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

# Soft hyphens, zero-width spaces, direction marks and byte order marks: nobody sees them, and the
# tokenizer would. Joiners shape letters of several scripts and emoji, never ASCII.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u2060-\u2064\ufeff\ufff9-\ufffb]"
    "|(?:^|(?<=[ -~]))[\u200c\u200d]+|[\u200c\u200d]+(?=[!-~])"
)

# Cyrillic and Greek letters that are drawn like Latin ones.
_LOOKALIKES = dict(
    zip(
        "аеорсухіјѕһӏԛԝАВЕКМНОРСТУХІЈЅԚԜοΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
        "aeopcyxijshlqwABEKMHOPCTYXIJSQWoABEZHIKMNOPTYX",
        strict=True,
    )
)
_AS_LATIN = str.maketrans(_LOOKALIKES)
_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u02bc\u0060\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"),
    }
)
_WORD = re.compile(r"[^\W\d_]+")


def clean_text(text: str, place: str) -> str:
    """Return the text NFC-normalised, with single spaces and without invisible characters.

    Args:
        text: as it was typed.
        place: what an error names.

    Raises:
        DataError: a control character or a bidirectional override, which could garble a terminal.
    """
    text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text)).strip()
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or (
            character in _BIDI_OVERRIDES
        ):
            raise DataError(
                f"{place}: expected printable text, found the control character "
                f"U+{ord(character):04X}; remove it"
            )
    return " ".join(text.split())


def clean_name(text: str, place: str) -> str:
    """Return a class name as `clean_text` returns it.

    Raises:
        DataError: as `clean_text`, or a Latin word with a letter that only looks Latin.
    """
    name = clean_text(text, place)
    for word in _WORD.findall(name):
        foreign = next((letter for letter in word if letter in _LOOKALIKES), None)
        if foreign and any(unicodedata.name(letter, "").startswith("LATIN") for letter in word):
            raise DataError(
                f"{place}: expected words of one script, found '{word}' with U+{ord(foreign):04X} "
                f"{unicodedata.name(foreign)}, which looks like '{_LOOKALIKES[foreign]}'; type the "
                "word again"
            )
    return name


def name_key(name: str) -> str:
    """Return what is left of a cleaned name without case and without look-alike characters."""
    plain = unicodedata.normalize("NFKC", name.translate(_PUNCTUATION)).casefold()
    seen = (c for c in plain if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    return " ".join("".join(seen).translate(_AS_LATIN).split())


class NameIndex:
    """Class names, found by what somebody calls them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._rows = [_rows_by(wording, names) for wording in (str, name_key, _spaced)]

    def find(self, text: str) -> int | None:
        """Return the row of the name that is meant, or None.

        It is the only one with exactly this wording; otherwise the only one with this `name_key`;
        otherwise the only one with this key when underscores and hyphens count as spaces.
        """
        for rows, wording in zip(self._rows, (text, name_key(text), _spaced(text)), strict=True):
            if len(rows.get(wording, ())) == 1:
                return rows[wording][0]
        return None

    def near(self, text: str, count: int = 1, cutoff: float = 0.6) -> list[str]:
        """Return at most `count` names that are spelt like `text`, the nearest first."""
        spelt = {_spaced(name): name for name in self.names}
        close = difflib.get_close_matches(_spaced(text), spelt, n=count, cutoff=cutoff)
        return [spelt[key] for key in close]


def _rows_by(wording: Callable[[str], str], names: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(wording(name), []).append(row)
    return rows


def _spaced(name: str) -> str:
    return " ".join(name_key(name).replace("_", " ").replace("-", " ").split())
