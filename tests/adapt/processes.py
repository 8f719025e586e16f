"""Command lines in processes of their own, forked from a server that has imported everything.

A fresh interpreter takes seconds to import torch; a test of several processes, most of its time.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from microclip_deploy.cli.main import main


def begin(arguments: list[str], told: Path, prepare: Callable[[], Any] = int) -> ForkServerProcess:
    """Start a command line, whose stderr goes to a file; `prepare` is called in its process."""
    process = _context().Process(target=_run, args=(arguments, told, prepare))
    process.start()
    return process


@cache
def _context() -> ForkServerContext:
    """Return what starts processes; the server that the loader of photos began knows less."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # made for tests
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["microclip_deploy.cli.adapt", __name__])
    return context


def _run(arguments: list[str], told: Path, prepare: Callable[[], Any]) -> None:
    # The loader of photos blocks them for its server.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    os.dup2(os.open(told, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    prepare()
    sys.exit(main(arguments))
