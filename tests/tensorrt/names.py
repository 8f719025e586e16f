"""What a version of TensorRT has, and what expressions of a file can be; for usage.py."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.tensorrt.api import Api, Signature


@dataclass(frozen=True)
class Module:
    """The module `tensorrt`."""


@dataclass(frozen=True)
class Class:
    """A class or an enum of TensorRT's."""

    name: str


@dataclass(frozen=True)
class Instance:
    """An object of such a class, or a member of such an enum."""

    name: str


@dataclass(frozen=True)
class Function:
    """A function or method of TensorRT's."""

    name: str
    signatures: tuple[Signature, ...]


@dataclass(frozen=True)
class Other:
    """Something that exists, and is not followed further."""


@dataclass(frozen=True)
class Several:
    """Things to loop over."""

    item: "Value | None"


@dataclass(eq=False)
class OwnClass:
    """A class of the file."""

    base: str | None
    """The class of TensorRT's that it derives from."""
    members: "dict[str, Value | None]" = field(default_factory=dict)


@dataclass(frozen=True)
class OwnInstance:
    """An object of such a class."""

    of: OwnClass


@dataclass(eq=False)
class OwnFunction:
    """A function of the file."""

    parameters: tuple[str, ...]
    """Without self."""
    given: "dict[str, Value]" = field(default_factory=dict)
    """What it was called with."""
    result: "Value | None" = None


Value = (
    Module | Class | Instance | Function | Other | Several | OwnClass | OwnInstance | OwnFunction
)
OTHER = Other()

_CALLBACK_ARGUMENTS = {
    "IOutputAllocator.notify_shape": 2,
    "IOutputAllocator.reallocate_output": 4,
    "IOutputAllocator.reallocate_output_async": 5,
    "IStreamReaderV2.read": 2,
    "IStreamReaderV2.seek": 2,
    "IStreamWriter.write": 1,
}
"""Where they are not those of the signature."""


def first_known(values: "Iterable[Value | None]") -> "Value | None":
    """Return the first that is not None."""
    for value in values:
        if value is not None:
            return value
    return None


class Names:
    """The names and types of one version."""

    def __init__(self, api: Api) -> None:
        self.version = api["version"]
        self._api = api
        self._classes = api["classes"]
        self._enums = api["enums"]

    def find(self, owner: Value, name: str) -> Value | None:
        """Return an attribute of something of TensorRT's, or None where it does not exist."""
        special = OTHER if name.startswith("__") else None
        match owner:
            case Module():
                return self._of_module(name) or special
            case Class(kind) if kind in self._enums:
                return Instance(kind) if name in self._enums[kind] else special
            case Instance(kind) if kind in self._enums:
                return OTHER if name in ("name", "value", "itemsize") else special
            case Class(kind) | Instance(kind):
                return self.member(kind, name) or special
        return OTHER

    def member(self, kind: str, name: str) -> Value | None:
        """Return a member of a class or of what it derives from."""
        if f"{kind}.{name}" in self._enums:
            return Class(f"{kind}.{name}")
        entry = self._classes.get(kind)
        if entry is None:
            return None
        if name in entry["methods"]:
            return _function(f"{kind}.{name}", entry["methods"][name])
        if name in entry["properties"]:
            return self.typed(entry["properties"][name]["type"])
        if name in entry["attributes"]:
            return self.typed(entry["attributes"][name])
        return first_known(self.member(base, name) for base in entry["bases"])

    def is_read_only(self, kind: str, name: str) -> bool:
        """Tell a property that cannot be set, of a class or of what it derives from."""
        entry = self._classes.get(kind)
        if entry is None or name in entry["properties"]:
            return entry is not None and not entry["properties"][name]["writable"]
        return any(self.is_read_only(base, name) for base in entry["bases"])

    def callback_arguments(self, kind: str, name: str) -> int | None:
        """Return with how many arguments TensorRT calls an override, or None if it does not."""
        method = self.member(kind, name)
        if isinstance(method, Function):
            return _CALLBACK_ARGUMENTS.get(method.name, len(method.signatures[0].parameters))
        return _CALLBACK_ARGUMENTS.get(f"{kind}.{name}")

    def typed(self, type_name: str) -> Value:
        """Return an object of the type that a signature names."""
        if listed := re.fullmatch(r"list\[(.*)\]", type_name):
            return Several(self.typed(listed[1]))
        known = type_name in self._classes or type_name in self._enums
        return Instance(type_name) if known else OTHER

    def item(self, value: Value | None) -> Value | None:
        """Return what a loop over a value, or an index into it, gives."""
        if isinstance(value, Several):
            return value.item
        method = self.member(value.name, "__getitem__") if isinstance(value, Instance) else None
        return self.typed(method.signatures[0].returns) if isinstance(method, Function) else None

    def init(self, kind: str) -> Function | None:
        """Return the constructor of a class, or None where it is an enum's or inherited."""
        entry = self._classes.get(kind)
        if entry is None or (entry["bases"] and not entry["init"]):
            return None
        return _function(kind, entry["init"])

    def result(self, callee: Value | None) -> Value | None:
        """Return what a call returns."""
        match callee:
            case Class(name):
                return Instance(name)
            case Function():
                types = {signature.returns for signature in callee.signatures}
                return self.typed(types.pop()) if len(types) == 1 else OTHER
            case OwnClass():
                return OwnInstance(callee)
            case OwnFunction():
                return callee.result
        return None

    def _of_module(self, name: str) -> Value | None:
        if name in self._classes or name in self._enums:
            return Class(name)
        if name in self._api["functions"]:
            return _function(name, self._api["functions"][name])
        return self.typed(self._api["values"][name]) if name in self._api["values"] else None


def _function(name: str, texts: list[str]) -> Function:
    return Function(name, tuple(map(Signature.parse, texts)))
