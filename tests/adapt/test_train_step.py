"""Four iterations against the reference's numbers, in float32 and float64 (docs/numerics.md 9)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from microclip_deploy.adapt.train_step import (
    AdaptConfig,
    Step,
    Views,
    learning_rate,
    make_optimizer,
    train_step,
)
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.model.text import heads_from_embeddings
from microclip_deploy.ncut.spec import NCutSpec

GOLDEN = Path(__file__).parent.parent / "vectors" / "train_step.npz"

# Spec tolerances. A float32 run is compared with the reference's float32 run.
LOSS_RTOL = 1e-5
GRADIENT_NORM_RTOL = 1e-5
PARAMETER_ATOL = 2e-6
LOGIT_ATOL = 5e-5
EMBEDDING_ATOL = 5e-6
TEXT_ATOL = 2e-6


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(GOLDEN)


def tensor(golden: Any, name: str) -> torch.Tensor:
    return torch.from_numpy(golden[name])


def test_text_heads_equal_the_reference(golden: Any) -> None:
    groups = tensor(golden, "desc_raw").split(golden["desc_counts"].tolist())
    heads = heads_from_embeddings(tensor(golden, "class_prompts_raw"), groups)
    names = ("classname_emb", "frozen_classifier", "classifier_init")
    for found, name in zip((heads.names, heads.frozen, heads.initial), names, strict=True):
        torch.testing.assert_close(found, tensor(golden, name), atol=TEXT_ATOL, rtol=0)


def test_schedule_equals_the_reference(golden: Any) -> None:
    rates = [learning_rate(AdaptConfig(), i, 6) for i in range(6)]
    np.testing.assert_allclose(rates, golden["lr_schedule"], rtol=1e-12)


def reference_name(name: str) -> str:
    return name.removeprefix("backbone.").removeprefix("pooling.")


def suffix(dtype: torch.dtype) -> str:
    return "f64" if dtype == torch.float64 else "f32"


def views_of(golden: Any, step: int, dtype: torch.dtype) -> Views:
    names = (f"step{step}/{view}_i16" for view in ("weak", "strong", "crops"))
    return Views(*(tensor(golden, name).to(dtype) / 256 for name in names))


def build(golden: Any, dtype: torch.dtype) -> MicroCLIP:
    clip = open_clip.model.CLIP(**json.loads(str(golden["openclip_cfg_json"])))
    visual = {k[10:]: tensor(golden, k) for k in golden.files if k.startswith("sd/visual.")}
    clip.visual.load_state_dict(visual)
    clip.requires_grad_(False)
    groups = tensor(golden, "desc_raw").split(golden["desc_counts"].tolist())
    heads = heads_from_embeddings(tensor(golden, "class_prompts_raw"), groups)
    return MicroCLIP(VisionBackbone(clip.visual), heads, ncut=NCutSpec()).to(dtype).eval()


def run(golden: Any, model: MicroCLIP, dtype: torch.dtype) -> list[Step]:
    config = AdaptConfig(lr=1e-4)
    optimizer = make_optimizer(model.trainable(), config)
    steps: list[Step] = []
    for i, rate in enumerate(golden["lr_used"]):
        average = None if i in (0, 3) else steps[-1].losses.average  # step 3 starts an epoch
        if i == 3:
            check_parameters(golden, model, dtype)
        views = views_of(golden, i, dtype)
        steps.append(train_step(model, optimizer, views, config, average=average, rate=float(rate)))
        check_gradients(golden, model, i, dtype)
    return steps


def check_parameters(golden: Any, model: MicroCLIP, dtype: torch.dtype) -> None:
    for name, parameter in model.trainable().items():
        expected = tensor(golden, f"after3_{suffix(dtype)}/{reference_name(name)}").to(dtype)
        torch.testing.assert_close(parameter.detach(), expected, atol=PARAMETER_ATOL, rtol=0)


def check_gradients(golden: Any, model: MicroCLIP, i: int, dtype: torch.dtype) -> None:
    norms = {
        reference_name(name): p.grad.norm().item()
        for name, p in model.trainable().items()
        if p.grad is not None
    }
    names = golden["param_names"].tolist()
    assert set(norms) == set(names)
    found = [norms[name] for name in names]
    np.testing.assert_allclose(
        found, golden[f"grad_norm_{suffix(dtype)}"][i], rtol=GRADIENT_NORM_RTOL
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_four_steps_equal_the_reference(golden: Any, dtype: torch.dtype) -> None:
    steps = run(golden, build(golden, dtype), dtype)
    for i, step in enumerate(steps):
        np.testing.assert_array_equal(step.chosen, golden["pseudo_labels"][i])
        np.testing.assert_array_equal(step.labels.weak.saliency.mask, golden["mask_weak"][i])
        np.testing.assert_array_equal(step.output.saliency.mask, golden["mask_strong"][i])
        arrays = {
            "pseudo_logits": (step.labels.aggregated, EMBEDDING_ATOL),
            "weak_cls": (step.labels.weak.cls, EMBEDDING_ATOL),
            "weak_fg": (step.labels.weak.fg, EMBEDDING_ATOL),
            "strong_fg": (step.output.fg.detach(), EMBEDDING_ATOL),
            "output_logits": (step.output.logits.detach(), LOGIT_ATOL),
            "probs_avg": (step.losses.average.detach(), EMBEDDING_ATOL),
        }
        for name, (found, atol) in arrays.items():
            expected = golden[f"{name}_{suffix(dtype)}"][i]
            np.testing.assert_allclose(found, expected, atol=atol, rtol=0)
        scalars = {
            "ce": step.losses.cross_entropy,
            "fairness": step.losses.fairness,
            "total": step.losses.total,
        }
        for name, value in scalars.items():
            expected = golden[f"{name}_{suffix(dtype)}"][i]
            np.testing.assert_allclose(value.item(), expected, rtol=LOSS_RTOL)


def test_first_gradient_equals_the_reference(golden: Any) -> None:
    model, config = build(golden, torch.float64), AdaptConfig()
    optimizer = make_optimizer(model.trainable(), config)
    views = views_of(golden, 0, torch.float64)
    train_step(model, optimizer, views, config, average=None, rate=1e-4)
    for name, parameter in model.trainable().items():
        assert parameter.grad is not None
        expected = tensor(golden, f"grad1/{reference_name(name)}")
        torch.testing.assert_close(parameter.grad, expected, atol=1e-9, rtol=1e-6)


def test_bf16_touches_the_encoder_and_nothing_behind_it(golden: Any) -> None:
    model, config = build(golden, torch.float32), AdaptConfig(precision="bf16")
    views = views_of(golden, 0, torch.float32)
    optimizer = make_optimizer(model.trainable(), config)
    step = train_step(model, optimizer, views, config, average=None, rate=1e-4)
    assert step.labels.aggregated.dtype == torch.float32
    # What the prior adds lies in the span of the frozen head to float32 precision; products in
    # bfloat16 would leave 4e-3.
    matrix = torch.nn.functional.normalize(tensor(golden, "classifier_init").double(), dim=-1)
    weak = step.labels.weak
    fused = torch.nn.functional.normalize(0.5 * (weak.cls + weak.fg).double(), dim=-1)
    prior = 2 * (step.labels.aggregated.double() - 0.5 * fused @ matrix.T)
    frozen = model.frozen.double()
    span = prior @ torch.linalg.pinv(frozen).T @ frozen.T
    torch.testing.assert_close(span, prior, atol=1e-5, rtol=0)
