import io
import time
from itertools import count

import pytest
from rich.console import Console

from microclip_deploy.console import bar, waiting


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every look at the clock find ten seconds gone."""
    seconds = count(0, 10)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))


def told(*steps: tuple[int, int], unit: str = "images") -> list[str]:
    """Return the lines of a bar that is written to a file."""
    notes = Console(file=io.StringIO(), width=80)
    with bar(notes, "predicting", unit) as progress:
        for done, total in steps:
            progress.update(done, total)
    assert isinstance(notes.file, io.StringIO)
    return notes.file.getvalue().splitlines()


def test_a_file_gets_a_line_now_and_then_with_rate_and_time_left() -> None:
    assert told((100, 10000), (200, 10000), (300, 10000), (10000, 10000)) == [
        "predicting: 200/10000  24:30 left  6.7 images/s",
        "predicting: 10000/10000  200 images/s",
    ]


def test_hours_are_told_as_hours() -> None:
    assert told((1, 20000), (2, 20000))[-1] == "predicting: 2/20000  83:19:30 left  0.1 images/s"


def test_a_bar_without_a_unit_tells_no_rate_of_its_own() -> None:
    # A resumed adaptation begins anywhere; only what was done since counts for the time left.
    assert told((500, 600), (510, 600), (520, 600), unit="") == ["predicting: 510/600  1:30 left"]


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_a_terminal_shows_progress(terminal: str) -> None:
    notes = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": terminal})
    with waiting(notes, "opening"), bar(notes, "[/b] predicting", "images") as progress:
        progress.update(50, 100)
        progress.update(100, 100)
    assert isinstance(notes.file, io.StringIO)
    shown = notes.file.getvalue()
    assert "[/b] predicting" in shown
    assert "100/100" in shown
    assert "images/s" in shown
    assert ("\x1b" in shown) == (terminal == "xterm")
