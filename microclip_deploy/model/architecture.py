"""What decides a CLIP model's answers besides its weights, read off the model itself.

Weights of one sha256 answer differently with GELU and with QuickGELU, with other attention heads,
or behind another tokenizer. The record is kept with a run and with its exports.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import nn

# Letters, case, an accent, digits and punctuation: tokenizers differ in one of them.
_PROBE = ("a photo of 2 red circles.", "Größe: 10% (it's UPPER-case_)!")


def architecture(clip: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Return a record, of JSON values, that is equal for models that compute the same function.

    Args:
        clip: an open_clip model, built without patch dropout.
        tokenizer: the one that goes with it.
    """
    text = getattr(clip, "text", clip)
    towers: dict[str, list[nn.Module]] = {"vision": [], "text": []}
    for name, module in clip.named_modules():
        towers["vision" if name.partition(".")[0] == "visual" else "text"].append(module)
    tokens = tokenizer(list(_PROBE)).numpy()
    return {
        **{f"{tower} {fact}": v for tower, m in towers.items() for fact, v in _facts(m).items()},
        "text pooling": getattr(text, "text_pool_type", getattr(text, "pool_type", None)),
        "text is causal": getattr(text, "attn_mask", None) is not None,
        "tokens": hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()[:16],
    }


def _facts(modules: Iterable[nn.Module]) -> dict[str, list[Any]]:
    """Return what parameters do not show of some modules; each value once."""
    activations, heads, eps = set[str](), set[int](), set[float]()
    for module in modules:
        if isinstance(count := getattr(module, "num_heads", None), int):
            heads.add(count)
        if isinstance(epsilon := getattr(module, "eps", None), float):
            eps.add(epsilon)
        if _is_activation(module):
            form = getattr(module, "approximate", "none")
            name = type(module).__name__
            activations.add(name if form == "none" else f"{name} ({form})")
    return {"activations": sorted(activations), "heads": sorted(heads), "eps": sorted(eps)}


def _is_activation(module: nn.Module) -> bool:
    """Say whether a module has neither parts nor parameters and changes what goes through it."""
    empty = not [*module.children(), *module.parameters()]
    return empty and not isinstance(module, nn.Identity | nn.Dropout)
