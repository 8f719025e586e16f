"""The layers of a plan as the builder lists them, in the one message that begins with "Layers:".

TensorRT for RTX tells it after a build in detailed verbosity; a plan of its cannot be inspected
without a device. The form is documented nowhere: what cannot be read is left out.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

_LAYER = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*)\], "
    r"Constants: \[(?P<constants>.*)\], Outputs: \[(?P<outputs>.*)\], TacticName:"
)
_TYPE = re.compile(r"Datatype: (\w+)")
_FUSED_ATTENTION = "_gemm_mha"


class Layer(NamedTuple):
    """One kernel, or what comes between two."""

    name: str
    kind: str
    """As the builder names it, such as "gemm" or "kgen"."""
    inputs: tuple[str, ...]
    """Types, such as "Half"."""
    constants: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def precision(self) -> str:
        """Return the types of what it computes, such as "Half"."""
        return ", ".join(sorted(set(self.outputs))) or "none"


def read_layers(listing: str) -> tuple[Layer, ...]:
    """Read the builder's message; an empty one has no layers."""
    found = filter(None, map(_LAYER.match, listing.splitlines()))
    return tuple(
        Layer(
            each["name"],
            each["kind"],
            *(tuple(_TYPE.findall(each[part])) for part in ("inputs", "constants", "outputs")),
        )
        for each in found
    )


def types_of(layers: Iterable[Layer]) -> Counter[str]:
    """Count the types of what layers read and write."""
    return Counter(kind for each in layers for kind in (*each.inputs, *each.outputs))


def fused_attention(layers: Iterable[Layer]) -> int:
    """Count the attentions that are one kernel; of two profiles, each counts."""
    return sum(_FUSED_ATTENTION in each.name for each in layers)
