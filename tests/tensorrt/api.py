"""Names and signatures of an importable TensorRT, as its bindings themselves tell them.

`python tests/tensorrt/api.py` prints them as JSON. It needs the standard library and `tensorrt`.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple, Self, SupportsInt, TypedDict


class Property(TypedDict):
    """A property of a class."""

    type: str
    """Empty where the bindings do not tell."""
    writable: bool


class ClassApi(TypedDict):
    """A class without what it inherits. Signatures have no self."""

    bases: list[str]
    init: list[str]
    methods: dict[str, list[str]]
    properties: dict[str, Property]
    attributes: dict[str, str]
    """Types of the other attributes."""


class Api(TypedDict):
    """A version's public names; nested classes are named Outer.Inner."""

    version: str
    classes: dict[str, ClassApi]
    enums: dict[str, dict[str, int]]
    functions: dict[str, list[str]]
    values: dict[str, str]
    """Types of the other names of the module."""


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


def dump(trt: ModuleType) -> Api:
    """Return the public names of the module."""
    api: Api = {
        "version": trt.__version__,
        "classes": {},
        "enums": {},
        "functions": {},
        "values": {"__version__": "str"},
    }
    for name, value in sorted(vars(trt).items()):
        if name.startswith("_") or name in _LEAKED or inspect.ismodule(value):
            continue
        if isinstance(value, type):
            _dump_class(value, name, api)
        elif callable(value):
            api["functions"][name] = signatures(value, name)
        else:
            api["values"][name] = type(value).__qualname__
    return api


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


_LEAKED = ("attr", "value", "common_enter", "common_exit")
"""Names that the package's own code leaves behind."""
_SPECIAL = ("__bool__", "__call__", "__contains__", "__getitem__", "__iter__", "__len__")
_NAMESPACES = re.compile(
    r"\b(?:(?:tensorrt\.tensorrt|typing|typing_extensions|collections\.abc)\."
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


def _dump_class(kind: type, name: str, api: Api) -> None:
    if (members := enum_members(kind)) is not None:
        api["enums"][name] = {member: int(value) for member, value in members.items()}
        return
    entry = api["classes"][name] = ClassApi(
        bases=[base.__name__ for base in kind.__bases__ if base.__module__ == kind.__module__],
        init=method_signatures(kind, "__init__") if "__init__" in vars(kind) else [],
        methods={},
        properties={},
        attributes={},
    )
    for member, value in vars(kind).items():
        if member.startswith("_") and member not in _SPECIAL:
            continue
        if isinstance(value, type):
            _dump_class(value, f"{name}.{member}", api)
        elif isinstance(value, property):
            writable = value.fset is not None
            entry["properties"][member] = {"type": returned_type(value.fget), "writable": writable}
        elif callable(getattr(kind, member)):
            entry["methods"][member] = method_signatures(kind, member)
        else:
            entry["attributes"][member] = type(value).__qualname__


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


if __name__ == "__main__":
    import tensorrt

    json.dump(dump(tensorrt), sys.stdout)
