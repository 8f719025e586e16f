"""The second look at the photos: verdict, rolled back rows and calibration of a run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from microclip_deploy import verdict
from microclip_deploy.adapt.loader import AdaptImages
from microclip_deploy.adapt.outcome import judge, look_again
from microclip_deploy.adapt.reference import SEAL, VECTORS, Reference, look_at
from microclip_deploy.adapt.views import ViewConfig
from microclip_deploy.data.classes import class_texts
from microclip_deploy.data.sources import list_images
from microclip_deploy.errors import DataError
from microclip_deploy.model.checkpoint import build_model
from microclip_deploy.model.clip import BackboneSpec, load_clip
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.model.text import text_heads
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.serving.torch_session import TorchSession


@pytest.fixture(scope="module")
def images(tiny_model_dir: Path, photos: Path) -> AdaptImages:
    clip = load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))
    return AdaptImages(list_images(photos).paths, clip.preprocess, ViewConfig(), 0)


@pytest.fixture
def model(tiny_model_dir: Path, classes_file: Path) -> MicroCLIP:
    clip = load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))
    heads = text_heads(clip.text, class_texts(classes_file))
    made = build_model(clip, heads, ncut=NCutSpec(), cls_share=0.5, pooling="soap")
    with torch.no_grad():
        noise = torch.randn(made.classifier.shape, generator=torch.Generator().manual_seed(0))
        made.classifier.add_(noise, alpha=0.3)
    return made


@pytest.fixture
def reference(tmp_path: Path, model: MicroCLIP, images: AdaptImages) -> Reference:
    return look_at(tmp_path, model, images)


def test_the_second_look_is_what_a_session_says(model: MicroCLIP, images: AdaptImages) -> None:
    seen = look_again(model, images, lambda done, total: None)
    with TorchSession(model, ("a",) * len(model.classifier), images.preprocess, "cpu") as session:
        said = session.predict_photos([images.preprocess.read(path) for path in images.paths])
    np.testing.assert_allclose(seen.cls, said.cls, atol=1e-6)
    np.testing.assert_allclose(seen.logits(model), said.logits, atol=1e-4)


def test_the_reference_is_zero_shot(
    reference: Reference, model: MicroCLIP, images: AdaptImages
) -> None:
    rows = np.arange(len(images.paths))
    shares = np.concatenate(list(reference.probabilities()))
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(reference.labels(rows), shares.argmax(axis=1))
    np.testing.assert_array_equal(reference.labels(rows[1:3]), shares.argmax(axis=1)[1:3])
    support = reference.support(torch.from_numpy(rows))
    np.testing.assert_allclose(support.zero_shot, shares, atol=1e-6)
    assert reference.joint().dense(len(model.frozen)).shape == shares.shape


def test_a_whole_reference_is_kept_and_a_damaged_one_made_again(
    tmp_path: Path, reference: Reference, model: MicroCLIP, images: AdaptImages
) -> None:
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)

    look_at(tmp_path, model, images, progress)
    assert not calls
    before = (tmp_path / VECTORS).read_bytes()
    (tmp_path / VECTORS).write_bytes(before[:-1])
    look_at(tmp_path, model, images, progress)
    assert (tmp_path / VECTORS).read_bytes() == before
    (tmp_path / SEAL).unlink()
    look_at(tmp_path, model, images, progress)
    assert calls[-1] == len(images.paths)


def test_rows_of_harmed_classes_become_the_frozen_heads(
    reference: Reference,
    model: MicroCLIP,
    images: AdaptImages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verdict, "HARMED", 2)  # whatever a class lost, it is more than that
    before = model.classifier.detach().clone()
    kept = judge(model, images, reference, expected_accuracy=0.7, rollback=False)
    assert kept.rolled_back == ()
    assert torch.equal(model.classifier, before)
    outcome = judge(model, images, reference, expected_accuracy=0.7, rollback=True)
    assert outcome.rolled_back
    for c, row in enumerate(model.classifier.detach()):
        expected = model.frozen[c] if c in outcome.rolled_back else before[c]
        assert torch.equal(row, expected)
    assert outcome.calibration.source == "folder"


def test_a_photo_that_is_gone_after_training_is_told_with_what_to_do(
    tmp_path: Path, model: MicroCLIP, photos: Path, images: AdaptImages
) -> None:
    lone = tmp_path / "lone.png"
    shutil.copy(next(photos.rglob("*.png")), lone)
    gone = AdaptImages([lone], images.preprocess, ViewConfig(), 0)
    lone.unlink()
    with pytest.raises(DataError, match="put it back at this path and continue with --resume"):
        look_again(model, gone, lambda done, total: None)
