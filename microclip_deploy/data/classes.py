"""Class names and their descriptions, read and checked before anything is computed from them.

    names          a text file with one class per line
    descriptions   JSON {class: [sentence, ...]} or JSON Lines {"class", "text", provenance ...}
    templates      sentences with {} for the name, used when there are no descriptions

Text is NFC-normalised and stripped, so that the same name typed on two systems is one class.
Control characters and bidirectional overrides are refused: these strings reach terminals, reports
and model cards.
"""

import difflib
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from microclip_deploy.errors import DataError, UsageError

DEFAULT_TEMPLATES = ("a photo of a {}.",)
"""Sentences that stand in for missing descriptions; {} is the class name."""

# Characters that reorder the text around them; the other format characters are part of scripts.
_BIDI_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

# How many names or provenance values a message or summary lists.
_SHOWN = 5


@dataclass(frozen=True)
class Descriptions:
    """Sentences per class and where they came from."""

    texts: tuple[tuple[str, ...], ...]
    """(C, at least 1), in the order of the class names."""
    provenance: dict[str, str] = field(default_factory=dict)
    """File name, sha256, number of sentences; a summary of each other key of a JSON Lines file."""


@dataclass(frozen=True)
class ClassTexts:
    """Everything the text heads are computed from."""

    names: tuple[str, ...]
    """(C >= 2,), unique under casefold."""
    descriptions: tuple[tuple[str, ...], ...]
    """(C, at least 1); the filled templates when no descriptions were given."""
    templates: tuple[str, ...]
    """Sentences with {} for the name."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Where names and descriptions came from; keys start with `classes.` or `descriptions.`."""


def read_classes(path: Path | str) -> tuple[str, ...]:
    """Return the class names of a text file, one per non-empty line, in order.

    Raises:
        DataError: the file cannot be read, holds fewer than two classes, two names that differ at
            most in case, or a control character.
    """
    path = Path(path)
    return _names_of(path, _read_file(path).text)


def read_descriptions(path: Path | str, names: Sequence[str]) -> Descriptions:
    """Return the sentences for each class.

    Args:
        path: JSON object {class: sentence or list of sentences}, or, under the ending .jsonl, one
            object per line with the strings `class` and `text`; its other keys are provenance.
        names: class names; keys are matched without regard to case.

    Raises:
        DataError: the file cannot be read or parsed, or a class is unknown or has no sentence.
    """
    path = Path(path)
    content = _read_file(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        by_class, provenance = _parse_lines(path, content.text)
    else:
        by_class, provenance = _parse_object(path, content.text), {}
    texts = _in_order_of(names, by_class, path)
    provenance = {
        "file": path.name,
        "sha256": content.sha256,
        "sentences": str(sum(map(len, texts))),
        **provenance,
    }
    return Descriptions(texts, provenance)


def class_texts(
    classes_path: Path | str,
    descriptions_path: Path | str | None = None,
    templates: Iterable[str] = DEFAULT_TEMPLATES,
) -> ClassTexts:
    """Return names, descriptions and templates, ready for the text encoder.

    Args:
        classes_path: as for `read_classes`.
        descriptions_path: as for `read_descriptions`; None fills the templates with the names.
        templates: sentences that each contain {} for the class name.

    Raises:
        DataError: a file cannot be used.
        UsageError: a template without {}.
    """
    classes_path = Path(classes_path)
    templates = _checked_templates(templates)
    content = _read_file(classes_path)
    names = _names_of(classes_path, content.text)
    provenance = {
        "classes.file": classes_path.name,
        "classes.sha256": content.sha256,
    }
    if descriptions_path is None:
        filled = tuple(tuple(t.replace("{}", name) for t in templates) for name in names)
        provenance["descriptions.file"] = "none: templates filled with the class names"
        return ClassTexts(names, filled, templates, provenance)
    read = read_descriptions(descriptions_path, names)
    provenance |= {f"descriptions.{key}": value for key, value in read.provenance.items()}
    return ClassTexts(names, read.texts, templates, provenance)


class _File(NamedTuple):
    """The decoded text of a file and the sha256 of the bytes it was decoded from."""

    text: str
    sha256: str


def _read_file(path: Path) -> _File:
    """Read a UTF-8 file, with or without a byte order mark."""
    try:
        content = path.read_bytes()
        return _File(content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest())
    except OSError as error:
        found = (error.strerror or "an error").lower()
        remedy = "check the path"
    except UnicodeDecodeError as error:
        found = f"a byte at {error.start} that is none"
        remedy = "save the file as UTF-8"
    raise DataError(f"{path.name}: expected a readable UTF-8 file, found {found}; {remedy}")


def clean_name(text: str, place: str) -> str:
    """Return the text stripped and NFC-normalised; refuse what could garble a terminal."""
    text = unicodedata.normalize("NFC", text).strip()
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or (
            character in _BIDI_OVERRIDES
        ):
            raise DataError(
                f"{place}: expected printable text, found the control character "
                f"U+{ord(character):04X}; remove it"
            )
    return text


def _names_of(path: Path, text: str) -> tuple[str, ...]:
    """Return the checked class names in the text of a class file."""
    names: list[str] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        name = clean_name(line, f"{path.name}, line {number}")
        if not name:
            continue
        first = line_of.setdefault(name.casefold(), number)
        if first != number:
            raise DataError(
                f"{path.name}: expected every class once, found '{name}' in lines {first} and "
                f"{number}; remove or rename one"
            )
        names.append(name)
    if len(names) < 2:
        raise DataError(
            f"{path.name}: expected at least 2 classes, one per line, found {len(names)}; add names"
        )
    return tuple(names)


def _checked_templates(templates: Iterable[str]) -> tuple[str, ...]:
    """Return the templates; each must have a place for the name."""
    templates = tuple(clean_name(template, "template") for template in templates)
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise UsageError(
            f"templates: expected at least one, each with {{}} for the class name, "
            f"found {wrong[0]!r}; write for example 'a photo of a {{}}.'"
            if wrong
            else "templates: expected at least one, found none; give one with {} for the class name"
        )
    return templates


def _object_without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object; a repeated key would silently lose all but its last value."""
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key '{key}' twice")
        result[key] = value
    return result


def _parse_json(text: str, place: str) -> dict[str, object]:
    """Return the JSON object in the text."""
    try:
        value: object = json.loads(text, object_pairs_hook=_object_without_repeats)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: expected JSON, found: {error}; correct the file") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: expected a JSON object, found {type(value).__name__}; correct the file"
        )
    return value


def _parse_object(path: Path, text: str) -> dict[str, list[str]]:
    """Return the sentences per class key of a JSON file."""
    result: dict[str, list[str]] = {}
    for key, value in _parse_json(text, path.name).items():
        name = clean_name(key, f"{path.name}, a class name")
        if name in result:
            raise DataError(f"{path.name}: expected every class once, found '{name}' twice; merge")
        sentences = value if isinstance(value, list) else [value]
        result[name] = [_sentence(item, f"{path.name}, class '{name}'") for item in sentences]
    return result


def _parse_lines(path: Path, text: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the sentences per class key of a JSON Lines file and a summary of the other keys."""
    result: dict[str, list[str]] = {}
    # A dict keeps the order of first appearance, so the summary is the same on every run.
    values: dict[str, dict[str, None]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        record = _parse_json(line, place)
        name = record.pop("class", None)
        if not isinstance(name, str) or "text" not in record:
            raise DataError(
                f"{place}: expected the strings 'class' and 'text', "
                f"found the keys {sorted(record)}; add them"
            )
        sentences = result.setdefault(clean_name(name, place), [])
        sentences.append(_sentence(record.pop("text"), place))
        for key, value in record.items():
            values.setdefault(key, {})[json.dumps(value, sort_keys=True)] = None
    return result, {json.dumps(key)[1:-1]: _summary(list(seen)) for key, seen in values.items()}


def _summary(values: list[str]) -> str:
    """Return the distinct JSON values of one provenance key, the first few if there are many."""
    shown = ", ".join(value[:200] for value in values[:_SHOWN])
    return shown if len(values) <= _SHOWN else f"{shown}, ... ({len(values)} distinct values)"


def _sentence(value: object, place: str) -> str:
    """Return a checked sentence."""
    sentence = clean_name(value, place) if isinstance(value, str) else ""
    if not sentence:
        raise DataError(
            f"{place}: expected a non-empty sentence, found {json.dumps(value)[:80]}; "
            f"write one or remove the entry"
        )
    return sentence


def _in_order_of(
    names: Sequence[str], by_class: dict[str, list[str]], path: Path
) -> tuple[tuple[str, ...], ...]:
    """Return the sentences in the order of the names; refuse unknown and missing classes."""
    known = {name.casefold(): name for name in names}
    found: dict[str, list[str]] = {}
    for key, sentences in by_class.items():
        name = known.get(key.casefold())
        if name is None:
            close = difflib.get_close_matches(key.casefold(), known, n=1)
            hint = f"did you mean '{known[close[0]]}'?" if close else "add it or remove its entry"
            raise DataError(
                f"{path.name}: expected classes of the class list, found '{key}'; {hint}"
            )
        if name in found:
            raise DataError(
                f"{path.name}: expected one spelling of class '{name}', found two; keep one"
            )
        found[name] = sentences
    missing = [name for name in names if not found.get(name)]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(
            f"{path.name}: expected a sentence for every class, found none for "
            f"{', '.join(missing[:_SHOWN])}{more}; add them, or omit the descriptions "
            f"to use templates"
        )
    return tuple(tuple(found[name]) for name in names)
