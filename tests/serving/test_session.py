"""What every session refuses, whatever runs behind it."""

import copy
import gc
import logging
import os
import pickle
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from microclip_deploy import Session, open_session
from microclip_deploy.errors import CheckpointError, DataError, EnvironmentProblem, UsageError
from microclip_deploy.serving import torch_session
from microclip_deploy.serving.torch_session import resolve_device

# Python 3.12 and later warn of what some tests do here.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

SIDE = 32
IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["run", "export"])
def artifact_dir(request: pytest.FixtureRequest, finished_run: Path, tiny_export: Path) -> Path:
    """Return what is served by PyTorch, and what by ONNX Runtime."""
    return finished_run if request.param == "run" else tiny_export


@pytest.fixture(scope="module")
def session(artifact_dir: Path) -> Iterator[Session]:
    with open_session(artifact_dir, threads=1) as session:
        yield session


USES: list[Callable[[Session], object]] = [
    lambda session: session.predict(IMAGES),
    lambda session: session.predict_photos([]),
    lambda session: session.classify("a.jpg"),
    lambda session: session.__enter__(),
]


def test_a_closed_session_says_so(artifact_dir: Path) -> None:
    session = open_session(artifact_dir)
    session.close()
    session.close()
    for use in USES:
        with pytest.raises(UsageError, match="found it closed; open it again"):
            use(session)


def test_a_session_stays_in_its_process(session: Session) -> None:
    for send in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(UsageError, match="open another one in each process"):
            send(session)


@needs_fork
@pytest.mark.parametrize("use", USES)
def test_a_fork_is_refused_and_leaves_the_session_to_its_parent(
    artifact_dir: Path, use: Callable[[Session], object]
) -> None:
    session = open_session(artifact_dir)

    def told() -> str:
        try:
            use(session)
        except UsageError as error:
            return str(error)
        finally:
            session.close()
        return ""

    assert re.search(r"found a fork of it \(\d+\).*; open it after the fork", in_a_fork(told))
    assert session.predict(IMAGES).logits.shape == (3, 3)


@needs_fork
def test_a_fork_opens_a_session_of_its_own(session: Session, artifact_dir: Path) -> None:
    wanted = session.predict(IMAGES).logits.argmax(axis=1).tolist()

    def told() -> str:
        with open_session(artifact_dir) as own:
            return str(own.predict(IMAGES).logits.argmax(axis=1).tolist())

    assert in_a_fork(told) == str(wanted)


@needs_fork
def test_a_fork_may_let_go_of_what_it_inherited(artifact_dir: Path) -> None:
    sessions = [open_session(artifact_dir, threads=2)]
    sessions[0].predict(IMAGES)

    def told() -> str:
        sessions.clear()
        gc.collect()
        return "still there"

    assert in_a_fork(told) == "still there"


def in_a_fork(told: Callable[[], str]) -> str:
    """Return what a forked process tells; it ends without a word to pytest."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a fork that hangs
        try:
            os.write(writer, told().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


def test_one_session_serves_several_threads(session: Session) -> None:
    wanted = session.predict(IMAGES).logits
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(session.predict, [IMAGES] * 16):
            np.testing.assert_array_equal(found.logits, wanted)


def test_arrays_of_every_layout_are_taken_as_they_look(session: Session) -> None:
    wanted = session.predict(IMAGES).logits
    read_only = IMAGES.copy()
    read_only.flags.writeable = False
    given: list[Any] = [
        np.asfortranarray(IMAGES),
        read_only,
        torch.from_numpy(IMAGES),
        list(IMAGES),
    ]
    for images in given:
        np.testing.assert_array_equal(session.predict(images).logits, wanted)


@pytest.mark.parametrize(("wrong", "found", "remedy"), [
    (IMAGES.astype(np.float32) / 255, r"float32 \(3, 32, 32, 3\)", "whole numbers from 0 to 255"),
    (torch.zeros(1, 3, SIDE, SIDE), r"float32 \(1, 3, 32, 32\)", "whole numbers from 0 to 255"),
    (torch.zeros(1, SIDE, SIDE, 3, requires_grad=True), "Tensor: ", "give a NumPy array"),
    (IMAGES.transpose(0, 3, 1, 2), r"uint8 \(3, 3, 32, 32\)", r"images.transpose\(0, 2, 3, 1\)"),
    (IMAGES[0], r"uint8 \(32, 32, 3\)", r"images\[None\]"),
    (IMAGES[:0], r"uint8 \(0, 32, 32, 3\)", "at least one image"),
    ([], r"float64 \(0,\)", "Preprocess.test_view"),
    (IMAGES[:, :16], r"uint8 \(3, 16, 32, 3\)", "32 x 32 pixels"),
    ([IMAGES[0], IMAGES[0, :16]], "list: ", "give a NumPy array"),
    ("a.jpg", "str", "Preprocess.test_view"),
    ([Path("a.jpg")], "list", "Preprocess.test_view"),
    (None, "NoneType", "Preprocess.test_view"),
])  # fmt: skip
def test_wrong_arrays_are_explained(session: Session, wrong: Any, found: str, remedy: str) -> None:
    told = rf"expected uint8 \(B, 32, 32, 3\) with B of at least 1, found {found}.*; .*{remedy}"
    with pytest.raises(DataError, match=told):
        session.predict(wrong)


@pytest.mark.parametrize("wrong", [[], None, "a.jpg", Image.new("RGB", (8, 8)), IMAGES, IMAGES[:0]])
def test_decoded_photos_are_a_list(session: Session, wrong: Any) -> None:
    with pytest.raises(DataError, match=r"expected a list of at least one, .*use `classify`"):
        session.predict_photos(wrong)


@pytest.mark.parametrize("wrong", ["a.jpg", None, IMAGES[0], Image.new("L", (8, 8))])
def test_what_is_no_photo_is_explained(session: Session, wrong: Any) -> None:
    for use in (session.preprocess.test_view, lambda photo: session.predict_photos([photo])):
        with pytest.raises(DataError, match=r"expected mode RGB, found .*with read_image"):
            use(wrong)


@pytest.mark.parametrize("wrong", ["a.jpg", None, [1]])
def test_what_is_no_array_is_explained(session: Session, wrong: Any) -> None:
    with pytest.raises(DataError, match=r"expected an array, found .*Preprocess.test_view"):
        session.preprocess.normalize(wrong)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", 10**6])
def test_what_is_no_number_of_threads_is_refused(artifact_dir: Path, threads: Any) -> None:
    with pytest.raises(UsageError, match="expected a whole number from 1 to 1024"):
        open_session(artifact_dir, threads=threads)


@pytest.mark.parametrize(("threads", "allowed", "used"), [(3, 1, 3), (None, 1, 1), (None, 4, 2)])
def test_pytorch_computes_with_the_threads_asked_for_or_allowed(
    finished_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: int | None,
    allowed: int,
    used: int,
) -> None:
    set_to: list[int] = [2]
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: set_to[-1])
    monkeypatch.setattr(torch_session, "usable_cpus", lambda: allowed)
    open_session(finished_run, threads=threads).close()
    assert set_to[-1] == used


def test_pytorch_has_one_thread_in_a_fork_of_a_process_that_served(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_session, "_first_process", lambda: os.getpid() + 1)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    with caplog.at_level(logging.WARNING):
        open_session(finished_run, threads=2).close()
    assert set_to == [1]
    assert "spawn" in caplog.text


def test_cuda_is_refused_in_a_fork_of_a_process_that_used_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(EnvironmentProblem, match=r"found such a fork; .*spawn"):
        resolve_device("cuda:0")


def test_other_places_are_named_with_the_way_to_an_artifact(
    finished_run: Path, tiny_export: Path, photos: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    (runs / "birds").mkdir(parents=True)
    (runs / "birds" / "manifest.json").touch()
    (tmp_path / "empty").mkdir()
    for wrong, told in (
        (tiny_export / "full.onnx", f"found a file inside of one; give {tiny_export}"),
        (finished_run / "state", f"found nothing inside of one; give {finished_run}"),
        (runs, f"found a folder that holds such; give one of them, as {runs / 'birds'}"),
        (tmp_path / "empty", "found an empty folder; `adapt` and `export` write such"),
        (photos, "found none; `adapt` and `export` write such"),
        (tmp_path / "none", "found nothing there; give the directory"),
        (next(photos.glob("*/*.png")), "found a file there; give the directory"),
    ):
        with pytest.raises(CheckpointError) as error:
            open_session(wrong)
        assert told in str(error.value)
