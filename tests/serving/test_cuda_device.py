"""What only a CUDA device can show of the CUDA session. Run with: python -m pytest -m gpu"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from microclip_deploy.bench.latency import device_time
from microclip_deploy.errors import EnvironmentProblem, UsageError
from microclip_deploy.serving import Prediction, Session, open_session
from microclip_deploy.serving.cuda_session import CudaSession
from microclip_deploy.serving.onnx_graph import has_cuda
from microclip_deploy.serving.torch_session import TorchSession

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or find_spec("cupy") is None,
        reason="no CUDA device, or no cupy; run `pytest -m gpu` where there are both",
    ),
]

SIDE = 32

# Logits are 100 times a cosine: 5e-5 is four units in the last place of a cosine in float32.
LOGITS, COSINES = 5e-5, 5e-6


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return bright rectangles on noise: their graphs are cut where it is well determined."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 80, (count, SIDE, SIDE, 3), dtype=np.uint8)
    for image in pixels:
        top, left = rng.integers(0, SIDE // 2, 2)
        image[top : top + 14, left : left + 14, rng.integers(3)] += 150
    return pixels


def assert_like(found: Prediction, wanted: Prediction) -> None:
    np.testing.assert_array_equal(found.mask, wanted.mask)
    np.testing.assert_array_equal(found.complete, wanted.complete)
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=LOGITS)
    for name in ("cls", "fg", "attention"):
        one, other = getattr(found, name), getattr(wanted, name)
        np.testing.assert_allclose(one, other, rtol=0, atol=COSINES, err_msg=name)


@pytest.fixture
def reference(finished_run: Path) -> Iterator[TorchSession]:
    with TorchSession.open(finished_run, "cuda") as session:
        yield session


@pytest.fixture(params=["run", "export"])
def open_one(
    request: pytest.FixtureRequest, finished_run: Path, tiny_export: Path
) -> Callable[[], Session]:
    """Return what opens a session of either encoder."""
    if request.param == "run":
        return lambda: open_session(finished_run, "cuda")
    if not has_cuda():
        pytest.skip("this onnxruntime has no CUDAExecutionProvider; install onnxruntime-gpu")
    return lambda: open_session(tiny_export, "cuda")


def test_any_batch_is_answered_like_pytorch(
    open_one: Callable[[], Session], reference: TorchSession
) -> None:
    with open_one() as session:
        assert isinstance(session, CudaSession)
        assert session.device == "cuda:0"
        for count in (1, 3, 8, 70):
            assert_like(session.predict(images(count)), reference.predict(images(count)))


def test_replayed_graphs_see_new_images(
    open_one: Callable[[], Session], reference: TorchSession
) -> None:
    with open_one() as session:
        for seed in range(5):
            batch = images(4, seed)
            assert_like(session.predict(batch), reference.predict(batch))


def test_the_same_work_without_a_graph_and_by_stage(
    open_one: Callable[[], Session], reference: TorchSession
) -> None:
    batch = images(4)
    with open_one() as session:
        assert isinstance(session, CudaSession)
        pipeline: Any = session.pipeline
        pipeline.pixels(4)[:] = batch
        assert_like(device_time.run_eagerly(pipeline, 4), reference.predict(batch))
        timing = device_time.time_run(pipeline, 4)
        assert 0 < timing.host < 1
        assert 0 < timing.device < 1
        stages = device_time.time_stages(pipeline, 4, 3)
        assert [*stages] == ["H2D", "backbone", "K1", "K2", "K3/head", "D2H"]
        assert all(len(samples) == 3 and min(samples) > 0 for samples in stages.values())
        assert_like(session.predict(batch), reference.predict(batch))  # nothing was left behind


def test_two_sessions_on_two_threads_do_not_meet(
    open_one: Callable[[], Session], reference: TorchSession
) -> None:
    batches = [images(1 + seed % 6, seed) for seed in range(24)]
    with open_one() as one, open_one() as other, ThreadPoolExecutor(2) as pool:
        found = pool.map(
            lambda job: job[0].predict(job[1]), zip([one, other] * 12, batches, strict=True)
        )
        for answer, batch in zip(found, batches, strict=True):
            assert_like(answer, reference.predict(batch))


def test_one_session_serves_several_threads(
    open_one: Callable[[], Session], reference: TorchSession
) -> None:
    batches = [images(1 + seed % 6, seed) for seed in range(24)]
    with open_one() as session:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(session.predict, batches))
        # Graphs outlive the threads that captured them.
        for answer, batch in zip(found, batches, strict=True):
            assert_like(answer, reference.predict(batch))
            assert_like(session.predict(batch), reference.predict(batch))


def test_a_closed_session_keeps_no_buffers(open_one: Callable[[], Session]) -> None:
    session = open_one()
    assert isinstance(session, CudaSession)
    pool = session._pipeline._pool  # type: ignore[union-attr]  # of the pipeline on a device
    session.predict(images(64))
    assert pool.total_bytes()
    session.close()
    session.close()
    assert not pool.total_bytes()
    with pytest.raises(UsageError, match="found it closed"):
        session.predict(images(1))


OPENED_AGAIN_AND_AGAIN = f"""
import sys
from pathlib import Path

import numpy as np

from microclip_deploy.serving import open_session

images = np.zeros((3, {SIDE}, {SIDE}, 3), np.uint8)
for _ in range(10):
    with open_session(Path(sys.argv[1]), "cuda") as session:
        for _ in range(30):
            session.predict(images)
left_open = open_session(Path(sys.argv[1]), "cuda")
left_open.predict(images)
"""


@pytest.mark.parametrize("artifact", ["finished_run", "tiny_export"])
def test_a_process_survives_its_sessions(artifact: str, request: pytest.FixtureRequest) -> None:
    """A thread of the driver that frees a session's memory aborts the process, most times."""
    if artifact == "tiny_export" and not has_cuda():
        pytest.skip("this onnxruntime has no CUDAExecutionProvider; install onnxruntime-gpu")
    call = [sys.executable, "-c", OPENED_AGAIN_AND_AGAIN, request.getfixturevalue(artifact)]
    told = subprocess.run(call, capture_output=True, text=True, check=False, timeout=300)
    assert told.returncode == 0, told.stderr
    assert "No registered plugin EP device" not in told.stderr


def test_a_session_survives_a_full_device(
    open_one: Callable[[], Session], reference: TorchSession
) -> None:
    with open_one() as session:
        assert isinstance(session, CudaSession)
        first = session.predict(images(1))
        pool = session._pipeline._pool  # type: ignore[union-attr]  # of the pipeline on a device
        pool.set_limit(size=pool.total_bytes())
        with pytest.raises(EnvironmentProblem, match=r"out of memory.*lower --batch-size"):
            session.predict(images(64))
        np.testing.assert_array_equal(session.predict(images(1)).logits, first.logits)
        pool.set_limit(size=0)
        assert_like(session.predict(images(64)), reference.predict(images(64)))
