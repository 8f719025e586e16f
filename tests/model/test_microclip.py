"""The forward pass against the reference's numbers (docs/numerics.md sections 1 to 5)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.microclip import MicroCLIP, Output
from microclip_deploy.model.soap import SOAP
from microclip_deploy.model.text import TextHeads
from microclip_deploy.ncut.spec import NCutSpec

DATA = Path(__file__).parent.parent / "vectors"
FAMILIES = ("g7", "g14", "h2")

# The reference itself is float32; its tolerances are stated in docs/numerics.md section 9.
TOLERANCE = {"cls": 2e-6, "attention": 2e-6, "fg": 5e-6, "logits": 5e-5}
TOKEN_ATOL = 5e-5


def build(golden: Any, dtype: torch.dtype = torch.float32) -> MicroCLIP:
    clip = open_clip.model.CLIP(**json.loads(str(golden["openclip_cfg_json"])))
    state = {k: torch.from_numpy(golden[k]) for k in golden.files if k.startswith(("sd/", "soap/"))}
    clip.visual.load_state_dict(
        {k.removeprefix("sd/visual."): v for k, v in state.items() if k.startswith("sd/")}
    )
    classes = torch.from_numpy(golden["classifier_raw"])
    heads = TextHeads(classes, classes, classes)
    model = MicroCLIP(VisionBackbone(clip.visual), heads, ncut=NCutSpec())
    model.pooling.load_state_dict(
        {k.removeprefix("soap/"): v for k, v in state.items() if k.startswith("soap/")}
    )
    return model.to(dtype).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request: pytest.FixtureRequest) -> Any:
    return np.load(DATA / f"forward_{request.param}.npz")


@pytest.fixture(scope="module")
def output(golden: Any) -> Output:
    with torch.no_grad():
        found: Output = build(golden)(torch.from_numpy(golden["images"]))
    return found


def test_embeddings_and_logits_equal_the_reference(golden: Any, output: Output) -> None:
    posed = golden["well_posed"]
    found = {
        "cls": output.cls,
        "attention": output.attention,
        "fg": output.fg,
        "logits": output.logits,
    }
    for name, value in found.items():
        expected = golden["attn" if name == "attention" else name]
        np.testing.assert_allclose(value[posed], expected[posed], atol=TOLERANCE[name], rtol=0)


def test_masks_equal_the_reference(golden: Any, output: Output) -> None:
    posed = golden["well_posed"]
    np.testing.assert_array_equal(output.saliency.mask[posed], golden["mask"][posed])


def test_constant_image_is_complete_and_gives_every_token(output: Output) -> None:
    assert output.saliency.complete[-1]
    assert output.saliency.mask[-1].all()
    assert torch.isfinite(output.logits).all()


def test_patch_tokens_equal_the_reference(golden: Any) -> None:
    with torch.no_grad():
        patches = build(golden).backbone(torch.from_numpy(golden["images"])).patches
    np.testing.assert_allclose(patches, golden["tokens"], atol=TOKEN_ATOL, rtol=0)


def test_float64_equals_the_float64_reference(golden: Any) -> None:
    posed = golden["well_posed"]
    with torch.no_grad():
        found = build(golden, torch.float64)(torch.from_numpy(golden["images"]).double())
    np.testing.assert_allclose(found.logits[posed], golden["logits_f64"][posed], atol=1e-9, rtol=0)


def test_identity_maps_equal_the_reference(golden: Any) -> None:
    posed = golden["well_posed"]
    model = build(golden)
    model.pooling = SOAP(model.backbone.width)
    with torch.no_grad():
        found = model(torch.from_numpy(golden["images"]))
    np.testing.assert_allclose(found.fg[posed], golden["fg_identity"][posed], atol=5e-6, rtol=0)
    np.testing.assert_allclose(
        found.attention[posed], golden["attn_identity"][posed], atol=2e-6, rtol=0
    )


def test_cls_alone_equals_the_full_pass_and_open_clip(golden: Any, output: Output) -> None:
    with torch.no_grad():
        alone = build(golden).encode_cls(torch.from_numpy(golden["images"]))
    np.testing.assert_allclose(alone, output.cls, atol=TOLERANCE["cls"], rtol=0)
    np.testing.assert_allclose(alone, golden["openclip_cls"], atol=TOLERANCE["cls"], rtol=0)


def test_trainable_tensors_are_layer_norms_maps_and_classes(golden: Any) -> None:
    model = build(golden)
    for name in model.trainable():
        assert ".ln_" in name or name.startswith("pooling.") or name == "classifier"
    assert sum(".ln_" in name for name in model.trainable()) == 2 * (
        2 + 2 * len(model.backbone.visual.transformer.resblocks)
    )


def test_graph_stays_in_float32_under_autocast(golden: Any) -> None:
    model = build(golden)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(torch.from_numpy(golden["images"]))
    assert found.logits.dtype == torch.float32
    assert found.saliency.vector.dtype == torch.float64
