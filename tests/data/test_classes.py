"""Class names and descriptions are checked completely before anything is computed from them."""

import hashlib
import json
from pathlib import Path

import pytest

from microclip_deploy.data.classes import class_texts, read_classes, read_descriptions
from microclip_deploy.errors import DataError, UsageError

NAMES = ("cat", "dog")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_names_are_stripped_composed_and_kept_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "c.txt", "\ufeff  zebra \r\n\n cafe\u0301\n# dog\n日本犬")
    assert read_classes(path) == ("zebra", "caf\u00e9", "# dog", "日本犬")


def test_joiners_that_scripts_need_are_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "c.txt", "می\u200cخواهم\nक्\u200dष\n")
    assert len(read_classes(path)) == 2


def test_ten_thousand_classes_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "c.txt", "\n".join(f"class {i}" for i in range(10_000)))
    texts = class_texts(path)
    assert len(texts.names) == len(texts.descriptions) == 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least 2 classes, one per line, found 0"),
        ("\n \nonly\n", "found 1; add names"),
        ("Cat\ndog\n\ncAT\n", "found 'cAT' in lines 1 and 4"),
        ("Straße\nSTRASSE", "in lines 1 and 2"),
        ("caf\u00e9\ncafe\u0301", "in lines 1 and 2"),
        ("cat\nd\x1b[31mog\n", r"line 2: .* control character U\+001B"),
        ("cat\nd\u202eog\n", r"U\+202E"),
        ("cat\nd\tog\n", r"U\+0009"),
        ("cat\nd\u2028og\n", r"U\+2028"),
        (b"cat\ncaf\xe9\n", "a byte at 7 that is none; save the file as UTF-8"),
    ],
    ids=range(10),
)
def test_unusable_class_files_are_refused(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_classes(write(tmp_path / "c.txt", content))


def test_missing_class_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or directory; check the path"):
        read_classes(tmp_path / "none.txt")
    with pytest.raises(DataError, match="is a directory"):
        read_classes(tmp_path)


def test_json_descriptions_are_ordered_by_the_class_list(tmp_path: Path) -> None:
    content = json.dumps({"Dog": " it barks ", "cat": ["it purrs", "cafe\u0301 animal"]})
    path = write(tmp_path / "d.json", content)
    read = read_descriptions(path, NAMES)
    assert read.texts == (("it purrs", "caf\u00e9 animal"), ("it barks",))
    assert read.provenance == {
        "file": "d.json",
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "sentences": "3",
    }


def test_json_lines_keep_a_summary_of_their_provenance(tmp_path: Path) -> None:
    records = [
        {"class": NAMES[i % 2], "text": f"text {i}", "model": "m1", "seed": i} for i in range(7)
    ]
    path = write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, records)) + "\n\n")
    read = read_descriptions(path, NAMES)
    assert read.texts[1] == ("text 1", "text 3", "text 5")
    assert read.provenance["model"] == '"m1"'
    assert read.provenance["seed"] == "0, 1, 2, 3, 4, ... (7 distinct values)"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", '{"cat": ["a"]}', "found none for dog; add them, or omit"),
        ("d.json", '{"cat": ["a"], "dog": []}', "found none for dog"),
        ("d.json", '{"cat": ["a"], "dog": [" "]}', "class 'dog': expected a non-empty sentence"),
        ("d.json", '{"cat": ["a"], "dog": ""}', "class 'dog': expected a non-empty sentence"),
        ("d.json", '{"cat": ["a"], "dog": [1]}', "class 'dog': expected a non-empty sentence"),
        ("d.json", '{"cat": ["a"], "dog": null}', "found null"),
        ("d.json", '{"cat": "a", "dgo": "b"}', "found 'dgo'; did you mean 'dog'"),
        ("d.json", '{"cat": "a", "xyzzy": "b"}', "found 'xyzzy'; add it or remove its entry"),
        ("d.json", '{"cat": "a", "cat": "b"}', "the key 'cat' twice"),
        ("d.json", '{"cat": "a", "cat ": "b"}', "found 'cat' twice"),
        ("d.json", '{"cat": "a", "CAT": "b"}', "one spelling of class 'cat'"),
        ("d.json", '{"cat": "a", "dog": "b\\u001b"}', r"class 'dog': .* U\+001B"),
        ("d.json", "[1]", "expected a JSON object, found list"),
        ("d.json", '{"cat": ', "expected JSON, found"),
        ("d.json", "[" * 100_000, "expected JSON, found"),
        ("d.jsonl", '{"class": "cat", "text": "a"}\n{"class": "dog"}', "line 2: expected the str"),
        ("d.jsonl", '{"class": 3, "text": "a"}', "line 1: expected the strings"),
        ("d.jsonl", '{"class": "cat", "text": 7}', "line 1: expected a non-empty sentence"),
        ("d.jsonl", "nonsense", "line 1: expected JSON"),
    ],
    ids=range(19),
)
def test_unusable_descriptions_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_descriptions(write(tmp_path / name, content), NAMES)


def test_many_missing_classes_are_summarised(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(20)]
    path = write(tmp_path / "d.json", '{"c0": "a"}')
    with pytest.raises(DataError, match="found none for c1, c2, c3, c4, c5 and 14 more"):
        read_descriptions(path, names)


def test_templates_stand_in_for_missing_descriptions(tmp_path: Path) -> None:
    path = write(tmp_path / "c.txt", "cat\n{0.__class__}\n")
    texts = class_texts(path, templates=("a {}.", "one {}, two {}."))
    assert texts.descriptions[0] == ("a cat.", "one cat, two cat.")
    assert texts.descriptions[1][0] == "a {0.__class__}."
    assert class_texts(path).templates == ("a photo of a {}.",)


def test_class_texts_record_both_files(tmp_path: Path) -> None:
    classes = write(tmp_path / "c.txt", "\ufeffcat\r\ndog")
    descriptions = write(
        tmp_path / "d.jsonl",
        '{"class":"cat","text":"a","model":"m"}\n{"class":"dog","text":"b","model":"m"}',
    )
    texts = class_texts(classes, descriptions)
    assert texts.descriptions == (("a",), ("b",))
    assert texts.provenance["classes.sha256"] == hashlib.sha256(classes.read_bytes()).hexdigest()
    assert texts.provenance["descriptions.file"] == "d.jsonl"
    assert texts.provenance["descriptions.model"] == '"m"'


@pytest.mark.parametrize("templates", [(), ("a photo",), ("a {}", "{0}")])
def test_templates_without_a_place_for_the_name_are_a_usage_error(
    tmp_path: Path, templates: tuple[str, ...]
) -> None:
    path = write(tmp_path / "c.txt", "cat\ndog")
    with pytest.raises(UsageError, match="templates: expected at least one"):
        class_texts(path, templates=templates)
