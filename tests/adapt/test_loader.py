"""Batches depend on seed and epoch alone: not on workers, interruptions or earlier batches."""

import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from microclip_deploy.adapt.loader import AdaptImages, Batch
from microclip_deploy.adapt.ranks import Ranks
from microclip_deploy.adapt.views import ViewConfig, make_views, view_generator
from microclip_deploy.data.decode import read_image
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import DataError, EnvironmentProblem, UsageError

SIZE = 16
COUNT = 11
CLIP = Preprocess(size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
VIEWS = ViewConfig(crops=3)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    found = [folder / f"{i}.png" for i in range(COUNT)]
    for path in found:
        height, width = rng.integers(20, 40, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    return found


def adapt_images(paths: list[Path], seed: int = 7) -> AdaptImages:
    return AdaptImages(paths, CLIP, VIEWS, seed)


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(x, y)
        for a, b in zip(first, second, strict=True)
        for x, y in zip(a, b, strict=True)
    )


def test_every_image_comes_once_and_the_last_batch_is_smaller(paths: list[Path]) -> None:
    images = adapt_images(paths)
    batches = list(images.epoch(0, 4))
    assert [len(batch.indices) for batch in batches] == [4, 4, 3]
    assert images.iterations(4) == 3
    assert images.iterations(11) == images.iterations(64) == 1
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(COUNT))


def test_shares_of_a_batch_are_the_batch(paths: list[Path]) -> None:
    images, count = adapt_images(paths), 4  # the last batch has 3 images
    shares = [list(images.epoch(1, 4, ranks=Ranks(rank, count))) for rank in range(count)]
    for number, batch in enumerate(images.epoch(1, 4)):
        parts = [share[number] for share in shares]
        for name in ("weak", "strong", "crops", "indices"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(batch, name))
        assert all(torch.equal(part.whole, batch.indices) for part in parts)


def test_batches_are_contiguous_uint8_channels_first(paths: list[Path]) -> None:
    batch = next(adapt_images(paths).epoch(0, 4))
    assert batch.weak.shape == batch.strong.shape == (4, 3, SIZE, SIZE)
    assert batch.crops.shape == (4, 3, 3, SIZE, SIZE)
    assert batch.weak.dtype == batch.strong.dtype == batch.crops.dtype == torch.uint8
    assert batch.indices.dtype == torch.int64
    assert all(tensor.is_contiguous() for tensor in batch)


def test_batches_hold_the_views_of_their_images(paths: list[Path]) -> None:
    batch = next(adapt_images(paths).epoch(2, 4))
    for row, index in enumerate(batch.indices.tolist()):
        rng = view_generator(7, 2, index)
        expected = make_views(read_image(paths[index]), rng, CLIP, VIEWS)
        np.testing.assert_array_equal(batch.weak[row].permute(1, 2, 0).numpy(), expected.weak)
        np.testing.assert_array_equal(batch.strong[row].permute(1, 2, 0).numpy(), expected.strong)
        np.testing.assert_array_equal(batch.crops[row].permute(0, 2, 3, 1).numpy(), expected.crops)


def test_batches_are_the_same_with_0_1_and_2_workers(paths: list[Path]) -> None:
    images = adapt_images(paths)
    alone = list(images.epoch(1, 4))
    assert equal(list(images.epoch(1, 4, workers=1)), alone)
    assert equal(list(images.epoch(1, 4, workers=2)), alone)


def test_epoch_can_be_entered_at_any_iteration(paths: list[Path]) -> None:
    images = adapt_images(paths)
    whole = list(images.epoch(3, 4))
    for start in range(4):
        assert equal(list(images.epoch(3, 4, start_iteration=start)), whole[start:])
    assert equal(list(images.epoch(3, 4, start_iteration=1, workers=1)), whole[1:])


def test_order_changes_with_epoch_and_seed(paths: list[Path]) -> None:
    first = adapt_images(paths).order(0).tolist()
    assert first == np.random.default_rng([7, 0]).permutation(COUNT).tolist()
    assert first != adapt_images(paths).order(1).tolist()
    assert first != adapt_images(paths, seed=8).order(0).tolist()


def test_global_generators_are_left_as_they_were(paths: list[Path]) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = (torch.rand(1), random.random(), np.random.random())
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    list(adapt_images(paths).epoch(0, 4))
    assert (torch.rand(1), random.random(), np.random.random()) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_became_unreadable_is_an_error_with_its_name(
    paths: list[Path], tmp_path: Path, workers: int
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    images = adapt_images([*paths, broken])
    with pytest.raises(DataError) as caught:
        list(images.epoch(0, 4, workers=workers))
    told = str(caught.value)
    assert told.startswith(f"{broken}: ")
    assert "the file is empty" in told
    assert "put it back at this path and continue with --resume" in told
    assert "remove" not in told
    assert "Traceback" not in told


def worker_pids() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid]


def test_workers_leave_interrupts_to_the_main_process(paths: list[Path]) -> None:
    batches = adapt_images(paths).epoch(0, 1, workers=1)
    received = [next(batches)]
    for pid in worker_pids():
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    received.extend(batches)
    assert len(received) == COUNT


def test_killed_worker_is_an_environment_problem(paths: list[Path]) -> None:
    batches = adapt_images(paths * 50).epoch(0, 1, workers=1)
    next(batches)
    (pid,) = worker_pids()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EnvironmentProblem, match="expected them to run until the end"):
        list(batches)


@pytest.mark.parametrize("start", [-1, 4])
def test_start_beyond_the_epoch_is_a_usage_error_at_once(paths: list[Path], start: int) -> None:
    with pytest.raises(UsageError, match="start iteration: expected 0 to 3"):
        adapt_images(paths).epoch(0, 4, start_iteration=start)


def test_no_paths_negative_seed_and_empty_batches_are_refused(paths: list[Path]) -> None:
    with pytest.raises(DataError, match="expected at least one"):
        adapt_images([])
    with pytest.raises(UsageError, match="seed: expected at least 0"):
        adapt_images(paths, seed=-1)
    with pytest.raises(UsageError, match="batch size: expected at least 1"):
        adapt_images(paths).epoch(0, 0)
