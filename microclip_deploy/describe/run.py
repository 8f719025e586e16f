"""`describe`: make the calls that are not in the journal yet, and write what came of all of them.

    Plan -> calls in no journal -> Journal -> judge -> descriptions.jsonl and .dropped.jsonl

The files are made from the journal in the order of the plan, so that they do not depend on who
answered first or on how often a run was interrupted.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from rich.console import Console

from microclip_deploy.artifact import staged_file
from microclip_deploy.describe.budget import Usage
from microclip_deploy.describe.calls import make_calls
from microclip_deploy.describe.endpoint import endpoint_name
from microclip_deploy.describe.journal import Journal, journal_path, open_journal
from microclip_deploy.describe.judge import Judgement
from microclip_deploy.describe.sentence import Sentence
from microclip_deploy.describe.settings import Settings
from microclip_deploy.errors import (
    DataError,
    Interrupted,
    MicroclipError,
    ThresholdError,
    UsageError,
    printable,
)

_SHOWN = 5  # classes that are named


Judge = Callable[[Sequence[Sentence]], Judgement]
"""What decides which sentences are kept."""


class Outcome(NamedTuple):
    """What a run has done."""

    path: Path
    classes: int
    sentences: int
    """That were kept."""
    dropped: int
    missing: int
    """That were asked for and did not come."""
    calls: int
    """Made by this run."""
    noted: int
    """That were in the journal before."""
    used: Usage
    """By all runs for this file."""
    cost: float | None
    """US dollars; None where no price is known."""
    judgement: Judgement | None
    """What was decided about the sentences; None where nothing judged them."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        judged = self.judgement and self.judgement.to_json()
        plain = {"path": str(self.path), "used": self.used.to_json(), "judgement": judged}
        return self._asdict() | plain


def run_describe(
    names: Sequence[str],
    path: Path,
    settings: Settings,
    notes: Console,
    *,
    key: str | None = None,
    judge: Judge | None = None,
) -> Outcome:
    """Describe classes, and write the sentences with their origin.

    Args:
        names: cleaned class names.
        path: NAME.jsonl; NAME.cache.jsonl and, with a judge, NAME.dropped.jsonl are beside it.
        settings: what is asked, of whom, within which limits.
        notes: where to show progress.
        key: API key.
        judge: decides which sentences are kept; None keeps all, and no list of them in memory.

    Raises:
        UsageError: another process writes the same file, or its name does not end with .jsonl.
        DataError: the journal is damaged, or a class has no sentence in the end.
        EnvironmentProblem: the endpoint cannot be reached or refuses, or the disk is full; finished
            calls are in the journal.
        ThresholdError: the budget is used up; what is done is written.
        Interrupted: a signal; finished calls are in the journal.
    """
    if path.suffix != ".jsonl":
        raise UsageError(f"{printable(path)}: expected a name that ends with .jsonl; change it")
    plan = settings.plan(names)
    with open_journal(journal_path(path)) as journal:
        noted = sum(settings.key(call) in journal for call in plan)
        budget, made, stopped = make_calls(plan, settings, journal, notes, key=key)
        kept_calls = sum(settings.key(call) in journal for call in plan)
        if stopped is None or isinstance(stopped, ThresholdError):
            sentences = _sentences(names, settings, journal)
            kept, judgement = _write(path, sentences, judge)
    if stopped is not None:
        raise _to_be_continued(stopped, kept_calls, len(plan), path)
    dropped = len(judgement.dropped) if judgement else 0
    _require_all(names, kept, dropped, path)
    return Outcome(
        path=path,
        classes=len(names),
        sentences=kept.total(),
        dropped=dropped,
        missing=sum(call.sentences for call in plan) - kept.total() - dropped,
        calls=made,
        noted=noted,
        used=budget.spent,
        cost=budget.cost,
        judgement=judgement,
    )


def _sentences(names: Sequence[str], settings: Settings, journal: Journal) -> Iterator[Sentence]:
    """Give what the journal holds, in the order of the plan."""
    host = endpoint_name(settings.endpoint).partition("/")[0]
    for call in settings.plan(names):
        key = settings.key(call)
        if key not in journal:
            continue
        record = journal[key]
        provenance = {
            "model": settings.model,
            "endpoint": host,
            "prompt_sha256": call.prompt_sha256,
            "question": call.question,
            "temperature": settings.temperature,
            "seed": settings.seed,
            "reply_id": record["reply_id"],
            "created_utc": record["created_utc"],
        }
        for text in record["sentences"]:
            yield Sentence(call.class_name, text, provenance)


def _write(
    path: Path, sentences: Iterator[Sentence], judge: Judge | None
) -> tuple[Counter[str], Judgement | None]:
    """Write both files; return how many sentences of each class were kept, and the decision."""
    if judge is None:
        return _write_kept(path, sentences, "off"), None
    judged = judge(list(sentences))
    with staged_file(path.with_name(f"{path.stem}.dropped.jsonl"), "w") as file:
        for sentence, reason in judged.dropped:
            _write_line(file, sentence, {"reason": reason})
    kept = _write_kept(path, judged.kept, "kept" if judged.filtered else "off")
    return kept, judged


def _write_kept(path: Path, sentences: Iterable[Sentence], how: str) -> Counter[str]:
    kept: Counter[str] = Counter()
    with staged_file(path, "w") as file:
        for sentence in sentences:
            _write_line(file, sentence, {"filter": how})
            kept[sentence.class_name] += 1
    return kept


def _write_line(file: IO[str], sentence: Sentence, more: dict[str, str]) -> None:
    line = {"class": sentence.class_name, "text": sentence.text, **sentence.provenance, **more}
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _to_be_continued(stopped: MicroclipError, done: int, calls: int, path: Path) -> MicroclipError:
    """Say beside why a run ended what is kept and how it goes on."""
    again = "the same command goes on from there"
    if isinstance(stopped, ThresholdError):
        again = f"what they gave is in {printable(path)}; a larger limit goes on from there"
    cache = printable(journal_path(path))
    message = f"{stopped}; {done} of {calls} calls are kept in {cache}, {again}"
    if isinstance(stopped, Interrupted):
        return Interrupted(message, stopped.exit_code - 128)
    return type(stopped)(message)


def _require_all(names: Sequence[str], kept: Counter[str], dropped: int, path: Path) -> None:
    without = [name for name in names if not kept[name]]
    if without:
        more = f" and {len(without) - _SHOWN} more" if len(without) > _SHOWN else ""
        why = f" ({dropped} were dropped, with the reason beside)" if dropped else ""
        raise DataError(
            f"{printable(path)}: expected a sentence for every class, found none for "
            f"{', '.join(without[:_SHOWN])}{more}{why}; run again, which asks where a reply gave "
            "none, try another --model, or write them by hand"
        )
