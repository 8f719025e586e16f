"""What a model answers: asked for by a schema, parsed with patience, and cleaned.

Nothing in a reply is trusted. JSON is looked for inside whatever else the model wrote, sentences
are counted, control characters and what is too long are refused; what the checks do beyond that is
theirs.
"""

import json
from functools import cache
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from microclip_deploy.data.names import clean_text
from microclip_deploy.errors import DataError

LONGEST = 300
"""Characters of a sentence; about three times what CLIP's tokenizer takes."""


class _Answer(BaseModel):
    """The JSON that is asked for; other keys beside it are ignored."""

    sentences: list[str]


_ANSWER: TypeAdapter[_Answer | list[str]] = TypeAdapter(_Answer | list[str])


class Parsed(NamedTuple):
    """The sentences of a reply."""

    sentences: list[str]
    """At most as many as were asked for, cleaned."""
    problems: list[str]
    """What was wrong, in our words."""


@cache
def schema(count: int) -> dict[str, Any]:
    """Return the JSON schema of a reply with exactly `count` sentences."""
    exactly = Annotated[list[str], Field(min_length=count, max_length=count)]
    strict = ConfigDict(extra="forbid", title="Sentences")
    return create_model("Sentences", __config__=strict, sentences=exactly).model_json_schema()


def parse(text: str, count: int) -> Parsed:
    """Return the sentences in a reply.

    Args:
        text: the reply.
        count: sentences that were asked for; what comes after them is left out and said.
    """
    answer = _answer(text)
    if answer is None:
        return Parsed([], ["it holds no JSON object with a list of strings under 'sentences'"])
    problems: list[str] = []
    cleaned = [sentence for item in answer if (sentence := _clean(item, problems))]
    if len(cleaned) != count:
        problems.append(f"expected {count} usable sentences, found {len(cleaned)}")
    return Parsed(cleaned[:count], list(dict.fromkeys(problems)))


def _answer(text: str) -> list[str] | None:
    """Return the sentences of the outermost JSON in the text; None if there are none."""
    text = text.rpartition("</think>")[2]  # what a model says to itself may hold braces, too
    for first, last in ("{}", "[]"):
        found = text[text.find(first) : text.rfind(last) + 1]
        try:
            answer = _ANSWER.validate_python(json.loads(found))
        except (ValidationError, ValueError, RecursionError):
            continue
        return answer.sentences if isinstance(answer, _Answer) else answer
    return None


def _clean(text: str, problems: list[str]) -> str:
    """Return one sentence on one line; '' for what cannot be one, with the reason."""
    text = " ".join(text.split())
    if len(text) > LONGEST:
        problems.append(f"a sentence is longer than {LONGEST} characters")
        return ""
    try:
        return clean_text(text, "a sentence")
    except DataError:
        problems.append("a sentence holds control characters")
        return ""
