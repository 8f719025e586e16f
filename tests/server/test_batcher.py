"""The queue by itself, with seats that answer when they are told to."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from microclip_deploy.server.batcher import Batcher
from microclip_deploy.server.refusal import Refusal
from microclip_deploy.serving.session import Prediction


class FakeSeat:
    """Keeps batches until `finish`."""

    def __init__(self) -> None:
        self.ready = True
        self.failed = False
        self.batches: list[Any] = []
        self.sizes: list[int] = []

    def free(self) -> bool:
        return self.ready and not self.batches

    def can_prepare(self) -> bool:
        return self.ready and len(self.batches) < 2

    def load(self) -> int:
        return len(self.batches)

    def image_s(self) -> float:
        return 0.5

    def give(self, batch: Any) -> None:
        pixels = np.zeros((len(batch), 1, 1, 3), np.uint8)
        batch.write(pixels)
        self.batches.append((batch, pixels))
        self.sizes.append(len(batch))

    def finish(self, **errors: str) -> None:
        """Answer the oldest batch: the logits are the pixels."""
        batch, pixels = self.batches.pop(0)
        rows = pixels[:, 0, 0, :1].astype(np.float32)
        answers = Prediction(rows, rows, rows, rows > 0, rows, rows[:, 0] > 0)
        batch.answered(answers, 0.01, {int(row[1:]): text for row, text in errors.items()})

    def die(self) -> None:
        batch, _ = self.batches.pop(0)
        batch.lost("died", computing=True)


def image(value: int, count: int = 1) -> Any:
    return np.full((count, 1, 1, 3), value, np.uint8)


Scenario = Callable[[Batcher, FakeSeat, Callable[..., Any]], Coroutine[Any, Any, None]]


def play(scenario: Scenario, **limits: Any) -> None:
    """Run a scenario in a loop of its own."""

    async def run() -> None:
        seat = FakeSeat()
        asked = {"max_batch": 4, "max_delay_s": 0.0, "max_queue": 6, **limits}
        batcher = Batcher([seat], **asked)  # type: ignore[list-item]  # has what is used of it
        loop = asyncio.get_running_loop()

        def ask(value: int, count: int = 1, within_s: float = 5.0) -> asyncio.Task[Any]:
            return loop.create_task(batcher.ask(image(value, count), loop.time() + within_s))

        await scenario(batcher, seat, ask)

    asyncio.run(run())


async def turn() -> None:
    """Let every task go on."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_what_waits_together_is_computed_together() -> None:
    """In order, each with its own rows; a full batch is prepared while another is computed."""

    async def scenario(batcher: Batcher, seat: FakeSeat, ask: Callable[..., Any]) -> None:
        tasks = [ask(value, count) for value, count in ((1, 1), (2, 2), (3, 1), (4, 1), (5, 1))]
        await turn()
        assert seat.sizes == [1, 4]
        seat.finish()
        batcher.pump()
        seat.finish()
        batcher.pump()
        seat.finish()
        for value, task in enumerate(tasks, 1):
            logits = (await task).prediction.logits
            assert set(logits.ravel()) == {value}
            assert len(logits) == (2 if value == 2 else 1)

    play(scenario)


def test_a_large_request_is_divided() -> None:
    async def scenario(batcher: Batcher, seat: FakeSeat, ask: Callable[..., Any]) -> None:
        task = ask(7, 10)
        for _ in range(3):
            await turn()
            seat.finish()
            batcher.pump()
        assert (await task).prediction.logits.shape == (10, 1)
        assert seat.sizes == [4, 4, 2]

    play(scenario)


def test_an_idle_worker_waits_for_company_only_so_long() -> None:
    async def scenario(batcher: Batcher, seat: FakeSeat, ask: Callable[..., Any]) -> None:
        tasks = [ask(1)]
        await turn()
        assert not seat.sizes
        tasks.append(ask(2))
        await asyncio.sleep(0.06)
        assert seat.sizes == [2]
        seat.finish()
        await asyncio.gather(*tasks)

    play(scenario, max_delay_s=0.05)


def test_a_full_queue_says_when_to_come_back() -> None:
    async def scenario(batcher: Batcher, seat: FakeSeat, ask: Callable[..., Any]) -> None:
        seat.ready = False
        kept = [ask(1) for _ in range(6)]
        await turn()
        with pytest.raises(Refusal) as refused:
            await ask(2)
        assert (refused.value.status, refused.value.retry_after_s) == (429, 3)
        for task in kept:
            task.cancel()

    play(scenario)


def test_who_gives_up_or_is_late_is_not_computed() -> None:
    async def scenario(batcher: Batcher, seat: FakeSeat, ask: Callable[..., Any]) -> None:
        seat.ready = False
        given_up, late, kept = ask(1), ask(2, within_s=0.01), ask(3)
        await turn()
        given_up.cancel()
        with pytest.raises(Refusal) as refused:
            await late
        assert refused.value.status == 504
        seat.ready = True
        batcher.pump()
        assert seat.sizes == [1]
        seat.finish()
        assert (await kept).prediction.logits[0, 0] == 3

    play(scenario)


def test_an_image_that_fails_costs_only_its_request() -> None:
    async def scenario(batcher: Batcher, seat: FakeSeat, ask: Callable[..., Any]) -> None:
        seat.ready = False
        bad, good = ask(1), ask(2)
        await turn()
        seat.ready = True
        batcher.pump()
        seat.finish(_0="DataError")
        with pytest.raises(Refusal) as refused:
            await bad
        assert refused.value.status == 500
        assert (await good).prediction.logits[0, 0] == 2

    play(scenario)


def test_images_of_a_lost_batch_are_asked_again_one_by_one() -> None:
    """The one that is alone when the worker dies again is refused; the others are answered."""

    async def scenario(batcher: Batcher, seat: FakeSeat, ask: Callable[..., Any]) -> None:
        seat.ready = False
        tasks = [ask(value) for value in (1, 2, 3)]
        await turn()
        seat.ready = True
        batcher.pump()
        seat.die()
        batcher.pump()
        assert seat.sizes == [3, 1]
        seat.die()
        with pytest.raises(Refusal) as refused:
            await tasks[0]
        assert refused.value.status == 503
        for number in (1, 2):
            batcher.pump()
            seat.finish()
            assert (await tasks[number]).prediction.logits[0, 0] == number + 1
        assert seat.sizes == [3, 1, 1, 1]

    play(scenario)
