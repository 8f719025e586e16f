"""The models of a server by name: loaded, loaded again when they change, unloaded when idle."""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from microclip_deploy.artifact import MANIFEST
from microclip_deploy.errors import MicroclipError, UsageError
from microclip_deploy.server.metrics import Metrics
from microclip_deploy.server.refusal import Refusal
from microclip_deploy.server.seat import Facts
from microclip_deploy.server.settings import Settings
from microclip_deploy.server.version import Version
from microclip_deploy.server.worker import version_of

LOOK_EVERY_S = 1.0
"""Manifests are looked at so often."""

AGAIN_AFTER_S = 30.0
"""A changed directory that could not be loaded is tried again: its files may have come late."""

_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """What the command line names."""

    name: str
    directory: Path


class Served:
    """A directory that is served under a name, as the version it now holds."""

    def __init__(self, place: Place, settings: Settings, metrics: Metrics) -> None:
        self.name, self.directory = place
        self.facts: Facts | None = None
        """Also of a version that was unloaded."""
        self.version: Version | None = None
        self._settings, self._metrics = settings, metrics
        self._loading: asyncio.Task[Version] | None = None
        self._seen, self._failed_at = "", -math.inf
        self._retiring: set[asyncio.Task[None]] = set()

    def state(self) -> str:
        """Return "ready", "loading", "unloaded" or "failed"."""
        if self.version is not None:
            return "ready" if self.version.ready() else "failed"
        return "loading" if self._loading else "unloaded"

    async def load(self) -> Version:
        """Load what the directory holds now, and put it in the place of what was.

        Raises:
            MicroclipError: it cannot be loaded; what was stays.
        """
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
        return await asyncio.shield(self._loading)

    async def _load(self) -> Version:
        try:
            self._seen = version_of(self.directory)
            loaded = await Version.load(self.directory, self._settings)
        finally:
            self._loading = None
        loaded.batcher.on_batch = self._metrics.batches.labels(self.name).observe
        before, self.version, self.facts = self.version, loaded, loaded.facts
        if before is not None:
            self._retire(before)
        self._show(loaded)
        return loaded

    def _show(self, loaded: Version) -> None:
        labels = (self.name, loaded.facts.version)
        self._metrics.queue.labels(*labels).set_function(loaded.batcher.waiting)
        self._metrics.ready.labels(*labels).set_function(loaded.ready)
        self._metrics.restarts.labels(*labels).set_function(loaded.restarts)

    def _retire(self, version: Version) -> None:
        """Let a version finish its requests, and forget it."""
        for gauge in (self._metrics.queue, self._metrics.ready, self._metrics.restarts):
            with contextlib.suppress(KeyError):
                gauge.remove(self.name, version.facts.version)
        task = asyncio.create_task(version.retire(self._settings.timeout_s))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    @asynccontextmanager
    async def used(self, wanted: str | None = None) -> AsyncIterator[Version]:
        """Give the current version, loaded if need be, and keep it until the block ends.

        Args:
            wanted: the version that it must be; None for any.

        Raises:
            Refusal: 503, it cannot be loaded; 404, it is another one by now.
        """
        version = self.version
        if version is None:
            try:
                version = await self.load()
            except MicroclipError as error:
                _log.error("error: %s: %s", self.name, error)
                raise Refusal(503, "the model cannot be loaded; see the log", "load", 5) from error
        if wanted not in (None, version.facts.version):
            raise _no_version()
        with version.used():
            yield version

    async def look(self) -> None:
        """Load a changed directory again; unload what nobody uses."""
        limit_s = self._settings.unload_after_s
        if self.version is not None and limit_s and self.version.idle_s() > limit_s:
            unloaded, self.version = self.version, None
            self._retire(unloaded)
        if self.version is None:
            return
        with contextlib.suppress(MicroclipError):  # gone for now: it is being replaced
            now, held = version_of(self.directory), self.version.facts.version
            failed_s = asyncio.get_running_loop().time() - self._failed_at
            if now == held or (now == self._seen and failed_s < AGAIN_AFTER_S):
                return
            try:
                await self.load()
                outcome = "loaded"
            except MicroclipError as error:
                _log.error("error: %s changed and cannot be loaded: %s", self.name, error)
                self._failed_at = asyncio.get_running_loop().time()
                outcome = "failed"
            self._metrics.reloads.labels(self.name, outcome).inc()

    async def close(self) -> None:
        """End all workers."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])
        if self.version is not None:
            self._retire(self.version)
        await asyncio.gather(*self._retiring)


class Catalog:
    """All models of a server."""

    def __init__(self, places: Sequence[Place], settings: Settings, metrics: Metrics) -> None:
        self.draining = False
        self.settings, self.metrics = settings, metrics
        self._served = [Served(place, settings, metrics) for place in places]
        self._watch: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Load every model, one after the other.

        Raises:
            MicroclipError: one of them cannot be loaded.
        """
        for served in self._served:
            await served.load()
        self._watch = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for served in self._served:
                await served.look()

    async def close(self) -> None:
        """End all workers."""
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*(served.close() for served in self._served))

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served)

    def names(self) -> list[str]:
        """Return the names, each once, in the order they were given."""
        return list(dict.fromkeys(served.name for served in self._served))

    def of_name(self, name: str) -> list[Served]:
        """Return what is served under a name; the last one is the default.

        Raises:
            Refusal: 404, nothing.
        """
        found = [served for served in self._served if served.name == name]
        if not found:
            raise Refusal(404, "no model of this name; GET /v1/models lists them", "model")
        return found

    def find(self, name: str | None, version: str | None = None) -> Served:
        """Return the model of a name and a version.

        Args:
            name: None for the only one.
            version: None for the default.

        Raises:
            Refusal: 404, there is none; 400, there are several names.
        """
        if name is None:
            if len(self.names()) > 1:
                raise Refusal(400, "several models are served; name one with ?model=", "model")
            name = self.names()[0]
        found = self.of_name(name)
        if version is None:
            return found[-1]
        for served in reversed(found):
            if served.facts is not None and served.facts.version == version:
                return served
        raise _no_version()

    def ready(self) -> bool:
        """Say whether every model can answer, or will be loaded when it is asked."""
        return not self.draining and all(
            served.state() in ("ready", "unloaded") for served in self._served
        )


def _no_version() -> Refusal:
    return Refusal(404, "no such version of this model; GET /v1/models lists them", "model")


def places(given: Sequence[str]) -> list[Place]:
    """Read `[NAME=]DIR` words.

    Raises:
        UsageError: a name that cannot stand in an address, or a directory without a manifest.
    """
    found = []
    for word in given:
        name, equals, path = word.partition("=")
        if not equals or (Path(word) / MANIFEST).is_file():  # a path may hold a "=", too
            name, path = "", word
        directory = Path(path).expanduser()
        name = name or directory.absolute().name
        if not name or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name):
            raise UsageError(
                f"serve: expected a name of letters, digits and . _ - for {directory}, found "
                f"{name!r}; give one: NAME={directory}"
            )
        if not (directory / MANIFEST).is_file():
            raise UsageError(
                f"serve: expected a directory that `adapt` or `export` wrote, found {directory} "
                f"without {MANIFEST}; give another"
            )
        found.append(Place(name, directory))
    return found
