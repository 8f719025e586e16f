"""Logs are read back whole, without a line that was being written when the process died."""

from pathlib import Path

import pytest

from microclip_deploy.adapt.log import read_history
from microclip_deploy.errors import CheckpointError


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "history.jsonl"


def test_no_file_is_no_history(log: Path) -> None:
    assert read_history(log) == []


def test_a_cut_last_line_is_left_out(log: Path) -> None:
    log.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert read_history(log) == [{"epoch": 1}, {"epoch": 2}]


def test_separators_of_unicode_do_not_end_a_line(log: Path) -> None:
    log.write_text('{"note": "a\u2028b"}\n', encoding="utf-8")
    assert read_history(log) == [{"note": "a\u2028b"}]


@pytest.mark.parametrize("line", ["{", "3", "[]", "nothing"])
def test_a_damaged_line_is_named(log: Path, line: str) -> None:
    log.write_text(f'{{"epoch": 1}}\n{line}\n{{"epoch": 3}}\n')
    with pytest.raises(CheckpointError, match=r"history\.jsonl, line 2: expected a JSON object"):
        read_history(log)


def test_bytes_that_are_no_text_are_named(log: Path) -> None:
    log.write_bytes(b"\xff\n")
    with pytest.raises(CheckpointError, match="UTF-8"):
        read_history(log)


def test_an_unreadable_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found: .*directory"):
        read_history(tmp_path)
