"""Class names and descriptions are checked completely before anything is computed from them."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from microclip_deploy.data.classes import class_texts, read_classes, read_descriptions
from microclip_deploy.errors import DataError, UsageError

NAMES = ("cat", "dog")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_names_are_stripped_composed_and_kept_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "c.txt", "\ufeff  zebra \r\n\n cafe\u0301\r#1 dog\n日本犬")
    assert read_classes(path) == ("zebra", "caf\u00e9", "#1 dog", "日本犬")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("house  sparrow\ncat\u00a0bird", ("house sparrow", "cat bird")),
        ("\u200bcat\ufeff\nd\u00ado\u200eg", ("cat", "dog")),
        ("ca\u200ct\ndog\u200d", ("cat", "dog")),
        ('"cat",\n"loon, arctic",\n', ("cat", "loon, arctic")),
        ("loon, arctic\nloon, common", ("loon, arctic", "loon, common")),
        ("'cat';\n\u201cdog\u201d", ("cat", "dog")),
        ("cat\ndog\n".encode("utf-16"), ("cat", "dog")),
        ('["0,cat", "# dog",\n "1 star", "2 stars"]', ("0,cat", "# dog", "1 star", "2 stars")),
        ("737 MAX\n747\nA320", ("737 MAX", "747", "A320")),
        ("737-800\n747-400", ("737-800", "747-400")),
        ("2012 Tesla Model S\n2011 Audi A6", ("2012 Tesla Model S", "2011 Audi A6")),
        ("1.5 mm\n2.5 mm", ("1.5 mm", "2.5 mm")),
        ("type 1\ntype 2", ("type 1", "type 2")),
        ("волк\nсова", ("волк", "сова")),
        ("μTorrent\nβ-carotene", ("μTorrent", "β-carotene")),
    ],
    ids=range(15),
)
def test_names_are_read_as_they_are_meant(
    tmp_path: Path, content: str | bytes, names: tuple[str, ...]
) -> None:
    assert read_classes(write(tmp_path / "c.txt", content)) == names


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("c.txt", "0,cat\n1,dog", "numbers beside the names, such as '0,cat'"),
        ("c.txt", "7: cat\n3: dog", "numbers beside the names"),
        ("c.txt", "0\tcat\n1\tdog", "numbers beside the names"),
        ("c.txt", "0 cat\n1 dog", "numbers beside the names"),
        ("c.txt", "1. cat\n2. dog", "numbers beside the names"),
        ("c.txt", "1) cat\n2) dog", "numbers beside the names"),
        ("c.txt", "1 - cat\n2 - dog", "numbers beside the names"),
        ("c.txt", "001.Black_footed_Albatross\n045.Fulmar", "numbers beside the names"),
        ("c.txt", "1 001.Black_footed_Albatross\n2 002.Laysan", "numbers beside the names"),
        ("c.csv", "cat,0\ndog,1", "numbers beside the names"),
        ("c.txt", "cat 0\ndog 1", "numbers beside the names"),
        ("c.txt", "cat=1\ndog=4", "numbers beside the names"),
        ("c.txt", "0 -> cat\n9 -> dog", "numbers beside the names"),
        ("c.txt", "n01440764 tench\nn01443537 goldfish", "WordNet's numbers beside the names"),
        ("c.txt", 'item {\n  name: "cat"\n}', "the opening 'item {'"),
        ("c.py", 'classes = [\n  "cat",\n  "dog",\n]', "the opening 'classes = ['"),
        ("c.csv", "id,name\n0,cat\n1,dog", "the heading 'id,name'"),
        ("c.csv", '"Class";"note"\ncat;a\ndog;b', "the heading"),
        ("c.csv", "Name\ncat\ndog", "the heading 'Name'"),
        ("c.csv", "path,label\na.png,cat\nb.png,dog", "the heading"),
        ("c.tsv", "cat\tfelis\ndog\tcanis", "columns between tabs"),
        ("c.txt", "names:\n  0: cat\n  1: dog", "YAML"),
        ("c.txt", "path: photos\nnc: 2\nnames: [cat, dog]", "YAML"),
        ("c.yaml", "- cat\n- dog", "YAML"),
        ("c.txt", "- cat\n- dog", "a list with bullets"),
        ("c.txt", "# birds\ncat\ndog", "the comment '# birds'"),
        ("c.txt", "cat  # felis\ndog", "the comment 'cat  # felis'"),
        ("c.json", '{"cat": ["it purrs"]}', "a JSON object (sentences go to --descriptions)"),
    ],
    ids=range(28),
)
def test_files_that_are_no_list_of_names_are_refused(
    tmp_path: Path, name: str, content: str, found: str
) -> None:
    with pytest.raises(DataError, match=re.escape(f"found {found}")):
        read_classes(write(tmp_path / name, content))


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
        ("Cat\ndog\n\ncAT\n", "found 'Cat' and 'cAT' in line 1 and line 4"),
        ("Straße\nSTRASSE", "in line 1 and line 2"),
        ("caf\u00e9\ncafe\u0301", "found 'café' in line 1 and line 2"),
        ("house  sparrow\nhouse sparrow", "found 'house sparrow' in"),
        ("finch\n\ufb01nch", "expected every class once"),
        ("Bewick's wren\nBewick\u2019s wren", "expected every class once"),
        ("cat\nd\u043eg", r"line 2: .* 'd\u043eg' with U\+043E .* looks like 'o'"),
        ("cat, dog, bird", "separated by line ends and not by commas"),
        ("['cat', 'dog']", r'expected JSON.*write \["one class", "another"\]'),
        ('["cat", 3]', "a JSON list of names, found other values"),
        ('["cat", "Cat"]', "in entry 1 and entry 2"),
        ("cat\ndog\n".encode("utf-16-le"), "zero bytes; give a text file saved as UTF-8"),
        ("cat\nd\x1b[31mog\n", r"line 2: .* control character U\+001B"),
        ("cat\nd\u202eog\n", r"U\+202E"),
        ("cat\nd\tog\n", r"U\+0009"),
        ("cat\nd\u2028og\n", r"U\+2028"),
        (b"cat\ncaf\xe9\n", "a byte at 7 that is no UTF-8; give a text file saved as UTF-8"),
    ],
    ids=range(19),
)
def test_unusable_class_files_are_refused(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_classes(write(tmp_path / "c.txt", content))


def test_missing_class_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or directory; check the path"):
        read_classes(tmp_path / "none.txt")
    with pytest.raises(DataError, match="found a folder; give a file"):
        read_classes(tmp_path)


def test_json_descriptions_are_ordered_by_the_class_list(tmp_path: Path) -> None:
    content = json.dumps({"Dog": " it  barks ", "cat": ["it purrs", "cafe\u0301 animal"]})
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
        ("d.json", '{"a": "x", "b": "y", "cat": "z"}', "found 'a' and 1 more of its 3;"),
        ("d.json", "[1]", r"expected a JSON object, found list; write \{class"),
        ("d.json", '{"class": "cat"}\n{}', r"end the file's name with \.jsonl"),
        ("d.json", '{"cat": ', "expected JSON, found"),
        ("d.json", "[" * 100_000, "expected JSON, found"),
        ("d.jsonl", '{"class": "cat", "text": "a"}\n{"class": "dog"}', "line 2: expected the str"),
        ("d.jsonl", '{"class": 3, "text": "a"}', "line 1: expected the strings"),
        ("d.jsonl", '{"class": "cat", "text": 7}', "line 1: expected a non-empty sentence"),
        ("d.jsonl", "nonsense", "line 1: expected JSON"),
    ],
    ids=range(21),
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
