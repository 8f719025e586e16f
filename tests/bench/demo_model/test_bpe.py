"""The tokenizer merges of the benchmark."""

import gzip
from pathlib import Path

from open_clip.tokenizer import SimpleTokenizer

from microclip_deploy.bench.demo_model.bpe import merges_bytes, train_merges

TEXTS = ["the letter e carries an acute", "the letter o carries a ring"] * 5


def test_merges_file_bytes_are_repeatable() -> None:
    assert merges_bytes(train_merges(TEXTS, 40)) == merges_bytes(train_merges(TEXTS, 40))


def test_merges_file_has_a_header_and_no_empty_line() -> None:
    lines = gzip.decompress(merges_bytes([("a", "b")])).decode().split("\n")

    assert lines == ["#version: 0.2", "a b"]


def test_training_stops_at_rare_pairs() -> None:
    assert train_merges(["ab ab cd"], 10) == []
    assert train_merges(["ab ab ab cd"], 10) == [("a", "b</w>")]


def test_frequent_words_become_one_token(tmp_path: Path) -> None:
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(merges_bytes(train_merges(TEXTS, 200)))

    tokenizer = SimpleTokenizer(bpe_path=str(path), context_length=16)

    assert len(tokenizer.encode("the letter carries")) == 3
