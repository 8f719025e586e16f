"""The calls of a plan, several at once: those that are in no journal yet are made and noted.

Everything runs in one thread, so journal and budget need no locks; workers are asyncio tasks that
take their calls from one iterator. When one of them cannot go on, the others finish the call they
are at; a signal ends them at once.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from rich.console import Console

from microclip_deploy.adapt.stop_signal import StopSignal
from microclip_deploy.console import Bar, bar
from microclip_deploy.describe import questions, replies
from microclip_deploy.describe.budget import Budget, Charge, Usage
from microclip_deploy.describe.endpoint import Attempt, Endpoint
from microclip_deploy.describe.journal import Journal
from microclip_deploy.describe.questions import Call, Plan
from microclip_deploy.describe.settings import Settings
from microclip_deploy.errors import Interrupted, MicroclipError

_LONGER = 4
"""Times the usual limit, when a reply is asked for again because it was cut."""

_LOOK_S = 0.1
"""Between two looks at whether a signal has come."""


def make_calls(
    plan: Plan, settings: Settings, journal: Journal, notes: Console, *, key: str | None
) -> tuple[Budget, int, MicroclipError | None]:
    """Make all calls of a plan that are not in the journal.

    Args:
        plan: the calls.
        settings: how they are made.
        journal: what was made before; finished calls are added.
        notes: where to show progress.
        key: API key.

    Returns:
        What was spent, the number of calls made, and why the others were not; None if all were.
    """
    missing = sum(settings.key(call) not in journal for call in plan)
    if not missing:
        return _budget(settings, journal), 0, None
    with StopSignal() as stop, bar(notes, "describing", "calls") as shown:
        made = _Made(settings, journal, shown, missing)
        asyncio.run(made.run(plan, key, stop))
    if stop.received and made.stopped is None and made.done < missing:
        made.stopped = Interrupted("interrupted", stop.received)
    return made.budget, made.done, made.stopped


def _budget(settings: Settings, journal: Journal) -> Budget:
    return Budget(
        most_tokens=settings.most_tokens,
        most_cost=settings.most_cost,
        price=settings.price,
        spent=journal.spent,
    )


class _Made:
    """The calls of one run."""

    def __init__(self, settings: Settings, journal: Journal, shown: Bar, missing: int) -> None:
        self.done = 0
        self.stopped: MicroclipError | None = None
        self.budget = _budget(settings, journal)
        self._settings, self._journal = settings, journal
        self._shown, self._missing = shown, missing

    async def run(self, plan: Plan, key: str | None, stop: StopSignal) -> None:
        """Make the calls until all are made, one fails for good, or a signal comes."""
        settings = self._settings
        self._endpoint = Endpoint(
            settings.endpoint,
            settings.model,
            key,
            temperature=settings.temperature,
            seed=settings.seed,
            timeout_s=settings.timeout_s,
        )
        calls = (call for call in plan if settings.key(call) not in self._journal)
        workers = {asyncio.ensure_future(self._work(calls)) for _ in range(settings.concurrency)}
        try:
            pending = workers
            while pending and not stop.received:
                ended, pending = await asyncio.wait(pending, timeout=_LOOK_S)
                for worker in ended:
                    worker.result()  # raises what nobody expected
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self._endpoint.close()

    async def _work(self, calls: Iterator[Call]) -> None:
        for call in calls:
            try:
                await self._make(call)
            except MicroclipError as error:
                self.stopped = self.stopped or error
            if self.stopped:
                return
            spent = f"{self.budget.spent.total:,} tokens"
            self._shown.update(self.done, self._missing, spent)

    async def _make(self, call: Call) -> None:
        """Make one call and note how it ended."""
        key = self._settings.key(call)
        charges: list[Charge] = []

        @asynccontextmanager
        async def attempt(worst: Usage) -> AsyncIterator[Charge]:
            async with self.budget.request(worst) as charge:
                charges.append(charge)
                self._journal.begin(key, worst)
                yield charge

        def used() -> Usage:
            return Usage(*map(sum, zip(*(charge.used for charge in charges), strict=True)))

        try:
            parsed, reply_id = await self._ask(call, attempt)
        except MicroclipError:
            if charges:
                self._journal.fail(key, "the run ended", used())
            raise
        self.done += 1
        if not parsed.sentences:
            self._journal.fail(key, "; ".join(parsed.problems), used())
            return
        record = {
            "key": key,
            "class": call.class_name,
            "question": call.question,
            "prompt_sha256": call.prompt_sha256,
            "model": self._settings.model,
            "parameters": self._settings.parameters(call),
            "reply_id": reply_id,
            "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "usage": used().to_json(),
            "sentences": parsed.sentences,
            "problems": parsed.problems,
        }
        self._journal.finish(record)

    async def _ask(self, call: Call, attempt: Attempt) -> tuple[replies.Parsed, str]:
        """Return the sentences of a reply and its id; ask once more where some are missing."""
        most, count = self._settings.most_reply_tokens(call), call.sentences
        reply = await self._endpoint.ask(
            call.messages, count=count, max_tokens=most, attempt=attempt
        )
        parsed = replies.parse(reply.text, count)
        if len(parsed.sentences) == count:
            return parsed, reply.reply_id
        problems = [reply.problem, *parsed.problems] if reply.problem else parsed.problems
        again = await self._endpoint.ask(
            [*call.messages, *questions.repair(reply.text, problems, count)],
            count=count,
            max_tokens=most * _LONGER if reply.problem else most,
            attempt=attempt,
        )
        repaired = replies.parse(again.text, count)
        if len(repaired.sentences) < len(parsed.sentences):
            return parsed, reply.reply_id
        return repaired, again.reply_id
