"""What a model brings is honoured or refused, and the process gets its own settings back."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from microclip_deploy.errors import CheckpointError
from microclip_deploy.model.clip import BackboneSpec, Clip, exact_float32, load_clip, require_same

READ = {
    "fp32_precision": "[each.fp32_precision for each in (matmul, cudnn.conv, cudnn.rnn)]",
    "allow_tf32": "[matmul.allow_tf32, cudnn.allow_tf32]",
}
SETTINGS = {
    "matmul.allow_tf32 = cudnn.allow_tf32 = True": ("allow_tf32", [False] * 2),
    "torch.set_float32_matmul_precision('high')": ("allow_tf32", [False] * 2),
    "matmul.fp32_precision = 'tf32'": ("fp32_precision", ["ieee"] * 3),
    "cudnn.conv.fp32_precision = 'ieee'": ("fp32_precision", ["ieee"] * 3),
}


def test_tf32_is_off_inside_and_as_it_was_outside() -> None:
    """In one process each, as PyTorch refuses to mix its old and its new switches."""
    codes = [
        f"""
import torch
from microclip_deploy.model.clip import exact_float32
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
{chosen}
before = {READ[kind]}
with exact_float32:
    assert {READ[kind]} == {exact}
assert {READ[kind]} == before
"""
        for chosen, (kind, exact) in SETTINGS.items()
    ]
    started = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    assert [process.wait() for process in started] == [0] * len(codes)


def test_threads_that_overlap_leave_tf32_as_it_was() -> None:
    before = torch.backends.cudnn.allow_tf32

    def enter(_: int) -> None:
        for _ in range(500):
            with exact_float32:
                assert not torch.backends.cudnn.allow_tf32

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(4)))
    assert torch.backends.cudnn.allow_tf32 == before


def test_loading_a_model_leaves_the_process_alone(tiny_model_dir: Path) -> None:
    code = (
        "import sys, torch\n"
        "from microclip_deploy.model.clip import BackboneSpec, Clip, exact_float32, load_clip\n"
        "torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True\n"
        "clip = load_clip(BackboneSpec(model=sys.argv[1]))\n"
        "clip.text(['a photo'])\n"
        "assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32\n"
    )
    call = [sys.executable, "-c", code, f"local-dir:{tiny_model_dir}"]
    subprocess.run(call, check=True)


@pytest.fixture
def configured(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., BackboneSpec]:
    """Return what writes a copy of the tiny model with other preprocessing."""

    def write(**settings: object) -> BackboneSpec:
        directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
        path = directory / "open_clip_config.json"
        config = json.loads(path.read_text())
        config["preprocess_cfg"] |= settings
        path.write_text(json.dumps(config))
        return BackboneSpec(model=f"local-dir:{directory}")

    return write


def test_a_models_own_preprocessing_is_honoured(configured: Callable[..., BackboneSpec]) -> None:
    settings = {"interpolation": "bilinear", "resize_mode": "longest", "fill_color": 3}
    found = load_clip(configured(mean=0.4, std=[1, 1, 1], **settings)).preprocess
    assert found.model_dump(include={*settings}) == settings
    assert (found.mean, found.std) == ((0.4,) * 3, (1.0,) * 3)


def test_random_interpolation_is_bicubic_as_open_clip_evaluates(
    configured: Callable[..., BackboneSpec],
) -> None:
    assert load_clip(configured(interpolation="random")).preprocess.interpolation == "bicubic"


def test_preprocessing_that_is_not_known_is_refused(
    configured: Callable[..., BackboneSpec],
) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessing: .*fill_color"):
        load_clip(configured(resize_mode="longest", fill_color=300))


@pytest.fixture(scope="module")
def tiny_clip(tiny_model_dir: Path) -> Clip:
    return load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))


@pytest.mark.parametrize(
    ("section", "settings", "part"),
    [
        (None, {"quick_gelu": True}, "vision activations ['GELU'], found ['QuickGELU']"),
        ("vision_cfg", {"head_width": 16}, "vision heads [2], found [4]"),
        ("text_cfg", {"heads": 4}, "text heads [1], found [4]"),
        ("text_cfg", {"norm_kwargs": {"eps": 1e-3}}, "text eps [1e-05], found [0.001]"),
        ("text_cfg", {"no_causal_mask": True}, "text is causal True, found False"),
        ("text_cfg", {"pool_type": "last"}, "text pooling argmax, found last"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}, "tokens "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_same_weights_in_another_function_are_another_model(
    tiny_clip: Clip,
    tiny_model_dir: Path,
    tmp_path: Path,
    section: str | None,
    settings: dict[str, object],
    part: str,
) -> None:
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    path = directory / "open_clip_config.json"
    config = json.loads(path.read_text())
    model = config["model_cfg"]
    (model[section] if section else model).update(settings)
    path.write_text(json.dumps(config))
    other = load_clip(BackboneSpec(model=f"local-dir:{directory}"))
    assert other.weights_sha256 == tiny_clip.weights_sha256
    assert other.sha256 != tiny_clip.sha256
    with pytest.raises(CheckpointError, match=re.escape(part)):
        require_same(other, tiny_clip.sha256, tiny_clip.architecture, remedy="")
    require_same(other, tiny_clip.weights_sha256, None, remedy="")  # stored by older versions


def test_other_weights_in_the_same_function_are_another_model(tiny_clip: Clip) -> None:
    with pytest.raises(CheckpointError, match=r"sha256 000000000000, found .*; restore them"):
        require_same(tiny_clip, "0" * 64, tiny_clip.architecture, remedy="restore them")
