"""A server from its start to its end."""

import asyncio
import logging
import os
import resource
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import uvicorn

from microclip_deploy.errors import EnvironmentProblem, Interrupted
from microclip_deploy.server.app import make_app
from microclip_deploy.server.catalog import Catalog, Place
from microclip_deploy.server.connection import Connection
from microclip_deploy.server.metrics import Metrics
from microclip_deploy.server.settings import Settings

_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, which keeps answering for a moment after it is told to end.

    Meanwhile it is not ready and closes each connection with its answer, so that clients and
    balancers turn away before the port is closed.
    """

    def __init__(self, config: uvicorn.Config, catalog: Catalog) -> None:
        super().__init__(config)
        self._catalog = catalog

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal ends at once, as one does before the port is open."""
        if self._catalog.draining or not self.started:  # workers end with their sockets
            os._exit(128 + sig)
        self._catalog.draining = True
        delay_s = self._catalog.settings.drain_delay_s
        self._loop.call_soon_threadsafe(
            self._loop.call_later, delay_s, super().handle_exit, sig, frame
        )

    async def startup(self, sockets: Any = None) -> None:
        """Load the models, then open the port."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            [listener, *_] = self.servers[0].sockets
            host, port = listener.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            _log.warning("serving on http://%s:%d (Ctrl-C ends it)", host, port)


def serve(places: Sequence[Place], settings: Settings) -> None:
    """Serve until a signal ends it; requests that were accepted are answered first.

    Raises:
        MicroclipError: a model cannot be loaded.
        EnvironmentProblem: the port cannot be opened.
        Interrupted: a signal ended it.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what it would say, we say
    _allow_many_connections()
    catalog = Catalog(places, settings, Metrics())
    failure: list[BaseException] = []
    config = uvicorn.Config(
        make_app(catalog, failure.append),
        host=settings.host,
        port=settings.port,
        http=Connection,
        loop="asyncio",  # uvloop copies large bodies more slowly, and is as fast with small ones
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.timeout_s) + 1,
    )
    server = Server(config, catalog)
    try:
        server.run()
    except SystemExit as error:  # uvicorn's way to say that the start failed
        raise _start_problem(failure, settings) from error
    except Interrupted as ended:  # uvicorn raises the signal again at its end
        ended.args = ("stopped; the requests that were accepted have been answered",)
        raise


def _start_problem(failure: Sequence[BaseException], settings: Settings) -> BaseException:
    if failure:
        return failure[0]
    return EnvironmentProblem(
        f"serve: expected to listen on {settings.host}:{settings.port}, found the address in use "
        "or not allowed; give another --port or --host"
    )


def _allow_many_connections() -> None:
    """Raise the limit on open files, of which a connection is one, as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if sys.platform == "darwin":
        hard = min(hard, 10_240)  # the kernel's own limit, whatever it says
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
