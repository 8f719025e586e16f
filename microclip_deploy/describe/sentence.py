"""A sentence about a class, with its origin, and what was decided about it."""

from collections.abc import Mapping
from typing import NamedTuple


class Sentence(NamedTuple):
    """One sentence about one class."""

    class_name: str
    text: str
    provenance: Mapping[str, str | int | float]
    """Every other key of its line in the file: model, question, prompt_sha256 and so on."""


class Verdict(NamedTuple):
    """What was decided about a sentence."""

    sentence: Sentence
    reason: str
    """Why it was dropped; '' for one that is kept."""
