"""Probe images are the same everywhere, and are stored with PyTorch's answers; photos are not."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file, save_file

from microclip_deploy.errors import CheckpointError, DataError
from microclip_deploy.export.proof.probes import (
    COUNT,
    MOST,
    Reference,
    made_up_photos,
    photos_with,
)
from microclip_deploy.serving.exported import PROBES, read_export

if TYPE_CHECKING:
    from tests.export.conftest import Subject

QUIET = Console(quiet=True)


def test_made_up_photos_are_the_same_every_time() -> None:
    first, again, fewer = (made_up_photos(32, count) for count in (COUNT, COUNT, 3))
    pixels = [photo.tobytes() for photo in first.read()]
    assert [photo.tobytes() for photo in again.read()] == pixels
    assert [photo.tobytes() for photo in first.read()] == pixels
    assert [photo.tobytes() for photo in fewer.read()] == pixels[:3]


def test_made_up_photos_exercise_resizing_and_cropping() -> None:
    photos = list(made_up_photos(224).read())
    assert {photo.mode for photo in photos} == {"RGB"}
    # Were there 9 or fewer, the largest batch would be one of those that are tried anyway.
    assert len({photo.tobytes() for photo in photos}) == COUNT > 9
    assert {photo.width > photo.height for photo in photos} == {True, False}
    assert all(235 <= side <= 404 for photo in photos for side in photo.size)


def test_made_up_photos_have_structure(tiny: "Subject") -> None:
    views = made_up_photos(32).views(tiny.preprocess).astype(float)
    assert views.shape == (COUNT, 32, 32, 3)
    noise = np.abs(np.diff(views, axis=2)).mean()
    assert views.std() > 4 * noise


def test_the_answers_are_the_models(tiny: "Subject") -> None:
    views = made_up_photos(32, 11).views(tiny.preprocess)
    steps: list[tuple[int, int]] = []
    reference = Reference.of(*tiny, views, lambda *step: steps.append(step))
    with torch.inference_mode():
        network_input = tiny.preprocess.normalize(torch.from_numpy(views))
        expected = tiny.model(network_input)
        patches = tiny.model.backbone(network_input).patches
    embedding = torch.nn.functional.normalize(expected.cls + expected.fg, dim=1)
    wanted = {**expected._asdict(), "patches": patches, "embedding": embedding}
    for name in ("cls", "fg", "attention", "embedding", "patches", "logits"):
        atol = {"logits": 2e-5, "patches": 1e-5}.get(name, 1e-6)
        np.testing.assert_allclose(getattr(reference, name), wanted[name], atol=atol, err_msg=name)
    np.testing.assert_array_equal(reference.mask, expected.saliency.mask)
    np.testing.assert_array_equal(reference.images, views)
    assert reference.determined.shape == reference.complete.shape == (11,)
    assert steps == [(8, 11), (11, 11)]


def test_a_complete_graph_determines_every_token(tiny: "Subject") -> None:
    images = np.full((1, 32, 32, 3), 120, np.uint8)
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        model.backbone.visual.positional_embedding.zero_()
    reference = Reference.of(model, tiny.preprocess, images)
    assert reference.complete.tolist() == reference.determined.tolist() == [True]
    assert reference.mask.all()


def test_made_up_images_are_stored_and_photos_of_the_users_never(
    reference: Reference, tiny_export: Path, tmp_path: Path
) -> None:
    preprocess = read_export(tiny_export).manifest.preprocess
    np.testing.assert_array_equal(reference.images, made_up_photos(32).views(preprocess))
    longer = Reference(*(np.concatenate([part, part[:5]]) for part in reference))
    longer.images[COUNT:] = 77
    longer.write(tmp_path / PROBES)
    stored = Reference.read(tmp_path / PROBES)
    for name in Reference._fields:
        part, expected = getattr(stored, name), getattr(reference, name)
        np.testing.assert_array_equal(part, expected)
        assert part.dtype == expected.dtype


@pytest.mark.parametrize("damage", ["missing", "garbage", "truncated", "incomplete", "fewer"])
def test_stored_answers_that_are_not_all_there_are_bad_data(
    tiny_export: Path, tmp_path: Path, damage: str
) -> None:
    path, content = tmp_path / PROBES, (tiny_export / PROBES).read_bytes()
    stored = load_file(tiny_export / PROBES)
    if damage == "garbage":
        path.write_bytes(b"no tensors" * 99)
    elif damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "incomplete":
        save_file({name: part for name, part in stored.items() if name != "fg"}, path)
    elif damage == "fewer":
        save_file({name: part[:3] for name, part in stored.items()}, path)
    with pytest.raises(CheckpointError, match=r"probe images.*export again"):
        Reference.read(path)


def test_photos_of_the_users_come_behind(photos: Path, tiny: "Subject") -> None:
    both = photos_with(photos, 32, QUIET)
    assert both.source == f"made-up images and 24 of {photos}"
    assert len(both.names) == COUNT + 24
    assert both.names[COUNT].endswith("00.png")
    views = both.views(tiny.preprocess)
    np.testing.assert_array_equal(views, both.views(tiny.preprocess))
    np.testing.assert_array_equal(views[:COUNT], made_up_photos(32).views(tiny.preprocess))
    with Image.open(both.names[-1]) as last:
        np.testing.assert_array_equal(views[-1], tiny.preprocess.test_view(last))


def test_of_many_photos_some_are_taken_from_everywhere(tmp_path: Path) -> None:
    for number in range(3 * MOST):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number:03d}.png")
    names = photos_with(tmp_path, 32, QUIET).names[COUNT:]
    assert [Path(name).stem for name in names] == [f"{n:03d}" for n in range(0, 3 * MOST, 3)]


def test_photos_that_cannot_be_read_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    both = photos_with(tmp_path, 32, Console(stderr=True))
    assert [Path(name).name for name in both.names[COUNT:]] == ["good.png"]
    assert len(list(both.read())) == COUNT + 1
    assert capsys.readouterr().err.startswith("skipped: ")


@pytest.mark.parametrize("content", [None, b"no image"])
def test_no_photo_is_bad_data(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(DataError):
        photos_with(tmp_path, 32, QUIET)
