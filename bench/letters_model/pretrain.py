"""Pretrain the tiny CLIP of the benchmark from nothing but rendered letters.

How to reproduce the shipped model (an hour or less on two CPU cores, no network):

    python -m microclip_deploy.bench.letters_model.pretrain --out model

The seed fixes images, captions, their order and the initial weights, so a run on the same torch
build and thread count gives the same numbers (other builds sum in another order and end close by).
On cores shared with other programs set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait
are slow there. The folder holds:

    open_clip_config.json          architecture, preprocessing, and the name of the merges file
    open_clip_model.safetensors    float16 weights
    bpe_merges.txt.gz              tokenizer merges, trained on the captions
    pretrain-log.jsonl             losses and accuracies over the steps, final scores

The objective is CLIP's symmetric contrastive loss, on batches of one image and one caption of
each of the 113 glyphs, twice: on the CLS embedding, and on value-path tokens pooled as adaptation
pools them before its first step (the mean of the salient tokens is the query, the maps are the
identity). The second term gives the tiny model the dense alignment that large CLIP models have
from scale. A penalty keeps the tokens of one image from all pointing the same way, because the
saliency graph of such an image has an edge everywhere and cannot be cut.

The 2-D weights of the transformer blocks are optimised by Muon, the rest by AdamW: AdamW alone
stayed at chance for hundreds of steps. The final scores are those of the float16 weights. Only the
source domain is trained on; target images are scored once, at the end.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, Any, NamedTuple, TextIO

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from microclip_deploy.artifact import read_json, write_bytes, write_json
from microclip_deploy.bench.letters_model.bpe import merges_bytes, train_merges
from microclip_deploy.bench.letters_model.captions import PRETRAINING_CHARACTERS, caption
from microclip_deploy.bench.letters_model.zero_shot import (
    Encoder,
    ImagePool,
    class_weights,
    pixels,
    render_pool,
    score,
)
from microclip_deploy.demo import letters
from microclip_deploy.demo.letters.glyphs import CLASS_CHARACTERS
from microclip_deploy.demo.letters.render import HELD_OUT_FACES, SOURCE, TARGET, Domain, PrintStyle

SEED = 0
"""Of images, captions, order and initial weights."""
POOL_IMAGES = 40_000
"""Source images, rendered once and augmented by small affine maps at every use."""
EVALUATE_EVERY = 100
"""Steps between two accuracy measurements on source images."""
MERGES = 600
"""Most merges of the tokenizer."""
THREADS = 2
"""Of torch; they decide the order of sums."""

WARMUP_STEPS = 50
"""Steps of linear warm-up at the start of each stage."""
MUON_RATE, ADAMW_RATE = 8e-3, 3e-3
"""Peak rates for the 2-D weights of the blocks, and for everything else."""
WEIGHT_DECAY = 0.05
"""Decoupled decay of the Muon weights."""
DENSE_WEIGHT = 0.5
"""Weight of the contrastive term on pooled value-path tokens."""
MAX_TOKEN_COSINE = 0.25
"""Mean over the pairs of tokens of one image; more is penalised."""
MAX_LOGIT_SCALE = math.log(100)

CONFIG = "open_clip_config.json"
SHIPPED_CONFIG = Path(letters.__file__).parent / "model" / CONFIG
"""Holds the architecture: 1.2 M parameters, 8x8 patches of a 64x64 image."""
WEIGHTS = "open_clip_model.safetensors"
MERGES_FILE = "bpe_merges.txt.gz"


class Stage(NamedTuple):
    """One run of the optimisers, from fresh momenta; one image of each glyph per step."""

    steps: int
    """Steps taken."""
    cosine_steps: int
    """Length of the cosine that the rates follow; longer than `steps` stops it early."""
    peak: float
    """Share of the peak rates."""


STAGES = (Stage(1200, 1600, 1.0), Stage(900, 900, 0.6))
"""A warm restart: the first cosine ended where the marks had only begun to be told apart."""

SOURCE_HELD_OUT = Domain(faces=HELD_OUT_FACES)
# Numbers that keep the random images of each pool apart, and from the written image folders.
TRAIN_SPLIT, SEEN_SPLIT, HELD_OUT_SPLIT, TARGET_SPLIT = 100, 101, 102, 103


def pretrain(out: Annotated[Path, typer.Option(help="Model folder to write.")]) -> None:
    """Pretrain the tiny CLIP of the benchmark; log to the folder and to stdout."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(out)
    config = read_json(SHIPPED_CONFIG)
    write_json(out / CONFIG, config)
    config["model_cfg"]["text_cfg"].pop("tokenizer_kwargs")
    model = CLIP(**config["model_cfg"])
    train = render_pool(PRETRAINING_CHARACTERS, SOURCE, POOL_IMAGES, seed=SEED, split=TRAIN_SPLIT)
    with (out / "pretrain-log.jsonl").open("w") as log:
        for number, stage in enumerate(STAGES):
            for record in _train(model, tokenizer, train, stage, SEED + number):
                _tell(record, log)
            weights = {name: w.half().contiguous() for name, w in model.state_dict().items()}
            write_bytes(out / WEIGHTS, save(weights))
            model.load_state_dict(load_file(out / WEIGHTS))  # goes on from the rounded weights
        for name, domain, split in (
            ("source, pretraining faces", SOURCE, SEEN_SPLIT),
            ("source, held-out faces", SOURCE_HELD_OUT, HELD_OUT_SPLIT),
            ("target", TARGET, TARGET_SPLIT),
        ):
            unseen = render_pool(CLASS_CHARACTERS, domain, 1640, seed=SEED, split=split)
            _tell({"event": "final", "images": name, **_scores(model, tokenizer, unseen)}, log)


def write_tokenizer(out: Path) -> SimpleTokenizer:
    """Train the merges on captions of every glyph, write them and read them back."""
    rng = Random(SEED)
    styles = [
        PrintStyle(style, ink, paper)
        for style in ("bold sans", "sans", "slanted mono", "bold slanted serif", "serif")
        for ink in ("black", "blue", "red", "green", "purple", "brown")
        for paper in ("white", "yellow", "pink", "grey", "cyan", "orange")
    ]
    captions = [caption(c, rng, rng.choice(styles)) for c in PRETRAINING_CHARACTERS * 200]
    path = out / MERGES_FILE
    write_bytes(path, merges_bytes(train_merges(captions, MERGES)))
    return SimpleTokenizer(bpe_path=str(path), context_length=32)


def _train(
    model: CLIP, tokenizer: SimpleTokenizer, pool: ImagePool, stage: Stage, seed: int
) -> Iterator[dict[str, Any]]:
    """Optimise `model` in place; yield what is to be logged."""
    both, encoder = optimizers(model), Encoder(model.visual)
    schedules = [
        LambdaLR(optimizer, lambda done: rate(done, stage.cosine_steps, stage.peak))
        for optimizer in both
    ]
    held_out = render_pool(CLASS_CHARACTERS, SOURCE_HELD_OUT, 820, seed=SEED, split=HELD_OUT_SPLIT)
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    batches = islice(_batches(pool, seed), stage.steps)
    for step, (images, captions) in enumerate(batches, 1):
        losses = _losses(model, encoder, _jitter(pixels(images), generator), tokenizer(captions))
        loss = losses["cls"] + DENSE_WEIGHT * losses["dense"] + losses["spread"]
        advance(model, both, schedules, loss)
        if step % EVALUATE_EVERY == 0 or step == stage.steps:
            yield {
                "event": "step",
                "step": step,
                "seconds": round(time.monotonic() - started),
                **{name: round(term.item(), 4) for name, term in losses.items()},
                "logit_scale": round(model.logit_scale.exp().item(), 2),
                **_scores(model, tokenizer, held_out),
            }


def _batches(pool: ImagePool, seed: int) -> Iterator[tuple[NDArray[np.uint8], list[str]]]:
    """Yield one image and one caption of every glyph, forever, each image once per pass."""
    rng = Random(seed)
    members = [np.flatnonzero(pool.labels == glyph) for glyph in range(len(PRETRAINING_CHARACTERS))]
    per_pass = min(map(len, members))
    while True:
        orders = [rng.sample(list(indices), per_pass) for indices in members]
        for chosen in zip(*orders, strict=True):
            captions = [
                caption(character, rng, pool.styles[index])
                for character, index in zip(PRETRAINING_CHARACTERS, chosen, strict=True)
            ]
            yield pool.images[list(chosen)], captions


def _losses(model: CLIP, encoder: Encoder, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Return the terms of the objective, scalars."""
    branches, words = encoder(images), model.encode_text(texts, normalize=True)
    scale, pairs = model.logit_scale.exp(), torch.arange(len(images))

    def contrast(embedded: Tensor) -> Tensor:
        logits = scale * embedded @ words.T
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

    # |mean direction|^2 is the mean cosine over all pairs of tokens of one image.
    cosine = F.normalize(branches.patches, dim=-1).mean(1).square().sum(-1)
    spread = F.relu(cosine - MAX_TOKEN_COSINE).mean()
    return {"cls": contrast(branches.cls), "dense": contrast(branches.fg), "spread": spread}


def _jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the batch under small random scales, shears and shifts, float32 (B, 3, H, W)."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    scale, aspect, shear = uniform(0.85, 1.1), uniform(0.95, 1.05), uniform(-0.06, 0.06)
    top = torch.stack([scale * aspect, shear, uniform(-0.1, 0.1)], 1)
    bottom = torch.stack([torch.zeros(count), scale, uniform(-0.1, 0.1)], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def optimizers(model: CLIP) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for all else, at their peak rates."""
    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if p.ndim == 2 and "resblocks" in name]
    muon = torch.optim.Muon(
        [named.pop(name) for name in matrices],
        lr=MUON_RATE,
        weight_decay=WEIGHT_DECAY,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = list(named.values())
    return [muon, torch.optim.AdamW(rest, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def rate(done: int, cosine_steps: int, peak: float) -> float:
    """Return the share of the peak rates after so many steps: linear warm-up times cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * done / cosine_steps))
    return min(1.0, (done + 1) / WARMUP_STEPS) * peak * cosine


def advance(
    model: CLIP,
    both: Sequence[torch.optim.Optimizer],
    schedules: Sequence[LambdaLR],
    loss: Tensor,
) -> None:
    """Take one step of the optimisers and their schedules down the gradient of a loss."""
    for optimizer in both:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, schedule in zip(both, schedules, strict=True):
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def _scores(model: CLIP, tokenizer: SimpleTokenizer, pool: ImagePool) -> dict[str, float]:
    return score(Encoder(model.visual), class_weights(model.encode_text, tokenizer), pool)


def _tell(record: dict[str, Any], log: TextIO) -> None:
    line = json.dumps(record)
    print(line, flush=True)
    print(line, file=log, flush=True)


if __name__ == "__main__":
    typer.run(pretrain)
