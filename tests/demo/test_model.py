"""The shipped pretrained model."""

import gzip
import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer

import microclip_deploy.demo as demo
from microclip_deploy.bench.demo_model.pool import render_pool
from microclip_deploy.bench.demo_model.zero_shot import Encoder, class_weights, score
from microclip_deploy.demo.glyphs import CLASS_CHARACTERS, descriptions
from microclip_deploy.demo.render import SOURCE

MODEL = Path(demo.__file__).parent / "model"
MAX_WEIGHTS_BYTES = 6_000_000
FILES = {
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "bpe_merges.txt.gz",
    "pretrain-log.jsonl",
}


@pytest.fixture(scope="module")
def model() -> CLIP:
    loaded: CLIP = open_clip.create_model(f"local-dir:{MODEL}")
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer() -> SimpleTokenizer:
    text = json.loads((MODEL / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    merges = MODEL / text["tokenizer_kwargs"]["bpe_path"]
    return SimpleTokenizer(bpe_path=str(merges), context_length=text["context_length"])


def test_model_folder_is_complete_and_small() -> None:
    assert {path.name for path in MODEL.iterdir()} >= FILES
    assert (MODEL / "open_clip_model.safetensors").stat().st_size < MAX_WEIGHTS_BYTES


def test_model_has_the_declared_shape(model: CLIP) -> None:
    embedding = model.encode_image(torch.zeros(2, 3, 64, 64), normalize=True)

    assert embedding.shape == (2, 128)
    assert model.visual.grid_size == (8, 8)


def test_tokenizer_fits_the_text_tower(model: CLIP, tokenizer: SimpleTokenizer) -> None:
    assert tokenizer.vocab_size == model.token_embedding.weight.shape[0]
    assert gzip.decompress((MODEL / "bpe_merges.txt.gz").read_bytes()).startswith(b"#version")


def test_no_description_is_truncated(tokenizer: SimpleTokenizer) -> None:
    lengths = [len(tokenizer.encode(d)) for c in CLASS_CHARACTERS for d in descriptions(c)]

    assert max(lengths) + 2 <= tokenizer.context_length


def test_model_reads_clean_prints(model: CLIP, tokenizer: SimpleTokenizer) -> None:
    pool = render_pool(CLASS_CHARACTERS, SOURCE, 164, seed=0, split=200)

    scores = score(Encoder(model.visual), class_weights(model.encode_text, tokenizer), pool)

    # 164 images of seen faces: the log says over 95 %, three standard errors are 5 points.
    assert scores["cls_names"] > 90
