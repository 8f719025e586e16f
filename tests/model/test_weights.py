"""Where weights come from, what a file of them leaves open, and a hub that does not answer."""

import json
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from microclip_deploy.errors import CheckpointError, EnvironmentProblem
from microclip_deploy.model.clip import BackboneSpec, load_clip
from microclip_deploy.model.weights import check_source, file_warning


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not read")
    return path


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("ViT-B-32", ["means GELU", "openai", "--model ViT-B-32-quickgelu"]),
        ("ViT-B/16", ["--model ViT-B-16-quickgelu"]),
        ("ViT-L-14-CLIPA", ["OpenAI's preprocessing", "datacomp1b", "local-dir:PATH"]),
        ("ViT-B-32-quickgelu", []),
        ("ViT-B-32-256", []),
        ("demo", []),
    ],
)
def test_a_file_that_may_be_of_another_model_is_doubted(
    weights: Path, model: str, parts: list[str]
) -> None:
    told = file_warning(model, str(weights))
    assert (told is None) == (not parts)
    assert all(part in str(told) for part in parts)


@pytest.mark.parametrize(
    ("settings", "differing"),
    [
        ({"model_cfg": {"quick_gelu": True}}, "quick_gelu"),
        ({"model_cfg": {}, "preprocess_cfg": {"mean": [0.5] * 3}}, "mean"),
        ({"model_cfg": {}, "preprocess_cfg": {"resize_mode": "squash"}}, "resize_mode"),
        ({"model_cfg": {"quick_gelu": False}, "preprocess_cfg": {"size": 224}}, None),
        ({"other": "tool"}, None),
    ],
)
def test_a_configuration_beside_the_file_is_believed(
    weights: Path, settings: dict[str, object], differing: str | None
) -> None:
    (weights.parent / "open_clip_config.json").write_text(json.dumps(settings))
    if differing is None:
        assert file_warning("ViT-B-32", str(weights)) is None
    else:
        with pytest.raises(CheckpointError, match=f"{differing}; write --model local-dir:"):
            file_warning("ViT-B-32", str(weights))


@pytest.mark.parametrize(
    ("model", "pretrained", "told"),
    [
        ("ViT-B-99", "openai", r"--model ViT-B-99: .* did you mean .*ViT-B-32"),
        ("vit-b-32x", None, "did you mean ViT-B-32"),
        ("Demo", None, "did you mean demo"),
        ("laion/CLIP-ViT-B-32", None, "write --model hf-hub:laion/CLIP-ViT-B-32"),
        ("{folder}/run", "openai", "which `adapt` or `export` wrote"),
        ("{folder}/model", "openai", "write --model local-dir:{folder}/model"),
        ("{folder}/lone.safetensors", None, "give weights with --pretrained"),
        ("local-dir:{folder}/run", None, "which `adapt` or `export` wrote"),
        ("local-dir:{folder}/none", None, "as it does not exist"),
        ("local-dir:{folder}/model", None, "with a .safetensors file"),
        ("ViT-B-32", None, "expected --pretrained TAG or FILE, found none; tags of ViT-B-32: open"),
        ("ViT-B-32", "opanai", "--pretrained opanai: neither a file nor a tag of ViT-B-32"),
        ("ViT-B-32", "{folder}/model", "write --model local-dir:{folder}/model"),
        ("ViT-B-32", "{folder}/lone.safetensors", "expected a .safetensors file, found"),
        ("ViT-B-32", "{folder}/archive.safetensors", "give --model ViT-B-32-quickgelu"),
        ("ViT-B-32", "{folder}/other.safetensors", "found those of transformers"),
    ],
)
def test_what_is_no_model_is_named_for_what_it_is(
    tmp_path: Path, model: str, pretrained: str | None, told: str
) -> None:
    for name in ("run/manifest.json", "model/open_clip_config.json", "lone.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    save_file({"input_resolution": torch.ones(1)}, tmp_path / "archive.safetensors")
    save_file({"vision_model.x": torch.ones(1)}, tmp_path / "other.safetensors")
    given = pretrained and pretrained.format(folder=tmp_path)
    with pytest.raises(CheckpointError, match=told.format(folder=tmp_path)):
        check_source(model.format(folder=tmp_path), given)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("spec", [("ViT-B-32", "openai"), ("hf-hub:some/where", None)])
def test_without_the_hub_one_message_shows_the_ways_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spec: tuple[str, str | None],
    *,
    offline: bool,
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    reason = "HF_HUB_OFFLINE is set" if offline else "Connection refused"
    with pytest.raises(EnvironmentProblem, match=reason) as caught:
        load_clip(BackboneSpec(model=spec[0], pretrained=spec[1]))
    ways = ("HF_HOME", "--model local-dir:PATH", "--pretrained FILE.safetensors")
    assert all(way in str(caught.value) for way in ways)
    assert constants.HF_HUB_OFFLINE is offline
