"""Everything that decides the pretrained weights, as frozen settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["STAGES", "PretrainSettings", "Stage"]


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Everything that decides the pretrained weights."""

    seed: int = 0
    """Seed of images, captions, order and initial weights."""
    pool_images: int = 40_000
    """Source images, rendered once and augmented by small affine maps at every use."""
    warmup_steps: int = 50
    """Steps of linear warm-up at the start of each stage."""
    muon_lr: float = 8e-3
    """Peak rate of Muon, for the 2-D weights of the blocks."""
    adamw_lr: float = 3e-3
    """Peak rate of AdamW, for everything else."""
    weight_decay: float = 0.05
    """Decoupled decay of the Muon weights."""
    dense_weight: float = 0.5
    """Weight of the contrastive term on pooled value-path tokens."""
    spread_weight: float = 1.0
    """Weight of the penalty on a mean pairwise cosine of the tokens of one image above 0.25."""
    merges: int = 600
    """Most merges of the tokenizer."""
    threads: int = 2
    """Torch threads; part of the settings because it decides the order of sums."""
    evaluate_every: int = 100
    """Steps between two accuracy measurements on source images."""
    checkpoint_every: int = 0
    """Steps between two written models; 0 writes one at the end of each stage."""


class Stage(NamedTuple):
    """One run of the optimisers, from fresh momenta; one image of each glyph per step."""

    steps: int
    """Steps taken."""
    cosine_steps: int
    """Length of the cosine that the rates follow; longer than `steps` stops it early."""
    peak: float
    """Share of the peak rates of the settings."""


STAGES = (Stage(1200, 1600, 1.0), Stage(900, 900, 0.6))
"""A warm restart: the first cosine ended where the marks had only begun to be told apart."""
