"""Class names that a language model or CLIP may take for something else."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from microclip_deploy.describe.vocabulary import AMBIGUOUS
from microclip_deploy.describe.wording import words

_BINOMIAL = re.compile(
    r"[A-Z][a-z]+(?:us|a|um|is|es|ops|er|ix|ax|ex|on|ys|as|os|yx) "
    r"[a-z-]+(?:us|a|um|is|i|ae|are|ale|ense|o|or|ur|er|ns|x|os)(?: [a-z-]+)?"
)


class Remark(NamedTuple):
    """What a user should change about a name."""

    name: str
    text: str


def name_remarks(names: Sequence[str], domain: str | None) -> list[Remark]:
    """Return remarks on ambiguous and on Latin names, in the order of the names.

    Args:
        names: class names.
        domain: what they are, such as "bird species"; None if nobody said. It settles what a name
            of several meanings stands for.

    Source: of the plain names CLIP recognises two to five times as many species by the common one
    (arXiv 2310.09929).
    """
    found = []
    for name in names:
        said = words(name)
        if not domain and len(said) == 1 and said[0] in AMBIGUOUS:
            text = f"has several meanings; give --domain, or write it as '{name} (what it is)'"
            found.append(Remark(name, text))
        elif _BINOMIAL.fullmatch(name):
            text = "looks like a Latin name; CLIP knows common names better, so give that one"
            found.append(Remark(name, text))
    return found
