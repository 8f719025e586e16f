"""Stand-ins for what only TensorRT's library makes, which take no more than TensorRT takes.

`install` leaves the module real: enums, Dims, loggers, monitors. Builder, Runtime and the parser,
and what their methods return, become fakes. A fake has the members of the real class and the
signatures that the bindings tell:

    unknown attribute                              AttributeError
    property that cannot be set                    AttributeError
    wrong count, keyword or type of an argument    TypeError
    None where it is not the default               TypeError; TensorRT crashes, or refuses it too

What it returns follows the declared type: another fake, True, 0, "", an enum's first member. A
scenario's answers replace that, by "Class.member": a value, or a function of the arguments.

That calls are well formed and come in the right order is all that this shows: not whether TensorRT
would accept a network, and nothing of numbers or speed.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

from microclip_deploy.serving.tensorrt_library import trt
from tests.tensorrt.signatures import (
    Signature,
    accepted_type,
    enum_members,
    method_signatures,
    returned_type,
)

_REAL: Mapping[str, type] = {
    name: getattr(trt, name) for name in ("Builder", "Runtime", "OnnxParser")
}


class Call(NamedTuple):
    """A call that was well formed."""

    name: str
    """Such as "Builder", "Builder.create_network", or "IBuilderConfig.max_aux_streams="."""
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = MappingProxyType({})


class Scenario(NamedTuple):
    """What fakes share."""

    answers: Mapping[str, Any]
    log: list[Call]


def install(answers: Mapping[str, Any] | None = None) -> tuple[ModuleType, list[Call]]:
    """Begin a scenario: replace the classes that need the library.

    Args:
        answers: may be changed later.

    Returns:
        The module, and the calls in their order; a test may add its own events.

    Raises:
        AttributeError: an answer is for something that this version does not have.
    """
    scenario = Scenario({} if answers is None else answers, [])
    for key in scenario.answers:
        name, _, member = key.rpartition(".")
        _member(_real(name) or object, member)
    for name, real in _REAL.items():
        setattr(trt, name, _Maker(name, (), {"real": real, "scenario": scenario}))
    return trt, scenario.log


class Fake:
    """An object of a class of TensorRT's.

    Tests make their own for answers: `Fake(trt.ITensor, Scenario({"ITensor.name": "x"}, log))`.
    """

    def __init__(self, kind: type, scenario: Scenario) -> None:
        vars(self).update(_kind=kind, _scenario=scenario, _values={})

    @property  # type: ignore[misc]  # of an object it can be set
    def __class__(self) -> Any:
        """What `isinstance` sees."""
        return self._kind

    def __repr__(self) -> str:
        return f"<fake {self._kind.__qualname__}>"

    def __getattr__(self, name: str) -> Any:
        member = _member(self._kind, name)
        if isinstance(member, property):
            return self._get(name, returned_type(member.fget))
        found = getattr(self._kind, name)
        is_method = callable(found) and not isinstance(found, type)
        return partial(self._call, name) if is_method else found

    def __setattr__(self, name: str, value: Any) -> None:
        member = _member(self._kind, name)
        label = f"{self._kind.__qualname__}.{name}"
        if not isinstance(member, property) or member.fset is None:
            raise AttributeError(f"{label} cannot be set in TensorRT {trt.__version__}")
        wanted = accepted_type(member.fset)
        if value is not None and not _accepts(wanted, value):
            raise TypeError(f"{label} = {value!r}: TensorRT {trt.__version__} takes {wanted}")
        self._scenario.log.append(Call(f"{label}=", (value,)))
        self._values[name] = value

    def __len__(self) -> int:
        return int(self._special("__len__"))

    def __getitem__(self, index: Any) -> Any:
        return self._special("__getitem__", index)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __bool__(self) -> bool:
        special = (name for name in ("__bool__", "__len__") if hasattr(self._kind, name))
        return all(self._special(name) for name in special)

    def _special(self, name: str, *args: object) -> Any:
        if not hasattr(self._kind, name):
            raise TypeError(f"{self._kind.__qualname__} has no {name}")
        return self._call(name, *args)

    def _get(self, name: str, type_name: str) -> Any:
        if name not in self._values:
            found = self._answer(name, type_name)
            if type(found) is not Fake:
                return found
            self._values[name] = found
        return self._values[name]

    def _call(self, name: str, *args: object, **kwargs: object) -> Any:
        called = Call(f"{self._kind.__qualname__}.{name}", args, kwargs)
        signature = _fitting(called, method_signatures(self._kind, name))
        self._scenario.log.append(called)
        return self._answer(name, signature.returns, *args, **kwargs)

    def _answer(self, name: str, type_name: str, *args: object, **kwargs: object) -> Any:
        """Ask the scenario, by the object's class or one that this derives from."""
        answers = self._scenario.answers
        for kind in self._kind.__mro__:
            key = f"{kind.__qualname__}.{name}"
            if key in answers:
                answer = answers[key]
                return answer(*args, **kwargs) if callable(answer) else answer
        return _default(type_name, self._scenario)


class HostMemory(bytes):
    """A plan: like the real one it has a buffer and a size, and is no sequence."""

    __len__ = __getitem__ = __iter__ = __contains__ = None  # type: ignore[assignment]

    @property
    def nbytes(self) -> int:
        """How large it is."""
        return memoryview(self).nbytes

    @property
    def dtype(self) -> Any:
        """Of the buffer."""
        return trt.int8


class _Maker(type):
    """Stands for a class of TensorRT's, and makes fakes of it."""

    real: type
    scenario: Scenario

    def __call__(cls, *args: object, **kwargs: object) -> Fake:
        called = Call(cls.real.__qualname__, args, kwargs)
        _fitting(called, method_signatures(cls.real, "__init__"))
        cls.scenario.log.append(called)
        return Fake(cls.real, cls.scenario)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.real)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.real, name)


def _member(kind: type, name: str) -> object:
    """Return a member without binding it."""
    try:
        return inspect.getattr_static(kind, name)
    except AttributeError:
        label = f"{kind.__qualname__}.{name}"
        message = f"{label} does not exist in TensorRT {trt.__version__}"
        raise AttributeError(message) from None


@cache
def _real(name: str) -> type | None:
    """Return the class that bindings call by this name, if it is one."""
    found: object = trt
    for part in name.split("."):
        found = _REAL.get(part) or getattr(found, part, None)
    return found if isinstance(found, type) else None


def _fitting(called: Call, texts: list[str]) -> Signature:
    """Return the first signature that takes the arguments."""
    for signature in map(Signature.parse, texts):
        bound = signature.bind(called.args, called.kwargs)
        if bound is not None and all(
            each.is_optional if value is None else _accepts(each.type, value)
            for each, value in bound.items()
        ):
            return signature
    shown = ", ".join([*map(repr, called.args), *(f"{k}={v!r}" for k, v in called.kwargs.items())])
    raise TypeError(
        f"{called.name}({shown}): TensorRT {trt.__version__} takes {' or '.join(texts)}"
    )


def _accepts(type_name: str, value: Any) -> bool:
    """Tell whether the bindings convert a value to a type; of types not listed, whether they may.

    They also take numbers for bool, and bytes for str; nobody means that.
    """
    kind = _real(type_name)
    if kind is not None:
        converted = issubclass(kind, trt.Dims) and _is_sequence_of("int", value)
        return converted or isinstance(value, kind)
    if sequence := re.fullmatch(r"(?:Sequence|list)\[(.*)\]", type_name):
        return _is_sequence_of(sequence[1], value)
    return type_name not in _ACCEPTS or _ACCEPTS[type_name](value)


def _is_sequence_of(type_name: str, value: Any) -> bool:
    is_sequence = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    return (
        is_sequence
        and not isinstance(value, str | bytes | Mapping)
        and all(_accepts(type_name, item) for item in value)
    )


def _has_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


_ACCEPTS: Mapping[str, Callable[[Any], bool]] = {
    "Buffer": _has_buffer,
    "Callable": callable,
    "bool": lambda value: isinstance(value, bool),
    "bytes": lambda value: isinstance(value, bytes),
    "float": lambda value: hasattr(value, "__float__") or hasattr(value, "__index__"),
    "int": lambda value: hasattr(value, "__index__"),
    "list": lambda value: isinstance(value, list),
    "str": lambda value: isinstance(value, str),
    "tuple": lambda value: isinstance(value, tuple),
}


def _default(type_name: str, scenario: Scenario) -> Any:
    """Return what a call answers that the scenario says nothing about."""
    makers: Mapping[str, Callable[[], Any]] = {
        "bool": lambda: True,
        "int": int,
        "float": float,
        "str": str,
        "Dims": lambda: trt.Dims([1]),
        "IHostMemory": lambda: HostMemory(b"plan"),
    }
    if type_name in makers:
        return makers[type_name]()
    if type_name.startswith(("list", "tuple")):
        return [] if type_name.startswith("list") else ()
    kind = _real(type_name)
    if kind is None:
        return None
    members = enum_members(kind)
    return Fake(kind, scenario) if members is None else next(iter(members.values()))
