"""The objective that the tiny model of the objects benchmark was pretrained with."""

import torch

from microclip_deploy.bench.objects_model.pretrain import _coherence, _encode, _local, _named
from microclip_deploy.model.backbone import VisionBackbone
from microclip_deploy.model.clip import BackboneSpec, load_clip


def test_companions_in_a_scene_are_no_mistake() -> None:
    logits = torch.tensor([[9.0, 9.0, 0.0], [0.0, 9.0, 9.0]])
    both = _named(logits, torch.tensor([[0, 1], [1, -1]]))
    # The first scene is right about both; the second is torn between its object and another.
    torch.testing.assert_close(both, torch.tensor([0.0, 0.0, 0.693]).mean(), atol=1e-3, rtol=0)


def test_things_are_told_from_the_classes_and_from_what_is_shown() -> None:
    things, labels = _local(torch.tensor([[3, 700], [50, -1]]))
    assert things.tolist() == [*range(42), 50, 700]
    assert labels.tolist() == [[3, 43], [42, -1]]


def test_coherence_is_nothing_where_object_and_ground_are_apart() -> None:
    shown = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    apart = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.2], [-1.0, 0.2]]])
    scene = torch.tensor([0])
    assert _coherence(apart, scene, shown, 1 - shown) == 0
    assert _coherence(torch.ones(1, 4, 2), scene, shown, 1 - shown) > 1


def test_a_small_scene_takes_the_positions_of_a_window() -> None:
    backbone: VisionBackbone = load_clip(BackboneSpec(model="demo-objects")).vision
    whole = backbone.visual.positional_embedding
    found = _encode(backbone, torch.zeros(2, 3, 48, 48), torch.Generator().manual_seed(0))
    assert found.patches.shape == (2, 36, 128)
    assert backbone.visual.positional_embedding is whole
