"""The shipped pretrained model."""

import json
from pathlib import Path

import open_clip
import pytest
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer

from microclip_deploy.bench.letters_model.zero_shot import (
    Encoder,
    class_weights,
    render_pool,
    score,
)
from microclip_deploy.demo import letters
from microclip_deploy.demo.letters.glyphs import CLASS_CHARACTERS, descriptions
from microclip_deploy.demo.letters.render import SOURCE

MODEL = Path(letters.__file__).parent / "model"
MAX_WEIGHTS_BYTES = 6_000_000


@pytest.fixture(scope="module")
def tokenizer() -> SimpleTokenizer:
    text = json.loads((MODEL / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    merges = MODEL / text["tokenizer_kwargs"]["bpe_path"]
    return SimpleTokenizer(bpe_path=str(merges), context_length=text["context_length"])


def test_model_folder_is_small_and_holds_its_log() -> None:
    assert (MODEL / "open_clip_model.safetensors").stat().st_size < MAX_WEIGHTS_BYTES
    assert (MODEL / "pretrain-log.jsonl").is_file()


def test_no_description_is_truncated(tokenizer: SimpleTokenizer) -> None:
    lengths = [len(tokenizer.encode(d)) for c in CLASS_CHARACTERS for d in descriptions(c)]
    assert max(lengths) + 2 <= tokenizer.context_length


def test_model_reads_clean_prints(tokenizer: SimpleTokenizer) -> None:
    model: CLIP = open_clip.create_model(f"local-dir:{MODEL}").eval()
    assert tokenizer.vocab_size == model.token_embedding.weight.shape[0]
    pool = render_pool(CLASS_CHARACTERS, SOURCE, 164, seed=0, split=200)
    scores = score(Encoder(model.visual), class_weights(model.encode_text, tokenizer), pool)
    # 164 images of seen faces: the log says over 95 %, three standard errors are 5 points.
    assert scores["cls_names"] > 90
