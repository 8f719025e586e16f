"""Every vision tower that open_clip lists: exported and proven, or refused and listed in the docs.

Weights are random and towers two blocks deep, everything else is as configured. Takes an
hour or two; run with `pytest -m large`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.errors import CheckpointError
from microclip_deploy.export.proof.answers import Graphs
from microclip_deploy.export.proof.forward_error import forward_error
from microclip_deploy.export.proof.limits import Tolerance
from microclip_deploy.export.proof.parity import compare_pixels, prove
from microclip_deploy.export.proof.probes import Reference, made_up_photos
from microclip_deploy.export.to_onnx import write_graphs
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.microclip import MicroCLIP
from microclip_deploy.model.text import TextHeads
from microclip_deploy.ncut.spec import NCutSpec

DOCS = Path(__file__).parents[2] / "docs" / "backbones.md"
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1}

pytestmark = pytest.mark.large


def towers() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the configurations of vision transformers, one of those that only differ in depth."""
    seen = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        if "timm_model_name" in vision or isinstance(vision["layers"], list):
            continue
        shallow = {
            "embed_dim": config["embed_dim"],
            "quick_gelu": config.get("quick_gelu", False),
            "vision_cfg": {**vision, "layers": 2, "output_tokens": False},
            "text_cfg": TEXT,
        }
        if shallow not in seen:
            seen.append(shallow)
            yield name, shallow


def tower(config: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.model.CLIP(**config).visual.eval()


def is_refused(config: dict[str, Any]) -> bool:
    vision = config["vision_cfg"]
    return "pool_type" in vision or "attentional_pool" in vision


SERVED = [pytest.param(config, id=name) for name, config in towers() if not is_refused(config)]


@pytest.mark.parametrize("config", SERVED)
def test_a_tower_is_exported_and_proven(config: dict[str, Any], tmp_path: Path) -> None:
    visual = tower(config)
    classes = torch.randn(5, config["embed_dim"], generator=torch.Generator().manual_seed(0))
    spec = NCutSpec(affinity="cosine", threshold="otsu", side="object", fallback="cls")
    heads = TextHeads(classes, classes, classes)
    model = MicroCLIP(VisionBackbone(visual), heads, ncut=spec).eval()
    size = int(config["vision_cfg"]["image_size"])
    preprocess = Preprocess(size=size, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    write_graphs(model, preprocess, "fp32", tmp_path, {})
    photos = made_up_photos(size)
    views = photos.views(preprocess)
    reference = Reference.of(model, preprocess, views)
    proof = prove(
        Graphs(tmp_path, "fp32", spec, model.class_matrix().detach().numpy(), model.cls_share),
        reference,
        photos,
        tolerance=Tolerance(error=forward_error(model, preprocess, reference)),
        pixels=compare_pixels(photos.read(), views, preprocess),
    )
    assert proof.departure is None


def test_other_towers_are_refused_and_listed() -> None:
    listed = DOCS.read_text()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        plain = "timm_model_name" not in vision and not isinstance(vision["layers"], list)
        if plain and not is_refused(config):
            assert f"`{name}`" in listed
        elif plain:
            shallow = dict(towers()).get(name)
            if shallow is not None:
                with pytest.raises(CheckpointError, match="cannot carry microCLIP"):
                    VisionBackbone(tower(shallow))
            assert f"`{name}`" in listed
