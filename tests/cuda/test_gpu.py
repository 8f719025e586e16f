"""What only a CUDA device can show. Run with: python -m pytest -m gpu"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from microclip_deploy.adapt.device_views import PhotoBatch, WholePhoto
from microclip_deploy.adapt.train_step import AdaptConfig, Views, make_optimizer, train_step
from microclip_deploy.adapt.views import ViewConfig, view_generator
from microclip_deploy.cli.main import main
from microclip_deploy.data.classes import ClassTexts
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.model.checkpoint import build_model
from microclip_deploy.model.clip import BackboneSpec, load_clip
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.model.saliency import saliency
from microclip_deploy.model.text import text_heads
from microclip_deploy.ncut.spec import NCutSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA device; run `pytest -m gpu` where there is one",
    ),
]

CASES = Path(__file__).parent.parent / "vectors" / "ncut_cases.npz"


@pytest.fixture
def model(tiny_model_dir: Path) -> MicroCLIP:
    clip = load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))
    texts = ClassTexts(("robin", "wren"), (("a robin",), ("a wren",)), ("{}",))
    heads = text_heads(clip.text, texts)
    spec = NCutSpec(affinity="centered_cosine")
    return build_model(clip, heads, ncut=spec, cls_share=0.5, pooling="soap")


@pytest.fixture
def views() -> Views:
    torch.manual_seed(0)
    weak, strong = torch.randn(2, 4, 3, 32, 32)
    return Views(weak, strong, torch.randn(4, 2, 3, 32, 32))


@pytest.mark.parametrize("size", [49, 196, 256, 576])
def test_cut_on_the_device_is_exact_where_well_posed(size: int) -> None:
    cases = np.load(CASES)
    tokens = torch.from_numpy(cases[f"n{size}/tokens"]).cuda()
    posed = cases[f"n{size}/well_posed"]
    found = saliency(tokens, NCutSpec()).mask.cpu().numpy()
    np.testing.assert_array_equal(found[posed], cases[f"n{size}/mask"][posed])


def test_a_training_step_equals_the_one_on_the_cpu(model: MicroCLIP, views: Views) -> None:
    config = AdaptConfig(lr=1e-3)
    device_model = copy.deepcopy(model).cuda()
    device_views = Views(*(view.cuda() for view in views))
    for each, seen in ((model, views), (device_model, device_views)):
        train_step(
            each, make_optimizer(each.trainable(), config), seen, config, average=None, rate=1e-3
        )
    for name, parameter in model.trainable().items():
        found = device_model.trainable()[name].detach().cpu()
        torch.testing.assert_close(found, parameter.detach(), atol=2e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_training_step_never_waits_for_the_device(model: MicroCLIP, views: Views) -> None:
    config = AdaptConfig()
    model = model.cuda()
    optimizer = make_optimizer(model.trainable(), config)
    device_views = Views(*(view.cuda() for view in views))
    train_step(model, optimizer, device_views, config, average=None, rate=1e-4)  # warm-up
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(model, optimizer, device_views, config, average=None, rate=1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_views_cut_on_cuda_equal_the_cpus_and_wait_for_nothing() -> None:
    preprocess = Preprocess(size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config = ViewConfig(device="model", randaugment="rand-m9-mstd0.5-inc1-p1.0")
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    photo = Image.fromarray(coarse).resize((640, 480))
    photos = [
        WholePhoto.of(photo, view_generator(0, 0, index), preprocess, config) for index in range(64)
    ]
    batch = PhotoBatch.of(photos, torch.arange(64))
    expected = batch.views(preprocess)
    batch.to("cuda").views(preprocess)  # allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = batch.to("cuda").views(preprocess)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (found.cpu().int() - expected.int()).abs()
    assert difference[:, [0, *range(2, 10)]].max() <= 1
    assert difference.double().mean() < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapt_and_evaluate_on_the_device(
    tmp_path: Path, photos: Path, classes_file: Path, tiny_model_dir: Path, precision: str
) -> None:
    run = str(tmp_path / "run")
    settings = ["--epochs", "2", "--set", "views.crops=2", "--set", f"adapt.precision={precision}"]
    model = ["--model", f"local-dir:{tiny_model_dir}", "--device", "cuda"]
    arguments = ["adapt", str(photos), "--classes", str(classes_file), "-o", run]
    assert main([*arguments, *model, *settings]) == 0
    assert main(["evaluate", run, str(photos), "--device", "cuda"]) == 0
