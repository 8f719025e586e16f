"""Checks of sentences that need no label and no model.

Cleaned is what only formats a sentence: list marks, quotes, emphasis, line ends. A sentence that
does not name its class gets the name in front, as the method's sentences hold it. Dropped is what
would hurt or tell nothing; docs/descriptions.md lists every reason. The words are English, so
sentences in other languages are checked for form, names and repetition only.
"""

import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from microclip_deploy.describe.contradictions import claims, contradicting
from microclip_deploy.describe.sentence import Sentence, Verdict
from microclip_deploy.describe.vocabulary import NOT_VISIBLE, VISIBLE
from microclip_deploy.describe.wording import (
    NameFinder,
    Unusable,
    Words,
    cleaned,
    content,
    name_words,
    words,
)

TokenCounter = Callable[[str], int | None]
"""How many tokens a text has that a model does not read to its end; None for all others."""

LONGEST = 600
"""Characters of a sentence; no text tower here reads so many."""

NEARLY_SAME = 0.85
"""Share of words in the same order from which on two sentences of a class are one."""

_MARKUP = re.compile(
    r"<[a-z!/?]|&(?:#\d+|#x[0-9a-f]+|[a-z]+);|https?:|www\.|\]\(|```|[{}|]|^#+\s|^[=+@]",
    re.IGNORECASE,
)
_NO_DESCRIPTION = re.compile(
    r"\b(?:ignore|disregard|forget)\b.{0,40}\b(?:instruction|prompt|above|previous)"
    r"|\bas an? (?:ai|language)\b|\b(?:language model|system prompt|api key|json)\b"
    r"|\b(?:as requested|as follows|let me know|feel free|hope this helps)\b"
    r"|\byou (?:are now|must)\b"
    r"|^(?:sure|certainly|of course|okay|here (?:are|is)|sorry|i'm sorry|i am sorry|i can"
    r"|i cannot|please)\b"
    r"|^(?:assistant|user|system|note)\s*:|:$",
    re.IGNORECASE,
)


def check(
    sentences: Sequence[Sentence], names: Sequence[str], tokens: TokenCounter | None
) -> list[Verdict]:
    """Judge sentences by their wording.

    Args:
        sentences: in any order; of repeated ones the first of a class is kept.
        names: all class names.
        tokens: as `TextEncoder.uncut_length`; None where no model is given.

    Returns:
        A verdict for each sentence, in the same order. Sentences are cleaned and name their class.
    """
    finder = NameFinder(names)
    verdicts = [_by_itself(sentence, finder, tokens) for sentence in sentences]
    for look in (_repeated, _shared, _contradicting):
        verdicts = look(verdicts)
    return verdicts


def kind(reason: str) -> str:
    """Return the kind of a reason, without its detail."""
    return reason.partition(":")[0]


def _by_itself(sentence: Sentence, finder: NameFinder, tokens: TokenCounter | None) -> Verdict:
    """Clean and judge a sentence without looking at the others."""
    if len(sentence.text) > LONGEST:
        return Verdict(sentence, f"too long: {len(sentence.text)} characters")
    try:
        text = cleaned(sentence.text)
    except Unusable as error:
        return Verdict(sentence, str(error))
    said = words(text)
    named = finder.find(said, sentence.class_name)
    reason = _wording_problem(text, said, name_words(sentence.class_name))
    if named.others and not reason:
        reason = f"another class named: {named.others[0]}"
    if not reason and tokens is not None and (count := tokens(text)) is not None:
        reason = f"too long: {count} tokens"
    if not reason and not named.own:
        text = _naming(sentence.class_name, text, tokens)
    return Verdict(sentence._replace(text=text), reason)


def _naming(name: str, text: str, tokens: TokenCounter | None) -> str:
    """Return the text with the class name in front, as long as the model reads it to its end."""
    longer = f"{name}: {text}"
    return longer if tokens is None or tokens(longer) is None else text


def _wording_problem(text: str, said: Words, name: Words) -> str:
    """Return why a text is no description of what can be seen; '' if it is one."""
    if _MARKUP.search(text):
        return "markup"
    if _NO_DESCRIPTION.search(text):
        return "no description"
    told = content(said, name)
    if not any(letter.isalpha() for word in told for letter in word):
        return "nothing but the name"
    hidden = next((word for word in told if word in NOT_VISIBLE), None)
    if hidden is not None and not VISIBLE & set(told):
        return f"not visible: {NOT_VISIBLE[hidden]}"
    return ""


def _kept_by_class(verdicts: Sequence[Verdict]) -> dict[str, list[int]]:
    """Return the positions of the kept sentences of each class."""
    rows: dict[str, list[int]] = {}
    for row, verdict in enumerate(verdicts):
        if not verdict.reason:
            rows.setdefault(verdict.sentence.class_name, []).append(row)
    return rows


def _content_of(verdict: Verdict) -> Words:
    sentence = verdict.sentence
    return content(words(sentence.text), name_words(sentence.class_name))


def _repeated(verdicts: list[Verdict]) -> list[Verdict]:
    """Drop what an earlier sentence of the class says already."""
    judged = list(verdicts)
    for rows in _kept_by_class(verdicts).values():
        earlier: list[Words] = []
        for row in rows:
            told = _content_of(verdicts[row])
            if any(_nearly_same(told, other) for other in earlier):
                judged[row] = verdicts[row]._replace(reason="repeated")
            else:
                earlier.append(told)
    return judged


def _nearly_same(one: Words, other: Words) -> bool:
    known = set(other)
    common = sum(word in known for word in one)  # a bound from above, at which most pairs end
    if 2 * common < NEARLY_SAME * (len(one) + len(other)):
        return False
    return SequenceMatcher(None, one, other, autojunk=False).ratio() >= NEARLY_SAME


def _shared(verdicts: list[Verdict]) -> list[Verdict]:
    """Drop what is said in the same words of another class: it tells neither from the other."""
    said_of: dict[Words, dict[str, None]] = {}
    for verdict in verdicts:
        if not verdict.reason:
            told = said_of.setdefault(_content_of(verdict), {})
            told[verdict.sentence.class_name] = None
    judged = []
    for verdict in verdicts:
        own = verdict.sentence.class_name
        classes = () if verdict.reason else said_of[_content_of(verdict)]
        other = next((name for name in classes if name != own), None)
        reason = verdict.reason if other is None else f"said of another class too: {other}"
        judged.append(verdict._replace(reason=reason))
    return judged


def _contradicting(verdicts: list[Verdict]) -> list[Verdict]:
    """Drop what stands against the other sentences of its class."""
    judged = list(verdicts)
    for rows in _kept_by_class(verdicts).values():
        told = contradicting([claims(words(verdicts[row].sentence.text)) for row in rows])
        for row, against in zip(rows, told, strict=True):
            if against:
                judged[row] = verdicts[row]._replace(reason=f"against the others: {against}")
    return judged
