"""How TensorRT's functions can be called, as the docstrings of its bindings tell."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple, Self, SupportsInt


class Parameter(NamedTuple):
    """A parameter of a function."""

    name: str
    type: str
    """Empty where the bindings do not tell."""
    is_optional: bool


class Signature(NamedTuple):
    """One way to call a function."""

    parameters: tuple[Parameter, ...]
    returns: str
    is_open: bool
    """Takes other arguments too."""

    @classmethod
    @cache
    def parse(cls, text: str) -> Self:
        """Read what `signatures` returns, such as "(a: int, b: str = None) -> bool"."""
        found = re.fullmatch(r"\((.*)\)(?: -> (.*))?", text)
        assert found, text
        parts = list(_split(found[1]))
        named = [part for part in parts if re.match(r"\w", part)]
        return cls(tuple(map(_parameter, named)), found[2] or "", len(named) < len(parts))

    def bind(
        self, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> dict[Parameter, object] | None:
        """Return the value of each parameter, or None where the arguments do not fit."""
        positional, rest = self.parameters[: len(args)], self.parameters[len(args) :]
        bound = dict(zip(positional, args, strict=False))
        bound |= {each: kwargs[each.name] for each in rest if each.name in kwargs}
        complete = all(each.is_optional or each in bound for each in rest)
        all_used = len(bound) == len(args) + len(kwargs)
        return bound if self.is_open or (complete and all_used) else None


def signatures(function: object, name: str = "", *, drop_self: bool = False) -> list[str]:
    """Return every way to call a function, as its docstring or Python tells.

    Args:
        function: a function of the module or a class; or a getter or setter, which has no name.
        name: what its docstring calls it.
        drop_self: leave out the first parameter.
    """
    doc = getattr(function, "__doc__", None) or ""
    found = re.findall(rf"^\s*(?:\d+\. )?{re.escape(name)}(\(.*\) -> .*)$", doc, re.MULTILINE)
    if not doc.startswith(f"{name}(*args, **kwargs)\nOverloaded"):
        # Further lines of this form are text.
        found = found[:1]
    if not found and inspect.isfunction(function):
        found = [str(inspect.signature(function))]
    texts = map(_in_plain_names, found)
    return [re.sub(r"^\(\w+(?:: [\w.]+)?(?:, )?", "(", t) if drop_self else t for t in texts]


def method_signatures(kind: type, name: str) -> list[str]:
    """Return every way to call a method on an object."""
    is_static = isinstance(inspect.getattr_static(kind, name), staticmethod)
    return signatures(getattr(kind, name), name, drop_self=not is_static)


def enum_members(kind: type) -> dict[str, SupportsInt] | None:
    """Return the members of an enum, or None for another class. It is not one of Python's."""
    return getattr(kind, "__members__", None)


def returned_type(getter: object) -> str:
    """Return the type of a property."""
    return next((Signature.parse(text).returns for text in signatures(getter)), "")


def accepted_type(setter: object) -> str:
    """Return the type that a property can be set to."""
    return next((Signature.parse(text).parameters[-1].type for text in signatures(setter)), "")


_NAMESPACES = re.compile(
    r"\b(?:(?:tensorrt\.tensorrt|tensorrt_rtx_bindings\.tensorrt_rtx|typing|typing_extensions|collections\.abc)\."
    r"|(?:nvinfer1|nvonnxparser|v_1_0)::)"
)
_ALIASES = {
    "IBuilder": "Builder",
    "IParserError": "ParserError",
    "SupportsFloat": "float",
    "SupportsInt": "int",
}
"""What docstrings call by another name than users do."""
_ALIAS = re.compile(rf"\b(?:{'|'.join(_ALIASES)})\b")


def _in_plain_names(text: str) -> str:
    return _ALIAS.sub(lambda found: _ALIASES[found[0]], _NAMESPACES.sub("", text))


def _split(parameters: str) -> Iterator[str]:
    """Split at the commas outside all brackets."""
    depth, start = 0, 0
    for index, character in enumerate(f"{parameters},"):
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            if part := parameters[start:index].strip():
                yield part
            start = index + 1


def _parameter(text: str) -> Parameter:
    found = re.fullmatch(r"(\w+)(?:: (.*?))?( ?=.*)?", text)
    assert found, text
    return Parameter(found[1], found[2] or "", found[3] is not None)
