"""Image paths -> shuffled batches of random views, the input of adaptation.

    order of epoch e       permutation from Generator([seed, e])
    views of image i       Generator([seed, e, i + 1]), see views.view_generator

Nothing random depends on workers or on earlier batches, so an epoch can be entered at any iteration
and continues exactly. Batches are uint8: a quarter of the memory traffic of float32, normalised on
the device by `Preprocess.normalize`. With `views.device = "model"` whole photos are sent instead,
and the views are cut on the device (`device_views`).

Worker processes are started from a clean server process, never forked from this one: by then it
holds threads and perhaps a CUDA context, and a forked copy of a held lock is never released. They
ignore the interrupt signals, which a terminal or a service manager sends to all processes at once;
this process decides what to do and stops them.
"""

import math
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from microclip_deploy.adapt.device_views import PhotoBatch, WholePhoto
from microclip_deploy.adapt.ranks import ALONE, Ranks
from microclip_deploy.adapt.views import ViewConfig, Views, make_views, view_generator
from microclip_deploy.data.decode import BadImage, read_photo
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError, EnvironmentProblem, UsageError, printable
from microclip_deploy.paths import Paths


class Batch(NamedTuple):
    """Views of B images, on the CPU and contiguous, or where `views.device` has them cut."""

    weak: torch.Tensor
    """uint8 (B, 3, S, S)"""
    strong: torch.Tensor
    """uint8 (B, 3, S, S)"""
    crops: torch.Tensor
    """uint8 (B, V, 3, S, S)"""
    indices: torch.Tensor
    """int64 (B,), positions of the images in the paths given."""
    whole: torch.Tensor
    """int64: positions of all images of the batch, of which several processes have shares; equal to
    `indices` where one has all."""


class AdaptImages:
    """The training images: unlabelled by construction, as only paths come in."""

    def __init__(
        self,
        paths: Sequence[Path],
        preprocess: Preprocess,
        views: ViewConfig,
        seed: int,
    ) -> None:
        """Keep what defines every batch.

        Args:
            paths: images that `check_images` found good.
            preprocess: reads the photos as it was for `check_images`; gives side S and resizing.
            views: what the views look like.
            seed: >= 0.

        Raises:
            DataError: no paths.
            UsageError: a negative seed.
        """
        if not paths:
            raise DataError("images: expected at least one, found none; give a folder with images")
        if seed < 0:
            raise UsageError(f"seed: expected at least 0, found {seed}; give another")
        self.paths = paths if isinstance(paths, Paths) else Paths(map(str, paths))
        self.preprocess = preprocess
        self.views = views
        self.seed = seed

    def iterations(self, batch_size: int) -> int:
        """Return the number of batches per epoch; the last, smaller one is kept.

        Raises:
            UsageError: `batch_size` < 1.
        """
        if batch_size < 1:
            raise UsageError(f"batch size: expected at least 1, found {batch_size}; give another")
        return math.ceil(len(self.paths) / batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the image positions of an epoch in the order they are used: int64 (n,)."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.paths))

    def epoch(
        self,
        epoch: int,
        batch_size: int,
        start_iteration: int = 0,
        workers: int = 0,
        ranks: Ranks = ALONE,
        device: torch.device | str = "cpu",
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch, or this process's share of each, from any iteration on.

        Args:
            epoch: >= 0.
            batch_size: B; the last batch may be smaller.
            start_iteration: first batch to yield, 0 <= start <= iterations.
            workers: processes that decode; 0 decodes in this one.
            ranks: the processes that share each batch.
            device: the model's, where views are cut if `views.device` says so.

        Raises:
            DataError: a file became unreadable after it was checked. It is never replaced, because
                the results would then depend on when it happened.
            EnvironmentProblem: a worker process was killed, an object store cannot be reached, or
                the device has no memory for the views.
            UsageError: a value out of range.
        """
        count = self.iterations(batch_size)
        if not 0 <= start_iteration <= count:
            raise UsageError(
                f"start iteration: expected 0 to {count}, found {start_iteration}; "
                f"resume with the batch size the run was started with"
            )
        order = self.order(epoch).tolist()
        begins = range(start_iteration * batch_size, len(order), batch_size)
        batches = [order[begin : begin + batch_size] for begin in begins]
        mine = [rows[ranks.share(len(rows))] for rows in batches]
        # A process without a share reads an image all the same: its views have their shape.
        wanted = [own or rows[:1] for own, rows in zip(mine, batches, strict=True)]
        loaded = (self._batch(found, device) for found in self.loaded(epoch, wanted, workers))
        return (
            Batch(*(part[: len(own)] for part in batch))._replace(whole=torch.tensor(rows))
            for batch, own, rows in zip(loaded, mine, batches, strict=True)
        )

    def loaded(
        self, epoch: int, batches: Sequence[list[int]], workers: int = 0
    ) -> Iterator["Batch | PhotoBatch"]:
        """Yield batches as the loading processes send them; see `epoch`.

        Args:
            epoch: >= 0.
            batches: positions of the images of each.
            workers: processes that decode.
        """
        loader = DataLoader(
            _EpochViews(self, epoch),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_ignore_interrupts,
            multiprocessing_context=_worker_context() if workers else None,
            # The loader draws a seed for its workers; not from the global generator, whose state
            # belongs to the model.
            generator=torch.Generator(),
        )
        return _checked(loader)

    def _batch(self, loaded: "Batch | PhotoBatch", device: torch.device | str) -> Batch:
        """Return the views of what was loaded."""
        if isinstance(loaded, Batch):
            return loaded
        try:
            views, indices = loaded.to(device).views(self.preprocess), loaded.indices
        except torch.OutOfMemoryError as error:  # smaller parts of the step would not help
            raise EnvironmentProblem(
                f"{device}: out of memory while views are cut; free memory of it and continue with "
                "--resume, or start again with a lower --batch-size or --set views.device=cpu"
            ) from error
        return Batch(views[:, 0], views[:, 1], views[:, 2:], indices, indices)


class _Unreadable(NamedTuple):
    """A failure as a value: torch would re-raise it as text with the worker's traceback."""

    path: str
    reason: str


class _Unreachable(NamedTuple):
    """A store that cannot be reached; another try may."""

    message: str


class _Sample(NamedTuple):
    """The outcome for one image."""

    position: int
    views: Views | WholePhoto | _Unreadable | _Unreachable


class _EpochViews(Dataset[_Sample]):
    """Views of single images in one epoch; sent to each worker when it starts."""

    def __init__(self, images: AdaptImages, epoch: int) -> None:
        # Text: a million Path objects take seconds to send, per worker and epoch.
        self._files = images.paths.texts
        self._preprocess = images.preprocess
        self._views = images.views
        self._seed = images.seed
        self._epoch = epoch

    def __getitem__(self, index: int) -> _Sample:
        try:
            image = read_photo(Path(self._files[index]), self._preprocess.photos).image
        except BadImage as error:
            return _Sample(index, _Unreadable(self._files[index], error.reason))
        except EnvironmentProblem as error:
            return _Sample(index, _Unreachable(str(error)))
        rng = view_generator(self._seed, self._epoch, index)
        if self._views.device == "model":
            return _Sample(index, WholePhoto.of(image, rng, self._preprocess, self._views))
        return _Sample(index, make_views(image, rng, self._preprocess, self._views))


def _collate(samples: list[_Sample]) -> Batch | PhotoBatch | _Unreadable | _Unreachable:
    """Stack samples channels first; the first failure stands for the whole batch."""
    views: list[Views] = []
    photos: list[WholePhoto] = []
    for sample in samples:
        if isinstance(sample.views, (_Unreadable, _Unreachable)):
            return sample.views
        if isinstance(sample.views, WholePhoto):
            photos.append(sample.views)
        else:
            views.append(sample.views)
    positions = torch.tensor([sample.position for sample in samples], dtype=torch.int64)
    if photos:
        return PhotoBatch.of(photos, positions)

    def stacked(arrays: list[NDArray[np.uint8]]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.stack(arrays), -1, -3)))

    return Batch(
        weak=stacked([view.weak for view in views]),
        strong=stacked([view.strong for view in views]),
        crops=stacked([view.crops for view in views]),
        indices=positions,
        whole=positions,
    )


def _checked(
    batches: Iterable[Batch | PhotoBatch | _Unreadable | _Unreachable],
) -> Iterator[Batch | PhotoBatch]:
    """Yield the batches; turn failures in workers into errors a user can act on."""
    try:
        for batch in batches:
            if isinstance(batch, _Unreadable):
                raise lost(batch.path, batch.reason)
            if isinstance(batch, _Unreachable):
                raise EnvironmentProblem(batch.message)
            yield batch
    except (EOFError, OSError, RuntimeError) as error:
        # Depending on the moment, torch notices a killed worker or its connection just breaks.
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise EnvironmentProblem(
            f"image workers: expected them to run until the end, "
            f"found: {error or 'a broken connection'}; use fewer workers, "
            f"or give the container more memory and /dev/shm (docker run --shm-size=8g)"
        ) from error


def lost(path: str | Path, reason: str) -> DataError:
    """Return the error of an image that was good when the run began."""
    return DataError(
        f"{printable(path)}: expected the image that was checked when the run began, found "
        f"a file that cannot be used ({reason}); the run depends on it: put it back at this "
        "path and continue with --resume, or start again with --overwrite"
    )


def refuse_lost(_: int, error: BadImage) -> NoReturn:
    """Raise `lost` for an image that `read_batches` cannot read."""
    raise lost(error.path, error.reason) from error


def _worker_context() -> BaseContext:
    """Return how worker processes are started; runs the server process the first time."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports torch and timm once; each worker is then a cheap fork of it.
    context.set_forkserver_preload([__name__])
    interrupts = {signal.SIGINT, signal.SIGTERM}
    # The mask, unlike a handler, is inherited by the server and so protects it as well; a signal
    # that arrives meanwhile stays pending for this process and is not lost.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, interrupts)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return context


def _ignore_interrupts(_worker: int) -> None:
    """Leave interrupts to the main process, also where workers are spawned."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
