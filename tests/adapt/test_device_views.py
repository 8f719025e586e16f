"""Views cut on the model's device are those of the CPU, within a few levels."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from microclip_deploy.adapt import device_operations, device_views, views
from microclip_deploy.adapt.device_views import PhotoBatch, WholePhoto
from microclip_deploy.adapt.loader import AdaptImages, Batch
from microclip_deploy.adapt.ranks import Ranks
from microclip_deploy.adapt.views import (
    Operation,
    ViewConfig,
    make_views,
    randaugment_names,
    view_generator,
)
from microclip_deploy.cli.main import main
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import UsageError

SIZE = 32
CLIP = Preprocess(size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
ON_MODEL = ViewConfig(crops=3, device="model")
SHAPES = [(2, 3), (100, 2), (2, 100), (32, 32), (90, 61), (20, 31), (300, 200)]
INCREASING = "rand-m9-mstd0.5-inc1-p1.0-n1"
BOTH_WAYS = "rand-m5-mstd3.0-p1.0-n1"


def smooth(width: int, height: int) -> Image.Image:
    """A picture with edges and gradients, as photos have them."""
    coarse = np.random.default_rng(width * 1000 + height).integers(0, 256, (7, 9, 3))
    return Image.fromarray(coarse.astype(np.uint8)).resize((width, height))


def cut(image: Image.Image, index: int, preprocess: Preprocess, config: ViewConfig) -> torch.Tensor:
    """Return the views of a photo, int (2 + V, 3, S, S), as the device makes them."""
    photo = WholePhoto.of(image, view_generator(0, 0, index), preprocess, config)
    batch = PhotoBatch.of([photo], torch.tensor([0]))
    return batch.views(preprocess)[0].int()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("randaugment", ["", "rand-m9-mstd0.5-inc1"])
def test_views_are_near_those_of_pillow(
    resize_mode: str, interpolation: str, randaugment: str
) -> None:
    changed = {"resize_mode": resize_mode, "interpolation": interpolation, "fill_color": 9}
    preprocess = CLIP.model_copy(update=changed)
    config = ViewConfig(crops=3, randaugment=randaugment)
    for index, shape in enumerate(SHAPES):
        made = make_views(smooth(*shape), view_generator(0, 0, index), preprocess, config)
        expected = np.stack([made.weak, made.strong, *made.crops]).transpose(0, 3, 1, 2)
        difference = (cut(smooth(*shape), index, preprocess, config) - torch.tensor(expected)).abs()
        # Equalizing spreads a level's difference.
        assert difference[[0, 2, 3, 4]].max() <= 2
        assert difference.double().mean() < 0.1


@pytest.mark.parametrize("config", [INCREASING, BOTH_WAYS])
def test_operations_are_those_of_pillow_within_one_level(config: str) -> None:
    photos = [smooth(SIZE, SIZE), Image.new("RGB", (SIZE, SIZE), (7, 255, 100))]
    photos.append(Image.effect_noise((SIZE, SIZE), 90).convert("RGB"))
    for name in randaugment_names(config):
        for seed, image in enumerate(photos * 2):
            with views._global_seeds(np.random.default_rng(seed)):
                drawn = views._randaugment(config, (name,), SIZE)(())
            assert_near(image, drawn)
    assert_near(photos[0], (Operation("Desaturate", (0.7,)),))


def assert_near(image: Image.Image, drawn: tuple[Operation, ...]) -> None:
    expected = np.asarray(views.augmented(image, drawn), np.int64)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    found = device_operations.augmented(pixels, drawn).permute(1, 2, 0).numpy()
    assert np.abs(expected - found).max() <= 1, drawn
    assert np.abs(expected - found).mean() <= 0.05, drawn


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    found = [folder / f"{index}.png" for index in range(5)]
    for index, path in enumerate(found):
        smooth(40 + 9 * index, 50 - 3 * index).save(path)
    return found


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batches_depend_on_nothing_but_seed_and_epoch(paths: list[Path]) -> None:
    images = AdaptImages(paths, CLIP, ON_MODEL, seed=7)
    whole = list(images.epoch(1, 2))
    assert [batch.crops.shape for batch in whole[::2]] == [(n, 3, 3, SIZE, SIZE) for n in (2, 1)]
    later = images.epoch(1, 2, start_iteration=1, workers=1)
    assert all(same(a, b) for a, b in zip(whole[1:], later, strict=True))
    shares = [list(images.epoch(1, 2, ranks=Ranks(rank, 2))) for rank in range(2)]
    for number, batch in enumerate(whole):
        joined = torch.cat([share[number].crops for share in shares])
        assert torch.equal(joined, batch.crops)


def test_drawn_are_the_same_places_as_on_the_cpu(paths: list[Path]) -> None:
    on_cpu = AdaptImages(paths, CLIP, ViewConfig(crops=3), seed=7)
    on_model = AdaptImages(paths, CLIP, ON_MODEL, seed=7)
    for expected, found in zip(on_cpu.epoch(0, 2), on_model.epoch(0, 2), strict=True):
        assert torch.equal(expected.whole, found.whole)
        for name in ("weak", "crops"):
            difference = getattr(expected, name).int() - getattr(found, name).int()
            assert difference.abs().max() <= 2


@pytest.mark.parametrize(("size", "shape"), [(SIZE, (512, 683, 3)), (336, (672, 896, 3))])
def test_large_photos_are_sent_reduced_but_to_no_less_than_crops_need(
    size: int, shape: tuple[int, ...]
) -> None:
    preprocess, rng = CLIP.model_copy(update={"size": size}), view_generator(0, 0, 0)
    assert WholePhoto.of(smooth(1600, 1200), rng, preprocess, ON_MODEL).pixels.shape == shape
    assert WholePhoto.of(smooth(900, 300), rng, preprocess, ON_MODEL).pixels.shape == (300, 900, 3)


def test_memory_that_runs_out_is_an_error_and_the_run_goes_on(
    adapt_arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = [*adapt_arguments, "--set", "views.device=model", "--epochs", "1"]
    run = Path(begin[begin.index("-o") + 1])
    photos, limit = device_views.cut_views, 12

    def limited(*given: Any) -> torch.Tensor:
        nonlocal limit
        limit -= 1
        if limit < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return photos(*given)

    monkeypatch.setattr(device_views, "cut_views", limited)
    assert main([*begin, "--save-every", "1"]) == 4
    told = " ".join(capsys.readouterr().err.split())
    assert "cpu: out of memory while views are cut; free memory of it and continue" in told
    assert (run / "state/step-000000001.json").exists()  # of 8 photos
    limit = 100
    assert main(["adapt", "--resume", "-o", str(run)]) == 0
    shutil.copy(run / "weights.safetensors", run.parent)
    assert main([*begin, "--overwrite"]) == 0
    again = run.parent / "weights.safetensors"
    assert again.read_bytes() == (run / "weights.safetensors").read_bytes()


def test_gaussian_blur_is_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match=r"views.device 'model': expected a randaugment without"):
        ViewConfig(device="model", randaugment="rand-m9-t3a")
    chosen = ("SolarizeIncreasing",)
    assert ViewConfig(device="model", randaugment="rand-m9-t3a", randaugment_ops=chosen)
