"""A callable that engines such as Ray Data and Daft send to their workers."""

import os
from functools import partial
from typing import Any

import pyarrow as pa

from microclip_deploy.bulk.table import Wanted, classify_table
from microclip_deploy.calibration import FOLDER
from microclip_deploy.paths import StrPath, as_path
from microclip_deploy.serving import Session, open_session


class Classifier:
    """Classifies tables of photos with a session of its own in each process.

    The session is opened with the first table and stays behind when the classifier is pickled, so
    one may be made anywhere and sent to workers.
    """

    def __init__(
        self,
        path: StrPath,
        device: str = "cpu",
        *,
        top_k: int = 5,
        batch_size: int = 64,
        embedding: bool = False,
        mask: bool = False,
        max_pixels: int | None = None,
        bit_depth: int | None = None,
        threads: int | None = None,
        prior: StrPath = FOLDER,
    ) -> None:
        """Keep what is needed; nothing is opened.

        Args:
            path: directory that `adapt` or `export` wrote, where the workers see it.
            device: as for `open_session`, like the last four.
            top_k: as for `classify_table`, like the next three.
            batch_size: of the model.
            embedding: add the column.
            mask: add the column.
            max_pixels: of a photo.
            bit_depth: of photos of 16 bits.
            threads: of a CPU; one session a process of a full machine wants few.
            prior: how frequent the classes are.

        Raises:
            UsageError: not a path, or `top_k` below 1.
        """
        Wanted(top_k)
        self._open = partial(
            open_session,
            as_path(path, "session"),
            device,
            max_pixels=max_pixels,
            bit_depth=bit_depth,
            threads=threads,
            prior=prior,
        )
        self._classify = partial(
            classify_table, top_k=top_k, batch_size=batch_size, embedding=embedding, mask=mask
        )
        self._opened: tuple[int, Session] | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Classify the photos of a table; raises as `open_session` and `classify_table`."""
        if self._opened is None or self._opened[0] != os.getpid():  # none, or a fork's parent's
            self._opened = os.getpid(), self._open()
        return self._classify(self._opened[1], table)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the session behind."""
        return {**vars(self), "_opened": None}
