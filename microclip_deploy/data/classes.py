"""Class names and their descriptions, read and checked before anything is computed from them.

    names          a text file with one class per line, or a JSON list
    descriptions   JSON {class: [sentence, ...]} or JSON Lines {"class", "text", provenance ...}
    templates      sentences with {} for the name, used when there are no descriptions

Files that are no list of names (YAML, tables, numbered lists) are refused: their lines would pass
as names. Text is cleaned by names.py, so that the same name typed on two systems is one class.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from microclip_deploy.data.names import NameIndex, clean_name, clean_text, name_key
from microclip_deploy.data.text_file import read_text
from microclip_deploy.errors import DataError, UsageError, printable

DEFAULT_TEMPLATES = ("a photo of a {}.",)
"""Sentences that stand in for missing descriptions; {} is the class name."""

# How many names or provenance values a message or summary lists.
_SHOWN = 5

_LINE_END = re.compile(r"\r\n?|\n")
_COLUMN = re.compile(r"\s*[,;|\t]\s*")
_HEADINGS = frozenset(
    {"class", "class name", "class_name", "classes", "classname", "categories", "category"}
    | {"label", "labels", "name", "names"}
)
_TABLE_HEADINGS = _HEADINGS | {
    "class_id",
    "file",
    "filename",
    "id",
    "idx",
    "image",
    "index",
    "path",
}

# A number with a mark between it and the name, or with nothing but blanks.
_NUMBER_FIRST = re.compile(
    r"(?P<number>\d+)(?P<mark>\s*([,;:|\t)=]|[-=]>)|\.(?!\d)|\s)\s*(-\s+)?(?P<name>\S.*)"
)
_NUMBER_LAST = re.compile(r"(?P<name>.*\S)(?P<mark>\s*([,;:|\t=]|[-=]>)|\s)\s*(?P<number>\d+)")
_WORDNET = re.compile(r"n\d{8}\b.")
_WANTED_NAMES = "a text file with one class name a line"
_JSON_REMEDY = (
    "write {class: [sentences]}, or end the file's name with .jsonl where every line is an object"
)
_QUOTES = ('""', "''", "\u201c\u201d")


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
    """(C,), no two with the same `name_key`."""
    descriptions: tuple[tuple[str, ...], ...]
    """(C, at least 1); the filled templates when no descriptions were given."""
    templates: tuple[str, ...]
    """Sentences with {} for the name."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Where names and descriptions came from; keys start with `classes.` or `descriptions.`."""

    @property
    def described(self) -> bool:
        """Whether the descriptions are more than the filled templates."""
        return self.descriptions != _filled(self.templates, self.names)


def read_classes(path: Path | str) -> tuple[str, ...]:
    """Return the class names of a text file, one per non-empty line, or of a JSON list, in order.

    Raises:
        DataError: the file cannot be read, is no list of names, or holds fewer than two classes,
            two names that a reader cannot tell apart, or a name that `clean_name` refuses.
    """
    path = Path(path)
    return _names_of(path, read_text(path, _WANTED_NAMES).text)


def read_descriptions(path: Path | str, names: Sequence[str]) -> Descriptions:
    """Return the sentences for each class.

    Args:
        path: JSON object {class: sentence or list of sentences}, or, under the ending .jsonl, one
            object per line with the strings `class` and `text`; its other keys are provenance.
        names: class names; keys are matched as by `NameIndex`.

    Raises:
        DataError: the file cannot be read or parsed, or a class is unknown or has no sentence.
    """
    path = Path(path)
    content = read_text(path, "JSON with sentences for each class")
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
    content = read_text(classes_path, _WANTED_NAMES)
    names = _names_of(classes_path, content.text)
    provenance = {
        "classes.file": classes_path.name,
        "classes.sha256": content.sha256,
    }
    if descriptions_path is None:
        provenance["descriptions.file"] = "none: templates filled with the class names"
        return ClassTexts(names, _filled(templates, names), templates, provenance)
    read = read_descriptions(descriptions_path, names)
    provenance |= {f"descriptions.{key}": value for key, value in read.provenance.items()}
    return ClassTexts(names, read.texts, templates, provenance)


def _filled(templates: Sequence[str], names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the templates filled with each name."""
    return tuple(tuple(t.replace("{}", name) for t in templates) for name in names)


def _names_of(path: Path, text: str) -> tuple[str, ...]:
    """Return the checked class names in the text of a class file."""
    names: list[str] = []
    first_with: dict[str, tuple[str, str]] = {}
    for place, entry in _entries(path, text):
        name = clean_name(entry, f"{path.name}, {place}")
        if not name:
            continue
        first, alike = first_with.setdefault(name_key(name), (place, name))
        if first != place:
            spelt = f"'{name}'" if name == alike else f"'{alike}' and '{name}'"
            raise DataError(
                f"{path.name}: expected every class once, found {spelt} in {first} and {place}; "
                "remove or rename one"
            )
        names.append(name)
    if len(names) < 2:
        commas = ", separated by line ends and not by commas" if re.search("[,;]", text) else ""
        raise DataError(
            f"{path.name}: expected at least 2 classes, one per line, found {len(names)}; add "
            f"names{commas}"
        )
    return tuple(names)


def _entries(path: Path, text: str) -> list[tuple[str, str]]:
    """Return (place, name as it was written) of each class."""
    if text.lstrip().startswith("[") and text.rstrip().endswith("]"):
        names = _parse_json(text, path.name, 'write ["one class", "another"]')
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(
                f"{path.name}: expected a JSON list of names, found other values in it; remove them"
            )
        return [(f"entry {number}", name) for number, name in enumerate(names, start=1)]
    lines = [
        (f"line {number}", line.strip())
        for number, line in enumerate(_LINE_END.split(text), start=1)
        if line.strip()
    ]
    other = _other_format(path, [line for _, line in lines])
    if other:
        raise DataError(
            f"{path.name}: expected one class name a line and nothing else, found {other}; write "
            "the names alone, or give a JSON list of names, which are taken as they stand"
        )
    return [(place, _unquoted(line)) for place, line in lines]


def _other_format(path: Path, lines: Sequence[str]) -> str | None:
    """Say what the lines are when they are no names."""
    if not lines:
        return None
    heading = [cell.strip("\"'").casefold() for cell in _COLUMN.split(lines[0])]
    comment = next((line for line in lines if re.search(r"(^|\s)#(\s|$)", line)), None)
    yaml = path.suffix.lower() in (".yaml", ".yml") or re.fullmatch(r"---|names\s*:.*", lines[0])
    if lines[0].startswith("{"):
        return "a JSON object (sentences go to --descriptions)"
    opened = next((line for line in lines if line.endswith(("{", "[", "("))), None)
    if opened is not None:
        return f"the opening '{printable(opened)}', as in a program"
    if yaml or any(line.startswith("names:") for line in lines):
        return "YAML"
    if comment is not None:
        return f"the comment '{printable(comment)}'"
    if all(re.match(r"[-*\u2022]\s", line) for line in lines):
        return "a list with bullets"
    if heading[0] in _HEADINGS or (len(heading) > 1 and set(heading) & _TABLE_HEADINGS):
        return f"the heading '{printable(lines[0])}'"
    if all(_WORDNET.match(line) for line in lines):
        return f"WordNet's numbers beside the names, such as '{printable(lines[0])}'"
    if _numbered(lines, _NUMBER_FIRST) or _numbered(lines, _NUMBER_LAST):
        return f"numbers beside the names, such as '{printable(lines[0])}'"
    if all("\t" in line for line in lines):
        return "columns between tabs"
    return None


def _numbered(lines: Sequence[str], pattern: re.Pattern[str]) -> bool:
    """Say whether every line holds a number beside its name.

    Where only blanks are between them, as in "737 MAX", the numbers must also count from 0 or 1,
    and beside names that differ: "type 1" and "type 2" are two.
    """
    found = [pattern.match(line) for line in lines]
    matches = [match for match in found if match is not None]
    if len(matches) < max(2, len(lines)):
        return False
    numbers = [int(match["number"]) for match in matches]
    marked = all(match["mark"].strip() or "\t" in match["mark"] for match in matches)
    named = len({match["name"] for match in matches}) == len(matches)
    return marked or (
        named and numbers in (list(range(len(lines))), list(range(1, len(lines) + 1)))
    )


def _unquoted(line: str) -> str:
    """Return a line without what is left of a list that it was copied from: quotes and a comma."""
    name = line.rstrip(" ,;")
    quoted = len(name) > 1 and name[0] + name[-1] in _QUOTES
    return name[1:-1] if quoted else name


def _checked_templates(templates: Iterable[str]) -> tuple[str, ...]:
    """Return the templates; each must have a place for the name."""
    templates = tuple(clean_text(template, "template") for template in templates)
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


def _parse_json(text: str, place: str, remedy: str) -> object:
    """Return the JSON value in the text."""
    try:
        return json.loads(text, object_pairs_hook=_object_without_repeats)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: expected JSON, found: {error}; {remedy}") from error


def _json_object(text: str, place: str) -> dict[str, object]:
    """Return the JSON object in the text."""
    value = _parse_json(text, place, _JSON_REMEDY)
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: expected a JSON object, found {type(value).__name__}; {_JSON_REMEDY}"
        )
    return value


def _parse_object(path: Path, text: str) -> dict[str, list[str]]:
    """Return the sentences per class key of a JSON file."""
    result: dict[str, list[str]] = {}
    for key, value in _json_object(text, path.name).items():
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
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        record = _json_object(line, place)
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
    sentence = clean_text(value, place) if isinstance(value, str) else ""
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
    index = NameIndex(names)
    found: dict[str, list[str]] = {}
    unknown: list[str] = []
    for key, sentences in by_class.items():
        row = index.find(key)
        if row is None:
            unknown.append(key)
        elif names[row] in found:
            raise DataError(
                f"{path.name}: expected one spelling of class '{names[row]}', found two; keep one"
            )
        else:
            found[names[row]] = sentences
    if unknown:
        close = index.near(unknown[0])
        hint = f"did you mean '{close[0]}'?" if close else "add it or remove its entry"
        more = f" and {len(unknown) - 1} more of its {len(by_class)}" if len(unknown) > 1 else ""
        raise DataError(
            f"{path.name}: expected classes of the class list, found '{unknown[0]}'{more}; {hint}"
        )
    missing = [name for name in names if not found.get(name)]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(
            f"{path.name}: expected a sentence for every class, found none for "
            f"{', '.join(missing[:_SHOWN])}{more}; add them, or omit the descriptions "
            f"to use templates"
        )
    return tuple(tuple(found[name]) for name in names)
