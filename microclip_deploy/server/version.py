"""A model version in memory: what it is, its queue, and its workers."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from microclip_deploy.server.batcher import Batcher
from microclip_deploy.server.refusal import Refusal
from microclip_deploy.server.seat import Facts, Seat
from microclip_deploy.server.settings import Settings
from microclip_deploy.server.worker import Options


class Version:
    """A loaded version; requests that use it keep it in memory."""

    def __init__(self, facts: Facts, batcher: Batcher, seats: list[Seat]) -> None:
        self.facts, self.batcher = facts, batcher
        self._seats, self._users = seats, 0
        self._unused = asyncio.Event()
        self._unused.set()
        self.last_used = asyncio.get_running_loop().time()

    @classmethod
    async def load(cls, directory: Path, settings: Settings) -> Self:
        """Start a worker a device.

        Raises:
            MicroclipError: one of them cannot open the model.
        """
        seats: list[Seat] = []
        batcher = Batcher(
            seats,
            max_batch=settings.max_batch,
            max_delay_s=settings.max_delay_s,
            max_queue=settings.max_queue,
        )
        for device in settings.devices:
            options = Options(
                str(directory), device, settings.threads, settings.max_batch, settings.prior
            )
            seats.append(Seat(options, settings.hang_timeout_s, batcher.pump))
        try:
            await asyncio.gather(*(seat.start() for seat in seats))
        except BaseException:
            await asyncio.gather(*(seat.stop() for seat in seats))
            raise
        assert seats[0].facts is not None
        return cls(seats[0].facts, batcher, seats)

    def ready(self) -> bool:
        """Say whether a worker can answer."""
        return any(seat.ready for seat in self._seats)

    def restarts(self) -> int:
        """Return how many workers had to be started again."""
        return sum(seat.restarts for seat in self._seats)

    @contextmanager
    def used(self) -> Iterator[Self]:
        """Keep the version in memory meanwhile."""
        self._users += 1
        self._unused.clear()
        try:
            yield self
        finally:
            self._users -= 1
            self.last_used = asyncio.get_running_loop().time()
            if not self._users:
                self._unused.set()

    def idle_s(self) -> float:
        """Return for how long nobody has used it."""
        return 0.0 if self._users else asyncio.get_running_loop().time() - self.last_used

    async def retire(self, within_s: float) -> None:
        """Wait until nobody uses it, then end the workers."""
        try:
            async with asyncio.timeout(within_s):
                await self._unused.wait()
        except TimeoutError:
            pass
        await asyncio.gather(*(seat.stop() for seat in self._seats))
        self.batcher.refuse_all(Refusal(503, "the model was unloaded; send again", "unloaded", 1))
        self._seats.clear()  # their memory ends here, not when the garbage collector comes
