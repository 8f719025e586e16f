"""What a run would do: for --dry-run, without a request and without a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from microclip_deploy.describe.budget import Usage
from microclip_deploy.describe.endpoint import worst_case
from microclip_deploy.describe.journal import journal_path, read_journal
from microclip_deploy.describe.settings import Settings

_REPLY, _SENTENCE, _BYTE = 20, 30, 0.25
"""Usual tokens of a reply, of each sentence in it, and of a byte of a prompt."""


class Estimate(NamedTuple):
    """What a run would do."""

    calls: int
    """That would be made."""
    noted: int
    """That are in the journal."""
    usual: Usage
    worst: Usage
    """Without questions that are asked again."""
    cost: float | None
    most_cost: float | None
    """US dollars; None where no price is known."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return self._asdict() | {"usual": self.usual.to_json(), "worst": self.worst.to_json()}


def estimate(names: Sequence[str], path: Path, settings: Settings) -> Estimate:
    """Say what `run.run_describe` would do; nothing is sent or written.

    Raises:
        DataError: the journal is damaged.
    """
    calls = noted = 0
    usual, worst = Usage(), Usage()
    with read_journal(journal_path(path)) as journal:
        for call in settings.plan(names):
            if settings.key(call) in journal:
                noted += 1
                continue
            calls += 1
            size = sum(len(message["content"].encode()) for message in call.messages)
            usual = usual.plus(Usage(round(size * _BYTE), _REPLY + _SENTENCE * call.sentences))
            most = settings.most_reply_tokens(call)
            worst = worst.plus(worst_case(call.messages, count=call.sentences, max_tokens=most))
    cost, most_cost = (settings.price and settings.price.of(usage) for usage in (usual, worst))
    return Estimate(calls, noted, usual, worst, cost, most_cost)
