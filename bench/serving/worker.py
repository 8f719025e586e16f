"""A process of its own that answers questions one after the other.

The clients have one, so that they share no interpreter lock with whoever is measured, and so has
the session that a server is held against.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from microclip_deploy.errors import EnvironmentProblem, MicroclipError

Asked = TypeVar("Asked")
Told = TypeVar("Told")

_PATIENCE_S = 20.0
"""So long a process may take to end."""


class Worker(Generic[Asked, Told]):
    """The parent's end."""

    def __init__(self, name: str, process: Any, pipe: Connection) -> None:
        """Keep the process and the way to it."""
        self._name, self._process, self._pipe = name, process, pipe

    @property
    def pid(self) -> int:
        """Number of the process."""
        return int(self._process.pid)

    def ask(self, question: Asked) -> Told:
        """Wait for an answer.

        Raises:
            MicroclipError: what the process raised, of the same class.
            EnvironmentProblem: it has died.
        """
        try:
            self._pipe.send(question)
            told: Told = self.told()
        except (EOFError, OSError) as error:
            self._process.join(_PATIENCE_S)
            raise EnvironmentProblem(
                f"{self._name}: expected an answer of its process, found that it has ended (exit "
                f"{self._process.exitcode}); see above, and run `microclip-deploy doctor`"
            ) from error
        return told

    def told(self) -> Any:
        """Return what the process says next; as `ask`."""
        said = self._pipe.recv()
        if isinstance(said, MicroclipError):
            raise said
        return said


@contextmanager
def worker(
    name: str,
    opening: Callable[..., AbstractContextManager[Callable[[Asked], Told]]],
    *given: Any,
) -> Iterator[Worker[Asked, Told]]:
    """Start a process, and end it with the block.

    Args:
        name: for messages.
        opening: a function of a module, called there; its context gives what answers.
        given: what it is called with.

    Raises:
        MicroclipError: opening fails.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share threads and locks
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, opening, given), daemon=True)
    process.start()
    theirs.close()
    try:
        opened: Worker[Asked, Told] = Worker(name, process, ours)
        try:
            opened.told()
        except EOFError as error:
            raise EnvironmentProblem(
                f"{name}: expected a process, found that it ended at its start; see above"
            ) from error
        yield opened
    finally:
        ours.close()  # the other end reads an end of file
        process.join(_PATIENCE_S)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(pipe: Connection, opening: Callable[..., Any], given: tuple[Any, ...]) -> None:
    try:
        with opening(*given) as answer:
            pipe.send(None)
            while True:
                question = pipe.recv()
                pipe.send(answer(question))
    except MicroclipError as error:
        pipe.send(error)
    except (EOFError, KeyboardInterrupt):
        pass  # the parent is done, or was interrupted and says so itself
