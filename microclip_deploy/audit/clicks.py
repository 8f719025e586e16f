"""The answers: `clicks.csv`, one row a drawn photo, edited by the page, a spreadsheet, or both.

It is the only place where answers are kept. It is read before each change and replaced whole, so
that neither a crash nor an edit by hand loses one. A file that is not understood is never written.
"""

import csv
import io
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from microclip_deploy import artifact
from microclip_deploy.audit.plan import NEITHER, SKIP, WORDS, Drawn, Plan
from microclip_deploy.data.names import NameIndex
from microclip_deploy.data.text_file import cell, read_text
from microclip_deploy.errors import DataError, printable

CLICKS = "clicks.csv"
COLUMNS = ("number", "path", "candidate_1", "candidate_2", "answer", "when")


class Click(NamedTuple):
    """What was said about a photo."""

    answer: str = ""
    """A class name, `NEITHER`, `SKIP`, or '' for not yet."""
    when: str = ""


class Sheet:
    """The file of an audit."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        """Take the plan; `begin` makes the file."""
        self.path = directory / CLICKS
        self._plan = plan
        self._names = NameIndex(plan.classes)

    def begin(self, *, again: bool) -> None:
        """Make the file if there is none; write it `again` where the plan has got more rows."""
        if not self.path.exists():
            self._write([Click()] * len(self._plan.drawn))
        elif again:
            self._write(self.read())

    def understand(self, text: str) -> str | None:
        """Return an answer as it is kept, or None where it is no class and no known word."""
        said = text.strip()
        if said == "" or said.casefold() in WORDS:
            return said.casefold()
        for wording in (said, said.removeprefix("'")):  # as `cell` writes what looks like a formula
            row = self._names.find(" ".join(unicodedata.normalize("NFC", wording).split()))
            if row is not None:
                return self._plan.classes[row]
        return None

    def answer(self, number: int, text: str) -> bool:
        """Keep an answer to the photo with this number, from 1 on.

        Returns:
            False, and nothing is changed, where this is not the photo that is asked about now.

        Raises:
            DataError: the answer, or the file as it is now, is not understood.
        """
        said = self.understand(text)
        if not said:
            near = ", ".join(self._names.near(text, 3))
            raise DataError(
                f"answer: expected a class name, {NEITHER} or {SKIP}, found '{printable(text)}'; "
                + (f"did you mean {near}?" if near else "type another")
            )
        clicks = self.read()
        if number != first_open(clicks):
            return False
        clicks[number - 1] = Click(said, datetime.now(UTC).isoformat(timespec="milliseconds"))
        self._write(clicks)
        return True

    def undo(self) -> None:
        """Take the latest answer back; raises as `read`."""
        clicks = self.read()
        given = [(click.when, row) for row, click in enumerate(clicks) if click.answer]
        if given:
            clicks[max(given)[1]] = Click()
            self._write(clicks)

    def _write(self, clicks: Sequence[Click]) -> None:
        with artifact.staged_file(self.path, "w") as stream:
            rows = csv.writer(stream, lineterminator="\n")
            rows.writerow(COLUMNS)
            for number, (drawn, click) in enumerate(zip(self._plan.drawn, clicks, strict=True), 1):
                shown = [cell(self._plan.classes[row]) for row in drawn.shown]
                said = cell(click.answer)
                rows.writerow(
                    [number, _path(drawn), *shown, *[""] * (2 - len(shown)), said, click.when]
                )

    def read(self) -> list[Click]:
        """Return the clicks in the order of the plan.

        Raises:
            DataError: the file is not understood; the line is named.
        """
        clicks: dict[int, tuple[int, Click]] = {}
        for line, row in self._rows():
            number = int(row["number"]) if row["number"].isdecimal() else 0
            if not 1 <= number <= len(self._plan.drawn):
                last = len(self._plan.drawn)
                raise self._wrong(line, f"a number from 1 to {last}", row["number"], "restore it")
            drawn = self._plan.drawn[number - 1]
            if row["path"] != _path(drawn):
                remedy = "restore it; rows of other audits do not belong here"
                raise self._wrong(line, f"the path {_path(drawn)}", row["path"], remedy)
            if number in clicks:
                found = f"it again, after line {clicks[number][0]}"
                raise self._wrong(line, f"number {number} once", found, "remove one")
            clicks[number] = (line, Click(self._answer(line, row["answer"]), row["when"]))
        expected = len(self._plan.drawn)
        if len(clicks) in self._plan.planned[:-1] and max(clicks) == len(clicks):
            expected = len(clicks)  # the file of a smaller plan
        missing = next((n for n in range(1, expected + 1) if n not in clicks), None)
        if missing is not None:
            name = _path(self._plan.drawn[missing - 1])
            raise DataError(
                f"{printable(self.path)}: expected {expected} rows, found none with number "
                f"{missing} ({name}); put it back, with an empty answer if there is none"
            )
        kept = [clicks[number][1] for number in sorted(clicks)]
        return kept + [Click()] * (len(self._plan.drawn) - expected)

    def _answer(self, line: int, text: str) -> str:
        said = self.understand(text)
        if said is not None:
            return said
        near = self._names.near(text)
        remedy = f"did you mean '{near[0]}'?" if near else "correct it"
        wanted = f"a class name, {NEITHER}, {SKIP} or nothing as answer"
        raise self._wrong(line, wanted, text, remedy)

    def _rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield the number of each line with its cells; commas, semicolons or tabs part them."""
        text = read_text(self.path, "the answers of an audit").text
        head = text.partition("\n")[0]
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
        header = [name.strip().casefold() for name in next(rows, [])]
        while header and not header[-1]:
            header.pop()
        if sorted(header) != sorted(COLUMNS):
            columns = ", ".join(COLUMNS)
            raise self._wrong(1, f"the columns {columns}", ", ".join(header), "restore them")
        for cells in rows:
            if not any(part.strip() for part in cells):
                continue
            if len(cells) < len(header) or any(part.strip() for part in cells[len(header) :]):
                wanted = f"{len(header)} cells"
                raise self._wrong(rows.line_num, wanted, str(len(cells)), "restore the line")
            row = dict(zip(header, (part.strip() for part in cells), strict=False))
            yield rows.line_num, row

    def _wrong(self, line: int, wanted: str, found: str, remedy: str) -> DataError:
        return DataError(
            f"{printable(self.path)}, line {line}: expected {wanted}, found "
            f"{printable(found) or 'nothing'}; {remedy} (nothing in the file was changed)"
        )


def _path(drawn: Drawn) -> str:
    return cell(printable(drawn.path).strip())


def first_open(clicks: Sequence[Click]) -> int:
    """Return the number of the first photo without an answer, from 1 on; 0 if there is none."""
    return next((number for number, click in enumerate(clicks, 1) if not click.answer), 0)


def handled(clicks: Sequence[Click]) -> int:
    """Return how far the answers reach; what was left empty before counts as skipped."""
    return max((number for number, click in enumerate(clicks, 1) if click.answer), default=0)
