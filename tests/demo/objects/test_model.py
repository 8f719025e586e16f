"""The shipped pretrained model."""

import json
from pathlib import Path

from microclip_deploy.demo import objects
from microclip_deploy.model.clip import BackboneSpec, load_clip

MODEL = Path(objects.__file__).parent / "model"
MAX_WEIGHTS_BYTES = 4_000_000


def test_model_folder_is_small_and_holds_its_log() -> None:
    assert (MODEL / "open_clip_model.safetensors").stat().st_size < MAX_WEIGHTS_BYTES
    lines = (MODEL / "pretrain-log.jsonl").read_text().splitlines()
    assert "target" in json.loads(lines[-1])


def test_no_description_is_truncated() -> None:
    clip = load_clip(BackboneSpec(model="demo-objects"))
    assert all(
        clip.text.uncut_length(text) is None
        for texts in objects.benchmark.OBJECTS.descriptions.values()
        for text in texts
    )
