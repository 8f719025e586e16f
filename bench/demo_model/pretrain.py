"""Pretrain the tiny CLIP of the benchmark from nothing but rendered letters.

How to reproduce the shipped model (an hour or less on two CPU cores, no network):

    python -m microclip_deploy.bench.demo_model.pretrain --out model

The defaults are the settings of `microclip_deploy/demo/model/`; the seed fixes images, captions,
their order and the initial weights, so a run on the same torch build and thread count gives the
same numbers (other builds sum in another order and end close by). `--first-stage 1` goes on after
a finished stage 0 in the folder; `--first-stage 2` only scores the weights again. On cores shared
with other programs set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait are slow there.
The folder holds:

    open_clip_config.json          architecture, preprocessing, and the name of the merges file
    open_clip_model.safetensors    float16 weights
    bpe_merges.txt.gz              tokenizer merges, trained on the captions
    pretrain-log.jsonl             settings, losses and accuracies over the steps, final scores

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

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from microclip_deploy.artifact import write_bytes, write_json
from microclip_deploy.bench.demo_model.bpe import merges_bytes, train_merges
from microclip_deploy.bench.demo_model.pool import ImagePool, render_pool
from microclip_deploy.bench.demo_model.settings import STAGES, PretrainSettings, Stage
from microclip_deploy.bench.demo_model.zero_shot import (
    Branches,
    Encoder,
    class_weights,
    images_to_tensor,
    score,
)
from microclip_deploy.demo.glyphs import (
    CLASS_CHARACTERS,
    PRETRAINING_CHARACTERS,
    PrintStyle,
    caption,
)
from microclip_deploy.demo.render import (
    HELD_OUT_FACES,
    SOURCE,
    SOURCE_FACES,
    TARGET,
    TARGET_SEVERITY,
    Domain,
)

__all__ = ["pretrain"]

_CONFIG = "open_clip_config.json"
_WEIGHTS = "open_clip_model.safetensors"
_MERGES = "bpe_merges.txt.gz"
_LOG = "pretrain-log.jsonl"
_MAX_LOGIT_SCALE = math.log(100)
_MAX_TOKEN_COSINE = 0.25  # mean over the pairs of one image; more is penalised
# Streams of random numbers: pretraining pools never share one with the written image folders.
_TRAIN_SPLIT, _SEEN_SPLIT, _HELD_OUT_SPLIT, _TARGET_SPLIT = 100, 101, 102, 103


class _Losses(NamedTuple):
    """Terms of the objective, scalars."""

    cls: Tensor
    dense: Tensor
    spread: Tensor


def pretrain(
    out: Path,
    settings: PretrainSettings,
    stages: tuple[Stage, ...] = STAGES,
    *,
    first_stage: int = 0,
) -> dict[str, dict[str, float]]:
    """Pretrain and write the model folder.

    Args:
        out: folder to create or fill.
        settings: see `PretrainSettings`.
        stages: runs of the optimisers, one after the other.
        first_stage: stage to begin with; above 0 the folder holds the weights of the one before,
            and the number of stages only scores them again.

    Returns:
        Final scores by image set: seen source faces, held-out source faces, target.
    """
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    _begin_log(out, fresh=first_stage == 0)
    tokenizer = _write_tokenizer(out, settings)
    config = _model_config(tokenizer.vocab_size)
    _write_config(out, config)
    model = CLIP(**config)
    if first_stage < len(stages):
        plan = {"first_stage": first_stage, "stages": [stage._asdict() for stage in stages]}
        _append_log(out, {"event": "settings", **asdict(settings), **plan})
        train = _pool(PRETRAINING_CHARACTERS, SOURCE, settings.pool_images, settings, _TRAIN_SPLIT)
    for number in range(first_stage, len(stages)):
        if number > 0:  # the rounded weights, so that beginning here gives the same numbers
            model.load_state_dict(load_file(out / _WEIGHTS))
        _train(model, tokenizer, train, settings, stages[number], out, settings.seed + number)
        _write_weights(out, model)
    model.load_state_dict(load_file(out / _WEIGHTS))
    scores = _final_scores(model, tokenizer, settings)
    for name, values in scores.items():
        record = {"event": "final", "images": name, "target_severity": TARGET_SEVERITY}
        _append_log(out, record | values)
    return scores


def _model_config(vocab_size: int) -> dict[str, Any]:
    """Return the open_clip architecture: 1.2 M parameters, 8x8 patches of a 64x64 image."""
    vision = {
        "image_size": 64,
        "patch_size": 8,
        "width": 128,
        "layers": 4,
        "head_width": 32,
        "mlp_ratio": 4.0,
    }
    text = {
        "context_length": 32,
        "vocab_size": vocab_size,
        "width": 128,
        "heads": 4,
        "layers": 2,
    }
    return {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text, "quick_gelu": False}


def _write_config(out: Path, config: dict[str, Any]) -> None:
    text = {**config["text_cfg"], "tokenizer_kwargs": {"bpe_path": _MERGES}}
    preprocess = {
        "size": [64, 64],
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    content = {"model_cfg": {**config, "text_cfg": text}, "preprocess_cfg": preprocess}
    write_json(out / _CONFIG, content)


def _write_tokenizer(out: Path, settings: PretrainSettings) -> SimpleTokenizer:
    rng = Random(settings.seed)
    styles = [
        PrintStyle(style, ink, paper)
        for style in ("bold sans", "sans", "slanted mono", "bold slanted serif", "serif")
        for ink in ("black", "blue", "red", "green", "purple", "brown")
        for paper in ("white", "yellow", "pink", "grey", "cyan", "orange")
    ]
    captions = [caption(c, rng, rng.choice(styles)) for c in PRETRAINING_CHARACTERS * 200]
    path = out / _MERGES
    write_bytes(path, merges_bytes(train_merges(captions, settings.merges)))
    return SimpleTokenizer(bpe_path=str(path), context_length=32)


def _pool(
    characters: str, domain: Domain, count: int, settings: PretrainSettings, split: int
) -> ImagePool:
    return render_pool(characters, domain, count, seed=settings.seed, split=split)


def _train(
    model: CLIP,
    tokenizer: SimpleTokenizer,
    train: ImagePool,
    settings: PretrainSettings,
    stage: Stage,
    out: Path,
    seed: int,
) -> None:
    """Optimise `model` in place and log to `out`."""
    optimizers, encoder = _optimizers(model, settings), Encoder(model.visual)
    held_out = _pool(CLASS_CHARACTERS, Domain(faces=HELD_OUT_FACES), 820, settings, _HELD_OUT_SPLIT)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(train, seed)
    started = time.monotonic()
    for step in range(1, stage.steps + 1):
        _set_rates(optimizers, _rate(step, stage, settings.warmup_steps))
        images, captions = next(batches)
        augmented = _jitter(images_to_tensor(images), generator)
        losses = _losses(model, encoder, augmented, tokenizer(captions))
        loss = losses.cls + settings.dense_weight * losses.dense
        _step(model, loss + settings.spread_weight * losses.spread, optimizers)
        if step % settings.evaluate_every == 0 or step == stage.steps:
            record = {"event": "step", "step": step, "seconds": round(time.monotonic() - started)}
            record |= {name: round(term.item(), 4) for name, term in losses._asdict().items()}
            record["logit_scale"] = round(model.logit_scale.exp().item(), 2)
            weights = class_weights(model.encode_text, tokenizer)
            _append_log(out, record | score(encoder, weights, held_out))
        if settings.checkpoint_every and step % settings.checkpoint_every == 0:
            _write_weights(out, model)


def _batches(pool: ImagePool, seed: int) -> Iterator[tuple[NDArray[np.uint8], list[str]]]:
    """Yield one image and one caption of every glyph, forever, each image once per pass."""
    rng = Random(seed)
    glyphs = range(len(PRETRAINING_CHARACTERS))
    members = [np.flatnonzero(pool.labels == glyph) for glyph in glyphs]
    per_pass = min(len(indices) for indices in members)
    while True:
        orders = [rng.sample(list(indices), per_pass) for indices in members]
        for position in range(per_pass):
            chosen = [int(order[position]) for order in orders]
            captions = [
                caption(PRETRAINING_CHARACTERS[glyph], rng, pool.styles[index])
                for glyph, index in zip(glyphs, chosen, strict=True)
            ]
            yield pool.images[chosen], captions


def _losses(model: CLIP, encoder: Encoder, images: Tensor, texts: Tensor) -> _Losses:
    branches = cast(Branches, encoder(images))
    words = cast(Tensor, model.encode_text(texts, normalize=True))
    scale = model.logit_scale.exp()
    directions = functional.normalize(branches.patches, dim=-1)
    # |mean direction|^2 is the mean cosine over all pairs of tokens of one image.
    cosine = directions.mean(1).square().sum(-1)
    spread = functional.relu(cosine - _MAX_TOKEN_COSINE).mean()
    cls, dense = (_contrast(images, words, scale) for images in (branches.cls, branches.fg))
    return _Losses(cls, dense, spread)


def _contrast(images: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """Return CLIP's symmetric contrastive loss of matching rows."""
    logits = scale * images @ words.T
    pairs = torch.arange(len(logits))
    by_image = functional.cross_entropy(logits, pairs)
    return (by_image + functional.cross_entropy(logits.T, pairs)) / 2


def _jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the batch under small random scales, shears and shifts, float32 (B, 3, H, W)."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    scale, aspect, shear = uniform(0.85, 1.1), uniform(0.95, 1.05), uniform(-0.06, 0.06)
    top = torch.stack([scale * aspect, shear, uniform(-0.1, 0.1)], 1)
    bottom = torch.stack([torch.zeros(count), scale, uniform(-0.1, 0.1)], 1)
    grid = functional.affine_grid(
        torch.stack([top, bottom], 1), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _optimizers(model: CLIP, settings: PretrainSettings) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_block_matrix = parameter.ndim == 2 and "resblocks" in name
        (matrices if is_block_matrix else others).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=settings.muon_lr,
        weight_decay=settings.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def _rate(step: int, stage: Stage, warmup_steps: int) -> float:
    """Return the share of the peak rates at a step: linear warm-up times cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / stage.cosine_steps))
    return min(1.0, step / warmup_steps) * stage.peak * cosine


def _set_rates(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


def _step(model: CLIP, loss: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)


def _write_weights(out: Path, model: CLIP) -> None:
    """Round the weights to float16 in a copy and write them."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    write_bytes(out / _WEIGHTS, save(weights))


def _final_scores(
    model: CLIP, tokenizer: SimpleTokenizer, settings: PretrainSettings
) -> dict[str, dict[str, float]]:
    """Score the written weights on images no step has seen."""
    weights = class_weights(model.encode_text, tokenizer)
    encoder = Encoder(model.visual)
    sets = {
        "source, pretraining faces": (Domain(faces=SOURCE_FACES), _SEEN_SPLIT),
        "source, held-out faces": (Domain(faces=HELD_OUT_FACES), _HELD_OUT_SPLIT),
        "target": (TARGET, _TARGET_SPLIT),
    }
    return {
        name: score(encoder, weights, _pool(CLASS_CHARACTERS, domain, 1640, settings, split))
        for name, (domain, split) in sets.items()
    }


def _begin_log(out: Path, *, fresh: bool) -> None:
    """Empty the log, or keep the training in it and drop scores that are measured again."""
    path = out / _LOG
    lines = path.read_text().splitlines(keepends=True) if path.exists() and not fresh else []
    path.write_text("".join(line for line in lines if json.loads(line)["event"] != "final"))


def _append_log(out: Path, record: dict[str, Any]) -> None:
    line = json.dumps(record)
    with (out / _LOG).open("a") as log:
        log.write(line + "\n")
    print(line, flush=True)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the tiny CLIP of the benchmark.")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    for name, default in asdict(PretrainSettings()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=f"default {default}")
    parser.add_argument("--first-stage", type=int, default=0, help="go on after a finished stage")
    arguments = vars(parser.parse_args())
    out, first_stage = arguments.pop("out"), arguments.pop("first_stage")
    pretrain(out, PretrainSettings(**arguments), first_stage=first_stage)


if __name__ == "__main__":
    _main()
