"""Shares and parts of a batch teach what the whole batch does, and no process waits for a dead one.

Most tests let threads stand for processes; few start real ones.
"""

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from microclip_deploy.adapt.boundary import Drift
from microclip_deploy.adapt.ranks import ALONE, Ranks, join
from microclip_deploy.adapt.reference import Support
from microclip_deploy.adapt.train_step import (
    AdaptConfig,
    Guide,
    Step,
    Views,
    make_optimizer,
    train_step,
)
from microclip_deploy.cli.main import main
from microclip_deploy.errors import EnvironmentProblem
from microclip_deploy.model.microclip import MicroCLIP
from tests.adapt.processes import begin
from tests.adapt.test_train_step import GOLDEN, build, views_of

# Float32 sums of B images in another order. AdamW divides a gradient by its own size, so what moves
# is bounded by the learning rate whatever the rounding, and where gradients are not all rounding
# stays near 1e-7 a step; found: 1.2e-7 in the weights, 8e-7 in the losses.
WEIGHT_ATOL = 2e-6
LOSS_RTOL = 1e-5
IMAGES = 6


class Board:
    """Where threads put the tensors that they add up."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.given: list[torch.Tensor] = [torch.empty(0)] * count


@dataclass(frozen=True)
class Threads(Ranks):
    """Ranks that are threads of this process."""

    board: Board = field(default_factory=lambda: Board(1))

    def _reduce(self, tensor: torch.Tensor, how: Any, group: Any = None) -> None:
        self.board.given[self.rank] = tensor.clone()
        self.board.barrier.wait()
        stacked = torch.stack(self.board.given)
        found = stacked.amax(0) if how == dist.ReduceOp.MAX else stacked.sum(0)
        self.board.barrier.wait()
        tensor.copy_(found)


def guide_of(model: MicroCLIP, step: int) -> Guide:
    """Return a made-up past of a batch: support, rates and a joint reading."""
    generator = torch.Generator().manual_seed(step)
    classes = len(model.classifier)

    def rows(count: int) -> torch.Tensor:
        return torch.rand(count, classes, generator=generator)

    support = Support((8 * rows(IMAGES)).softmax(dim=1), rows(IMAGES))
    expected, rates, joint = rows(1)[0], rows(classes), rows(IMAGES).softmax(dim=1)
    return Guide(
        expected / expected.sum(), joint, support, rates, Drift.none(classes, rates.device)
    )


def trained(
    ranks: Ranks, config: AdaptConfig, guided: bool, images: int = IMAGES
) -> tuple[MicroCLIP, list[Step]]:
    """Take four steps on this rank's share of the reference's batches."""
    golden: Any = np.load(GOLDEN)
    model, share = build(golden, torch.float32), ranks.share(images)
    optimizer = make_optimizer(model.trainable(), config)
    steps: list[Step] = []
    for number in range(4):
        views = Views(*(v[:images][share] for v in views_of(golden, number, torch.float32)))
        guide = guide_of(model, number) if guided else Guide()
        if guide.joint is not None and guide.support is not None:
            support = Support(*(part[:images] for part in guide.support))
            guide = guide._replace(joint=guide.joint[:images][share], support=support)
        average = steps[-1].losses.average.detach() if steps else None
        steps.append(
            train_step(
                model, optimizer, views, config, average=average, rate=1e-4,
                guide=guide, ranks=ranks, images=images,
            )
        )  # fmt: skip
    return model, steps


METHOD = AdaptConfig()
OWN = AdaptConfig(confidence=0.85, joint_share=0.1, fairness_prior="estimated", boundary=True)


def require_equal(
    found: tuple[MicroCLIP, list[Step]], expected: tuple[MicroCLIP, list[Step]]
) -> None:
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=LOSS_RTOL, atol=WEIGHT_ATOL)
        assert torch.equal(ours.chosen, theirs.chosen)
        if ours.kept is not None and theirs.kept is not None:
            assert torch.equal(ours.kept, theirs.kept)
        if ours.drift is not None:
            torch.testing.assert_close(ours.drift, theirs.drift, rtol=0, atol=1e-5)
    parameters = expected[0].trainable()
    for name, parameter in found[0].trainable().items():
        torch.testing.assert_close(parameter, parameters[name], rtol=0, atol=WEIGHT_ATOL)


@pytest.mark.parametrize(
    ("count", "images", "config"),
    [(2, 6, METHOD), (2, 6, OWN), (4, 5, OWN), (3, 2, OWN)],
    ids=["method", "own settings", "unequal shares", "more ranks than images"],
)
def test_shares_of_a_batch_teach_what_the_batch_does(
    count: int, images: int, config: AdaptConfig
) -> None:
    board, guided = Board(count), config is OWN
    ranks = [Threads(rank, count, board=board) for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(lambda one: trained(one, config, guided, images), ranks))
    expected = trained(ALONE, config, guided, images)
    if guided:
        kept = [step.kept.sum().item() for step in expected[1] if step.kept is not None]
        assert 0 < sum(kept) < 4 * images, "the threshold divides them"
    for found in results:
        require_equal(found, expected)
        for name, parameter in found[0].trainable().items():  # all move alike, to the bit
            assert torch.equal(parameter, results[0][0].trainable()[name])


@pytest.mark.parametrize("settings", [{"micro_batch": 4}, {"micro_batch": 1}])
@pytest.mark.parametrize("config", [METHOD, OWN], ids=["method", "own settings"])
def test_parts_of_a_batch_teach_what_the_batch_does(
    config: AdaptConfig, settings: dict[str, Any]
) -> None:
    found = trained(ALONE, config.model_copy(update=settings), config is OWN)
    require_equal(found, trained(ALONE, config, config is OWN))


def test_checkpointing_changes_no_bit(
    finished: Path, tmp_path: Path, often: Callable[..., list[str]]
) -> None:
    again = often(tmp_path / "run", "--set", "adapt.checkpointing=true")
    assert main(again) == 0
    assert (tmp_path / "run/weights.safetensors").read_bytes() == (
        finished / "weights.safetensors"
    ).read_bytes()


# ------------------------------------------------------------------------------ memory


@pytest.fixture(scope="module")
def often(adapt_into: Callable[[Path], list[str]]) -> Callable[..., list[str]]:
    """Return what makes the command line of a run whose last batch is a partial one."""
    graph = ["--set", "ncut.affinity=centered_cosine", "--batch-size", "7"]
    own = ["boundary=true", "fairness_prior=estimated", "joint_share=0.1", "confidence=0.4"]
    sets = [part for setting in own for part in ("--set", f"adapt.{setting}")]
    weight = ["--set", "adapt.fairness_weight=1"]
    return lambda out, *more: [*adapt_into(out), *graph, *sets, *weight, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, often: Callable[..., list[str]]) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(often(out)) == 0
    return out


def short_of_memory(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """Let the model, where it learns, hold so many images and no more."""
    forward = MicroCLIP.forward

    def limited(self: MicroCLIP, pixels: torch.Tensor) -> Any:
        if len(pixels) > images and self.training is False and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, pixels)

    monkeypatch.setattr(MicroCLIP, "forward", limited)


def require_equal_runs(run: Path, other: Path) -> None:
    """Compare what two runs learnt: weights, losses, and the pseudo-label of every photo."""
    found, expected = (load_file(newest(each)) for each in (run, other))
    for name, tensor in expected.items():
        if name.startswith("model."):
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=WEIGHT_ATOL)
    assert (run / "pseudo-labels.csv").read_bytes() == (other / "pseudo-labels.csv").read_bytes()
    for line, wanted in zip(history(run), history(other), strict=True):
        assert line["kept"] == wanted["kept"]
        assert line["loss"] == pytest.approx(wanted["loss"], rel=LOSS_RTOL)


def newest(run: Path) -> Path:
    return max((run / "state").glob("*.safetensors"))


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def test_memory_that_runs_out_halves_what_is_looked_at_in_one_go(
    tmp_path: Path,
    finished: Path,
    often: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    short_of_memory(monkeypatch, 2)
    assert main(often(tmp_path / "run", "--batch-size", "7")) == 0
    told = [record.getMessage() for record in caplog.records]
    assert ["7 images at a time; from here on 4" in told[0], len(told)] == [True, 2]
    assert "adapt.micro_batch=2" in told[1]
    require_equal_runs(tmp_path / "run", finished)


def test_one_process_out_of_memory_lets_all_start_again() -> None:
    board = Board(2)

    def lacking(rank: int) -> int:
        if rank:
            raise torch.OutOfMemoryError("CUDA out of memory: tried")
        return rank

    def told(rank: int) -> str:
        with pytest.raises(torch.OutOfMemoryError) as error:
            Threads(rank, 2, board=board).together(lambda: lacking(rank))
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(told, range(2))) == [
            "another process is out of memory",
            "CUDA out of memory: tried",
        ]


def test_memory_for_no_image_is_an_error_that_says_what_to_do(
    tmp_path: Path,
    often: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short_of_memory(monkeypatch, 0)
    assert main(often(tmp_path / "run", "--batch-size", "auto")) == 4
    assert "adapt.checkpointing=true" in capsys.readouterr().err


# ------------------------------------------------------------------------------ processes


class Rank(NamedTuple):
    """A process of those that adapt together."""

    process: ForkServerProcess
    told: Path
    """What it says on stderr."""


Start = Callable[[list[str], int], list[Rank]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Give what starts processes with the variables of torchrun; none outlives the test."""
    with ExitStack() as stack:

        def starting(arguments: list[str], count: int) -> list[Rank]:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
            begun = []
            for rank in map(str, range(count)):
                own, told = {"RANK": rank, "LOCAL_RANK": rank}, tmp_path / f"rank-{rank}.txt"
                process = begin(arguments, told, partial(launched, {**meeting, **own}))
                stack.callback(process.kill)
                begun.append(Rank(process, told))
            return begun

        yield starting


def launched(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def ended(ranks: list[Rank]) -> tuple[list[int | None], list[str]]:
    """Return exit codes and what was said on stderr; nothing may take minutes."""
    for rank in ranks:
        rank.process.join(400)
    return [rank.process.exitcode for rank in ranks], [rank.told.read_text() for rank in ranks]


def test_two_processes_learn_what_one_does(
    tmp_path: Path, finished: Path, often: Callable[..., list[str]], start: Start
) -> None:
    codes, told = ended(start(often(tmp_path / "run"), 2))
    assert codes == [0, 0], told
    assert "processes: 2" in told[0]
    assert told[1] == ""
    require_equal_runs(tmp_path / "run", finished)


def test_a_run_goes_on_with_other_numbers_of_processes(
    tmp_path: Path, finished: Path, often: Callable[..., list[str]], start: Start
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    arguments = often(run, "--resume")
    for path in (run / "manifest.json", *(run / "state").iterdir()):
        path.unlink()
    (run / "history.jsonl").unlink()
    for count, until in ((2, 2), (1, 5), (2, 8)):
        processes = start([*arguments, "--save-every", "1"], count)
        wait_for(run / f"state/step-{until:09d}.json", processes)
        processes[-1].process.terminate()
        codes, told = ended(processes)
        assert set(codes) == ({0} if until == 8 else {128 + signal.SIGTERM}), told
    require_equal_runs(run, finished)


def wait_for(path: Path, processes: list[Rank]) -> None:
    """Wait for a file, or for processes that end without it."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and not path.exists() and processes[0].process.is_alive():
        time.sleep(0.001)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_process_ends_the_other(
    tmp_path: Path, often: Callable[..., list[str]], start: Start, victim: int
) -> None:
    run = tmp_path / "run"
    processes = start(often(run, "--epochs", "1000", "--save-every", "4"), 2)
    wait_for(run / "state/step-000000004.json", processes)
    processes[victim].process.kill()
    codes, told = ended(processes)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 4, told
    assert "continue with --resume" in told[1 - victim]


def test_one_gpu_for_all_processes_is_refused(
    often: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main(often(tmp_path / "run", "--device", "cuda:3")) == 2
    assert "CUDA_VISIBLE_DEVICES" in capsys.readouterr().err
    monkeypatch.setenv("MASTER_PORT", "none")
    with pytest.raises(EnvironmentProblem, match="process 1 of 2"):
        join("cpu")
