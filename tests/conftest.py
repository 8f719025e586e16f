"""What most tests need: a tiny CLIP on disk and a folder of small photos."""

import os

# Tests compute so little that threads cost more than they bring, the more so beside other workers
# of pytest-xdist. The libraries read this when they are imported, also in processes of tests.
os.environ["OMP_NUM_THREADS"] = "1"

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from microclip_deploy.adapt.run import manifest_content
from microclip_deploy.adapt.run_directory import make_inputs, write_inputs
from microclip_deploy.adapt.trainer import Recipe
from microclip_deploy.data.classes import class_texts
from microclip_deploy.data.sources import BadFile, list_images
from microclip_deploy.export.command import run_export
from microclip_deploy.model.checkpoint import build_model, write_checkpoint
from microclip_deploy.model.clip import BackboneSpec, load_clip
from microclip_deploy.model.text import text_heads
from tests.tensorrt.bindings import Unavailable, rtx

TINY_MODEL = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 64,
        "patch_size": 8,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 1,
        "layers": 1,
    },
}
CLASSES = ("red circle", "green square", "blue stripe")
CALIBRATION: dict[str, Any] = {
    "temperature": 2.0,
    "mean_prediction": [0.6, 0.3, 0.1],
    "unknown_below": 0.5,
    "source": "folder",
    "images": 24,
}


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an open_clip local-dir with random, seeded weights."""
    directory = tmp_path_factory.mktemp("tiny-clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.model.CLIP(**TINY_MODEL)
    config = {
        "model_cfg": TINY_MODEL,
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    save_file(clip.state_dict(), directory / "open_clip_model.safetensors")
    return directory


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a labelled folder CLASS/NN.png of 24 small noisy images."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index, name in enumerate(CLASSES):
        (root / name).mkdir()
        for number in range(8):
            pixels = rng.integers(0, 80, (40, 48, 3), dtype=np.uint8)
            pixels[5:30, 5 + number : 30 + number, index] += 150
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def classes_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a class list, one name a line."""
    path = tmp_path_factory.mktemp("texts") / "classes.txt"
    path.write_text("\n".join(CLASSES) + "\n")
    return path


@pytest.fixture(scope="session")
def adapt_into(
    photos: Path, classes_file: Path, tiny_model_dir: Path
) -> Callable[[Path], list[str]]:
    """Return what makes the command line of an adaptation: two epochs of three iterations.

    Options can be given again behind it: the last one counts.
    """
    how = ["--device", "cpu", "--epochs", "2", "--batch-size", "8", "--set", "views.crops=1"]
    what = ["--classes", str(classes_file), "--model", f"local-dir:{tiny_model_dir}"]
    return lambda out: ["adapt", str(photos), *what, "-o", str(out), *how]


@pytest.fixture
def adapt_arguments(adapt_into: Callable[[Path], list[str]], tmp_path: Path) -> list[str]:
    """Return the command line that adapts into `run`."""
    return adapt_into(tmp_path / "run")


@pytest.fixture(scope="session")
def finished_run(
    tiny_model_dir: Path,
    photos: Path,
    classes_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a run directory as `adapt` leaves it, with a made-up history; copy it to change it."""
    directory = tmp_path_factory.mktemp("run")
    clip = load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))
    texts, recipe = class_texts(classes_file), Recipe()
    bad = (BadFile(photos / "broken.png", "the file is empty"),)
    inputs = make_inputs(clip, recipe, texts, good=list_images(photos).paths, bad=bad)
    write_inputs(directory, inputs)
    heads = text_heads(clip.text, texts)
    model = build_model(clip, heads, ncut=recipe.ncut, cls_share=0.5, pooling="soap")
    with torch.no_grad():
        noise = torch.randn(model.classifier.shape, generator=torch.Generator().manual_seed(0))
        model.classifier.add_(noise, alpha=0.3)
    history = [_epoch(number) for number in (1, 2, 3)]
    lines = "".join(json.dumps(epoch) + "\n" for epoch in history)
    (directory / "history.jsonl").write_text(lines)
    content = {**manifest_content(inputs, history), "calibration": CALIBRATION}
    write_checkpoint(directory, model, clip, heads, content)
    return directory


@pytest.fixture(scope="session", autouse=True)
def _trace_once() -> Iterator[None]:
    """Trace no module twice: it takes seconds, and the program is the same."""
    programs: dict[str, Any] = {}
    trace = torch.onnx.export

    def export(module: torch.nn.Module, example: Any, *file: Any, **options: Any) -> Any:
        if file:
            return trace(module, example, *file, **options)
        settings = [
            {name: value for name, value in vars(part).items() if not name.startswith("_")}
            for part in module.modules()
        ]
        digest = hashlib.sha256(f"{module} {settings} {options}".encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.shape}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
        key = digest.hexdigest()
        if key not in programs:
            programs[key] = trace(module, example, **options)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", export)
        yield


@pytest.fixture(scope="session")
def rtx_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what to put on PYTHONPATH for TensorRT for RTX, or skip the test and say why."""
    kept, name = request.config.cache, "tensorrt-bindings"
    try:
        return rtx(tmp_path_factory.mktemp(name) if kept is None else kept.mkdir(name))
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_export(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the float32 export of the finished run; copy it to change it."""
    directory = tmp_path_factory.mktemp("exports") / "tiny"
    run_export(finished_run, directory, Console(quiet=True))
    return directory


def _epoch(number: int) -> dict[str, object]:
    """Return a line of history.jsonl."""
    shares = {"agreement": 0.5 + 0.1 * number, "prior_agreement": 0.8, "kept": 1.0}
    graphs = {"complete_graphs": 0.1, "degenerate_graphs": 0.2, "mask_share": 0.3}
    losses = {"loss": 9.0 / number, "cross_entropy": 2.0 / number, "fairness": 7.0 / number}
    labels = {"churn": None if number == 1 else 0.2 / number, "label_counts": [10, 8, 6]}
    run = {"epoch": number, "iteration": 3 * number, "seconds": 1.5, "images_per_s": 16.0}
    return {**run, **losses, **shares, **graphs, **labels, "validation": None}
