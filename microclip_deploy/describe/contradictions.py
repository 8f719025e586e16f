"""Sentences of one class that give the same part different colours.

Only plain statements count ("a red breast", "the breast is red"). Those that speak of males, of
seasons or of what may be are left alone, and so are markings ("white wing bars").
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from microclip_deploy.describe.vocabulary import (
    COLOUR_FAMILIES,
    CONDITIONS,
    MARKINGS,
    PARTS,
    QUALIFIERS,
    SHADES,
)
from microclip_deploy.describe.wording import Words

Claims = Mapping[str, frozenset[str]]
"""Part -> colours that one sentence gives it."""

_IS = frozenset({"is", "are"})


def claims(said: Words) -> Claims:
    """Return what a sentence says about the colours of parts."""
    if CONDITIONS & set(said):
        return {}
    found: dict[str, frozenset[str]] = {}
    for place, word in enumerate(said):
        after = said[place + 1] if place + 1 < len(said) else ""
        before = said[place - 1] if place else ""
        if word not in PARTS or before in QUALIFIERS | PARTS or after in MARKINGS | PARTS:
            continue
        colours = _colours(said[:place][::-1])  # nearest first
        if after in _IS:
            colours |= _colours(said[place + 2 :])
        if colours:
            found[word] = found.get(word, frozenset()) | colours
    return found


def contradicting(said: Sequence[Claims]) -> list[str]:
    """Return for each sentence of a class "part colour" where it stands against the others, or ''.

    The colour that most sentences give a part holds; of equally frequent ones the one said first.
    """
    told = [""] * len(said)
    for part in dict.fromkeys(part for claim in said for part in claim):
        counts = Counter(colour for claim in said for colour in sorted(claim.get(part, ())))
        first = max(counts, key=lambda colour: counts[colour])
        allowed = frozenset[str]().union(
            *(claim[part] for claim in said if first in claim.get(part, ()))
        )
        for row, claim in enumerate(said):
            colours = claim.get(part, frozenset())
            if colours and not colours & allowed and not told[row]:
                told[row] = f"{part} {' and '.join(sorted(colours))}"
    return told


def _colours(said: Sequence[str]) -> frozenset[str]:
    """Return the colours that words begin with, joined by "and" and shades."""
    found: set[str] = set()
    for word in said:
        if word in COLOUR_FAMILIES:
            found.add(COLOUR_FAMILIES[word])
        elif word not in SHADES and word != "and":
            break
    return frozenset(found)
