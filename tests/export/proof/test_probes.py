"""Probe images are the same everywhere, and are stored with PyTorch's answers; photos are not."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from microclip_deploy.errors import CheckpointError, DataError
from microclip_deploy.export.proof.probes import COUNT, MOST, Reference, made_up_photos, with_users
from microclip_deploy.serving.exported import PROBES, read_export

if TYPE_CHECKING:
    from tests.export.conftest import Subject


@pytest.fixture(scope="module")
def reference(tiny_export: Path) -> Reference:
    return Reference.read(tiny_export / PROBES)


def test_made_up_photos_are_the_same_every_time() -> None:
    first, again, fewer = (made_up_photos(32, count) for count in (COUNT, COUNT, 3))
    assert [photo.tobytes() for photo in first.read()] == [p.tobytes() for p in again.read()]
    assert [photo.tobytes() for photo in first.read()] == [p.tobytes() for p in first.read()]
    assert [photo.tobytes() for photo in fewer.read()] == [
        photo.tobytes() for photo, _ in zip(first.read(), range(3), strict=False)
    ]


def test_made_up_photos_exercise_resizing_and_cropping() -> None:
    photos = list(made_up_photos(224).read())
    assert {photo.mode for photo in photos} == {"RGB"}
    assert len({photo.tobytes() for photo in photos}) == COUNT == 24
    assert {photo.width > photo.height for photo in photos} == {True, False}
    assert all(235 <= side <= 404 for photo in photos for side in photo.size)


def test_made_up_photos_have_structure(tiny: "Subject") -> None:
    views = made_up_photos(32).views(tiny.preprocess).astype(float)
    assert views.shape == (COUNT, 32, 32, 3)
    noise = np.abs(np.diff(views, axis=2)).mean()
    assert views.std() > 4 * noise


def test_there_are_more_photos_than_single_batch_sizes(tiny: "Subject") -> None:
    # Otherwise the largest batch would be one of those that are tried anyway.
    assert COUNT > 9
    assert len(made_up_photos(tiny.preprocess.size).names) == COUNT


def test_the_answers_are_the_models(tiny: "Subject") -> None:
    views = made_up_photos(32, 11).views(tiny.preprocess)
    shown: list[tuple[int, int]] = []
    found = Reference.of(*tiny, views, lambda *progress: shown.append(progress))
    with torch.inference_mode():
        network_input = tiny.preprocess.normalize(torch.from_numpy(views))
        expected = tiny.model(network_input)
        patches = tiny.model.backbone(network_input).patches
    np.testing.assert_allclose(found.logits, expected.logits, atol=2e-5)
    np.testing.assert_allclose(found.cls, expected.cls, atol=1e-6)
    np.testing.assert_allclose(found.fg, expected.fg, atol=1e-6)
    np.testing.assert_allclose(found.attention, expected.attention, atol=1e-6)
    np.testing.assert_allclose(found.patches, patches, atol=1e-5)
    np.testing.assert_array_equal(found.mask, expected.saliency.mask)
    np.testing.assert_array_equal(found.images, views)
    assert found.determined.shape == found.complete.shape == (11,)
    embedding = expected.cls + expected.fg
    embedding = embedding / embedding.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(found.embedding, embedding, atol=1e-6)
    assert shown[-1] == (11, 11)


def test_a_complete_graph_determines_every_token(tiny: "Subject") -> None:
    images = np.full((1, 32, 32, 3), 120, np.uint8)
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        model.backbone.visual.positional_embedding.zero_()
    found = Reference.of(model, tiny.preprocess, images, lambda *_: None)
    assert found.complete.tolist() == found.determined.tolist() == [True]
    assert found.mask.all()


def test_stored_answers_are_read_back(reference: Reference, tmp_path: Path) -> None:
    reference.write(tmp_path / PROBES)
    found = Reference.read(tmp_path / PROBES)
    for name in Reference._fields:
        written, read = getattr(reference, name), getattr(found, name)
        np.testing.assert_array_equal(written, read)
        assert written.dtype == read.dtype


def test_photos_of_the_users_are_never_stored(reference: Reference, tmp_path: Path) -> None:
    longer = Reference(*(np.concatenate([part, part[:5]]) for part in reference))
    longer.images[COUNT:] = 77
    longer.write(tmp_path / PROBES)
    assert (Reference.read(tmp_path / PROBES).images == reference.images).all()


def test_the_export_holds_its_answers(reference: Reference, tiny_export: Path) -> None:
    preprocess = read_export(tiny_export).manifest.preprocess
    np.testing.assert_array_equal(reference.images, made_up_photos(32).views(preprocess))


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
    found = with_users(made_up_photos(32), photos)
    assert len(found.names) == COUNT + 24
    assert found.names[COUNT].endswith("00.png")
    assert found.source == f"made-up images and 24 of {photos}"
    views = found.views(tiny.preprocess)
    np.testing.assert_array_equal(views, found.views(tiny.preprocess))
    np.testing.assert_array_equal(views[:COUNT], made_up_photos(32).views(tiny.preprocess))
    with Image.open(found.names[-1]) as last:
        np.testing.assert_array_equal(views[-1], tiny.preprocess.test_view(last))


def test_of_many_photos_some_are_taken_from_everywhere(tmp_path: Path) -> None:
    for number in range(3 * MOST):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number:03d}.png")
    names = with_users(made_up_photos(32), tmp_path).names[COUNT:]
    assert [Path(name).stem for name in names] == [f"{n:03d}" for n in range(0, 3 * MOST, 3)]


def test_photos_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    found = with_users(made_up_photos(32), tmp_path)
    assert [Path(name).name for name in found.names[COUNT:]] == ["good.png"]
    assert len(list(found.read())) == COUNT + 1


@pytest.mark.parametrize("content", [None, b"no image"])
def test_no_photo_is_bad_data(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(DataError):
        with_users(made_up_photos(32), tmp_path)
