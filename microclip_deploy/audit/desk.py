"""What the page asks for and what it is told. It never learns which model says what."""

import io
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from microclip_deploy.audit.clicks import Click, Sheet, first_open
from microclip_deploy.audit.plan import Plan
from microclip_deploy.audit.result import Result
from microclip_deploy.audit.wording import sentences
from microclip_deploy.data.decode import read_photo

_SIDE, _EXAMPLE_SIDE = 1600, 320
"""Longest side of pictures, pixels."""
_MATCHES = 12  # class names a search shows


class Desk:
    """An audit at work; several threads may use it."""

    def __init__(self, plan: Plan, sheet: Sheet, root: Path) -> None:
        """Take what is asked, where answers go and where photos lie."""
        self.plan, self._sheet, self._root = plan, sheet, root
        self._lock = Lock()

    def state(self) -> dict[str, Any]:
        """Return what is asked now and what is known; raises as `Sheet.read`."""
        with self._lock:
            clicks = self._sheet.read()
        number = first_open(clicks)
        result = Result(self.plan, clicks)
        return {
            "total": len(clicks),
            "answered": sum(bool(click.answer) for click in clicks),
            "number": number,
            "candidates": self._candidates(number) if number else [],
            "next": _after(clicks, number),
            "may_stop": result.may_stop,
            "sentences": sentences(result),
        }

    def _candidates(self, number: int) -> list[dict[str, Any]]:
        return [
            {"name": self.plan.classes[row], "class": row, "examples": len(self._examples(row))}
            for row in self.plan.drawn[number - 1].shown
        ]

    def _examples(self, row: int) -> Sequence[str]:
        return self.plan.examples.get(row, ())

    def answer(self, number: int, text: str) -> bool:
        """Keep an answer, as `Sheet.answer` does."""
        with self._lock:
            return self._sheet.answer(number, text)

    def undo(self) -> None:
        """Take the latest answer back."""
        with self._lock:
            self._sheet.undo()

    def matching(self, text: str) -> list[str]:
        """Return class names for what was typed so far: beginnings first."""
        typed = text.strip().casefold()
        found = [name for name in self.plan.classes if typed in name.casefold()]
        found.sort(key=lambda name: not name.casefold().startswith(typed))
        return found[:_MATCHES]

    def photo(self, number: int) -> bytes:
        """Return a drawn photo, by its number from 1 on, as JPEG.

        Raises:
            IndexError: there is none with this number.
            BadImage: it cannot be read any more.
        """
        if number < 1:
            raise IndexError(number)
        return self._picture(self.plan.drawn[number - 1].path, _SIDE)

    def example(self, row: int, place: int) -> bytes:
        """Return an example of a class as JPEG; raises as `photo`."""
        return self._picture(self._examples(row)[place], _EXAMPLE_SIDE)

    def _picture(self, path: str, side: int) -> bytes:
        picture = read_photo(self._root / path, self.plan.reading).image
        picture.thumbnail((side, side))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        return stream.getvalue()


def _after(clicks: Sequence[Click], number: int) -> int:
    """Return the number of the photo that will be asked about next, 0 for none."""
    return next((n for n in range(number + 1, len(clicks) + 1) if not clicks[n - 1].answer), 0)
