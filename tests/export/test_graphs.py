"""The modules that are traced compute what MicroCLIP computes."""

import copy
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.export import graphs as export_graphs
from microclip_deploy.export.graphs import (
    PIXEL_CENTER,
    PIXEL_SCALE,
    BackboneGraph,
    Everything,
    FullGraph,
    HeadGraph,
    unit,
)
from microclip_deploy.export.proof.probes import made_up_photos
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.model.token_fusion import fused_embedding
from microclip_deploy.ncut.steps import adjacency, well_posed

if TYPE_CHECKING:
    from tests.export.conftest import Golden, Subject

# docs/numerics.md section 9.
TOLERANCE = {"cls": 2e-6, "attention": 2e-6, "fg": 5e-6, "logits": 5e-5}
TOKEN_ATOL = 5e-5


def graphs(
    model: MicroCLIP, preprocess: Preprocess, dtype: torch.dtype = torch.float32
) -> FullGraph:
    tower = model.backbone.weights()
    return FullGraph(BackboneGraph(tower, preprocess, dtype), HeadGraph(model), model.ncut).eval()


def ask(
    model: MicroCLIP, preprocess: Preprocess, images: Tensor, dtype: torch.dtype = torch.float32
) -> Everything:
    return Everything(*graphs(model, preprocess, dtype)(images, model.class_matrix()))


@pytest.fixture(scope="module")
def answers(golden: "Golden") -> Everything:
    """Return what the graphs say to the reference's images."""
    with torch.inference_mode():
        return ask(golden.model, golden.preprocess, torch.from_numpy(golden.images))


def test_graphs_equal_the_reference(golden: "Golden", answers: Everything) -> None:
    posed = golden.answers["well_posed"]
    assert posed.sum() > 4
    for name, tolerance in TOLERANCE.items():
        expected = golden.answers["attn" if name == "attention" else name]
        value = getattr(answers, name)
        np.testing.assert_allclose(value[posed], expected[posed], atol=tolerance, rtol=0)
    np.testing.assert_allclose(answers.patches, golden.answers["tokens"], atol=TOKEN_ATOL, rtol=0)
    np.testing.assert_array_equal(answers.mask[posed], golden.answers["mask"][posed])


def test_folding_loses_no_digits(golden: "Golden", answers: Everything) -> None:
    posed, exact = golden.answers["well_posed"], golden.answers["logits_f64"]
    with torch.inference_mode():
        plain = golden.model(golden.preprocess.normalize(torch.from_numpy(golden.images))).logits
    logits = (plain, answers.logits)
    errors = [np.abs(value.numpy() - exact)[posed].max() for value in logits]
    assert errors[1] < 2 * errors[0]


def test_unusual_towers_and_poolings_are_covered(odd: "Subject") -> None:
    model, preprocess = odd
    images = torch.from_numpy(made_up_photos(preprocess.size).views(preprocess))
    with torch.inference_mode():
        network_input = preprocess.normalize(images)
        expected = model(network_input)
        found = ask(model, preprocess, images)
        patches = model.backbone(network_input).patches
        embedding = fused_embedding(found.cls, found.fg, model.cls_share)
    agreement = model.agreement(expected.cls, patches)
    determined = well_posed(adjacency(patches, model.ncut), model.ncut, agreement)
    assert determined.sum() > 12
    np.testing.assert_allclose(found.cls, expected.cls, atol=TOLERANCE["cls"], rtol=0)
    np.testing.assert_allclose(found.embedding, embedding, atol=1e-6, rtol=0)
    for name in ("attention", "fg", "logits"):
        got, wanted = (getattr(part, name)[determined] for part in (found, expected))
        np.testing.assert_allclose(got, wanted, atol=TOLERANCE[name], rtol=0)
    np.testing.assert_array_equal(found.mask[determined], expected.saliency.mask[determined])


def test_the_algebra_is_exact_in_float64(golden: "Golden", monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(tensor: Tensor, _: torch.dtype) -> nn.Parameter:
        return nn.Parameter(tensor.detach().double(), requires_grad=False)

    monkeypatch.setattr(export_graphs, "_frozen", frozen)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    model, preprocess = copy.deepcopy(golden.model).double(), golden.preprocess
    images, posed = torch.from_numpy(golden.images), golden.answers["well_posed"]
    mean, std = torch.tensor([preprocess.mean, preprocess.std], dtype=torch.float64)
    with torch.inference_mode():
        expected = model(((images.double() / 255 - mean) / std).permute(0, 3, 1, 2))
        found = ask(model, preprocess, images, torch.float64)
    assert found.logits.dtype == torch.float64
    np.testing.assert_allclose(found.logits[posed], expected.logits[posed], atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_centred_pixels_are_exact_in_half_precision(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    exact = (levels.double() - PIXEL_CENTER) / PIXEL_SCALE
    found = (levels.to(dtype) - PIXEL_CENTER) * (1 / PIXEL_SCALE)
    assert found.dtype == dtype
    assert (found.double() == exact).all()


def test_a_featureless_image_is_complete_and_gives_every_token(tiny: "Subject") -> None:
    model, preprocess = tiny
    model = copy.deepcopy(model)
    with torch.inference_mode():
        model.backbone.visual.positional_embedding.zero_()
        image = torch.full((2, 32, 32, 3), 90, dtype=torch.uint8)
        image[1, 4:12, 8:30] = 250
        found = ask(model, preprocess, image)
    assert found.complete.tolist() == [True, False]
    assert found.mask[0].all()
    assert not found.mask[1].all()
    assert torch.isfinite(found.logits).all()


def test_the_head_alone_equals_the_model_with_any_mask(tiny: "Subject") -> None:
    model, preprocess = tiny
    cls, patches = model.backbone(preprocess.normalize(torch.zeros(2, 32, 32, 3).byte()))
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    classifier = F.normalize(torch.randn(7, 32), dim=-1)
    with torch.inference_mode():
        found = HeadGraph(model)(cls, patches, mask, classifier)
        pooled = model.pooling(patches, mask)
        fg = model.backbone.project(pooled.vector)
    torch.testing.assert_close(found.attention, pooled.attention, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.fg, fg, atol=1e-6, rtol=0)
    assert found.logits.shape == (2, 7)


def test_making_graphs_leaves_the_model_as_it_was(tiny: "Subject") -> None:
    model, preprocess = tiny
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        graphs(model, preprocess, torch.bfloat16)(
            torch.zeros(1, 32, 32, 3).byte(), model.class_matrix()
        )
    assert all(torch.equal(before[name], part) for name, part in model.state_dict().items())


def test_the_heads_parameters_are_its_folded_matrices(odd: "Subject") -> None:
    head = odd.model.head()
    wanted = {"project": head.project, "match": head.match}
    found = dict(HeadGraph(odd.model).named_parameters())
    assert found.keys() == {name for name, matrix in wanted.items() if matrix is not None}
    for name, parameter in found.items():
        np.testing.assert_array_equal(parameter.numpy(), wanted[name])


def test_unit_is_normalize() -> None:
    rows = torch.tensor([[3.0, 4.0], [1e-5, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(unit(rows), F.normalize(rows, dim=-1))
