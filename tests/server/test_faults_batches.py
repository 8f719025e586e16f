"""Which jobs answer for a worker that dies."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from microclip_deploy.server.batcher import Batch, Batcher
from microclip_deploy.server.refusal import Refusal
from microclip_deploy.server.seat import Seat
from microclip_deploy.serving.session import Prediction

POISON = 7


class Fragile:
    """A seat whose worker dies of every image that is POISON; two batches fit."""

    def __init__(self) -> None:
        self.ready, self.failed = True, False
        self.given: list[Batch] = []
        self.computed: list[list[int]] = []
        self.pump: Callable[[], None] = lambda: None

    def free(self) -> bool:
        return not self.given

    def can_prepare(self) -> bool:
        return len(self.given) < 2

    def load(self) -> int:
        return len(self.given)

    def image_s(self) -> float:
        return 0.01

    def give(self, batch: Batch) -> None:
        self.given.append(batch)
        asyncio.get_running_loop().call_soon(self.work)

    def work(self) -> None:
        """Compute the first batch."""
        if not self.given:
            return
        pixels = np.zeros((len(self.given[0]), 1, 1, 3), np.uint8)
        self.given[0].write(pixels)
        values = pixels[:, 0, 0, 0]
        self.computed.append(values.tolist())
        if POISON in values:
            lost, self.given = self.given, []
            for batch in reversed(lost):
                batch.lost("died", computing=batch is lost[0])
        else:
            rows = np.repeat(values[:, None], 2, axis=1).astype(np.float32)
            fields: list[Any] = [rows] * len(Prediction._fields)
            self.given.pop(0).answered(Prediction._make(fields), 0.01, {})
        self.pump()


async def answers(images: list[int], max_batch: int) -> tuple[list[Any], Fragile]:
    seat = Fragile()
    batcher = Batcher(
        [cast(Seat, seat)], max_batch=max_batch, max_delay_s=0.0, max_queue=len(images)
    )
    seat.pump = batcher.pump
    due = asyncio.get_running_loop().time() + 10
    asked = [batcher.ask(np.full((1, 1, 1, 3), image, np.uint8), due) for image in images]
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert batcher.waiting() == 0
    return found, seat


@pytest.mark.parametrize("place", [0, 1, 5, 16, 32])
def test_one_image_that_kills_the_worker(place: int) -> None:
    """The other 32 are answered, whether they were computed with it or waited behind it."""
    images = [1] * 33
    images[place] = POISON
    found, seat = asyncio.run(answers(images, max_batch=8))
    refused = [each for each in found if isinstance(each, Exception)]
    assert [type(each) for each in refused] == [Refusal]
    assert isinstance(found[place], Refusal)
    assert found[place].status == 503
    assert sum(POISON in values for values in seat.computed) == 2
    assert all(found[i].prediction.logits[0, 0] == 1 for i in range(33) if i != place)


def test_several_of_them() -> None:
    images = [POISON, 1, POISON, 1, 1, POISON, 1, 1]
    found, _ = asyncio.run(answers(images, max_batch=4))
    assert [isinstance(each, Refusal) for each in found] == [image == POISON for image in images]
