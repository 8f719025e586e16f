"""Uses of TensorRT that a version does not have, found without running the code.

What is checked:

    names of the module, members of enums, attributes of objects, writes to read-only properties
    count and keywords of arguments
    how many arguments an override takes; that a subclass calls the __init__ of its base
    flags given as literal numbers, which differ between versions

Types are followed from the module through calls, variables, attributes, annotations, loops and
functions of the same file; what passes through other files or containers is lost, unless an
annotation names its type. Types of arguments are left to fake.py. Where code asks
`hasattr(x, "name")`, only what then runs in the version is looked at.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.tensorrt.api import Api
from tests.tensorrt.names import (
    OTHER,
    Class,
    Function,
    Instance,
    Module,
    Names,
    OwnClass,
    OwnFunction,
    OwnInstance,
    Several,
    Value,
    first_known,
)


class Finding(NamedTuple):
    """A use that does not exist, or does not fit."""

    path: Path
    line: int
    version: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: TensorRT {self.version}: {self.message}"


def check(paths: Sequence[Path], apis: Sequence[Api]) -> list[Finding]:
    """Check files, and all Python files in folders, against every version.

    Args:
        paths: links to folders are followed only when they are given here.
        apis: as api.py prints them.
    """
    found: set[Finding] = set()
    for path in _python_files(paths):
        source = path.read_text(encoding="utf-8")
        if re.search(r"\b(tensorrt|trt)\b", source):
            tree = ast.parse(source, str(path))
            found.update(finding for api in apis for finding in _check_tree(tree, path, api))
    return sorted(found)


def _python_files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        yield from path.rglob("*.py") if path.is_dir() else (path,)


def _check_tree(tree: ast.Module, path: Path, api: Api) -> list[Finding]:
    checker = _Checker(path, Names(api))
    for _ in range(_PASSES):
        checker.findings.clear()
        checker.visit(tree)
    return checker.findings


_PASSES = 4
"""In each, types get one call further against the order of the file."""

_FLAGS = ("Builder.create_network", "IBuilderConfig.set_tactic_sources")
"""Methods that take enum members as bits."""


class _Checker(ast.NodeVisitor):
    """Visits of expressions return what they are, if that is known."""

    def __init__(self, path: Path, names: Names) -> None:
        self.findings: list[Finding] = []
        self._path = path
        self._names = names
        self._scopes: list[dict[str, Value | None]] = [{}]
        self._returned: list[set[Value]] = []
        self._functions: dict[ast.AST, OwnFunction] = {}
        self._classes: dict[ast.AST, OwnClass] = {}

    def _report(self, node: ast.stmt | ast.expr | ast.alias, message: str) -> None:
        self.findings.append(Finding(self._path, node.lineno, self._names.version, message))

    def _visit_all(self, nodes: Sequence[ast.AST]) -> list[Value | None]:
        return [self.visit(node) for node in nodes]

    # Names and attributes

    def visit_Name(self, node: ast.Name) -> Value | None:
        scopes = (scope for scope in reversed(self._scopes) if node.id in scope)
        return next(scopes, {}).get(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> Value | None:
        return self._attribute(node, self.visit(node.value), node.attr)

    def _attribute(
        self, node: ast.expr | ast.alias, owner: Value | None, name: str
    ) -> Value | None:
        if owner is None:
            return None
        if isinstance(owner, OwnInstance | OwnClass):
            own = owner.of if isinstance(owner, OwnInstance) else owner
            inherited = self._names.member(own.base, name) if own.base else None
            return own.members.get(name) or inherited
        found = self._names.find(owner, name)
        if found is None:
            label = owner.name if isinstance(owner, Class | Instance) else "tensorrt"
            self._report(node, f"{label}.{name} does not exist")
        return found

    def _bind(self, target: ast.expr, value: Value | None) -> None:
        match target:
            case ast.Name(id=name):
                self._scopes[-1][name] = value or _presumed(name)
            case ast.Attribute():
                self._set(target, self.visit(target.value), value)
            case ast.Tuple() | ast.List():
                for element in target.elts:
                    self._bind(element, None)
            case _:
                self.visit(target)

    def _set(self, target: ast.Attribute, owner: Value | None, value: Value | None) -> None:
        name = target.attr
        if name == "__class__" and isinstance(value, Class):
            # How a layer is shown by its own class.
            self._bind(target.value, Instance(value.name))
            return
        if isinstance(owner, OwnInstance):
            owner.of.members[name] = value or owner.of.members.get(name)
            return
        self._attribute(target, owner, name)
        if isinstance(owner, Instance) and self._names.is_read_only(owner.name, name):
            self._report(target, f"{owner.name}.{name} is read-only")

    # Calls

    def visit_Call(self, node: ast.Call) -> Value | None:
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[of, ast.Constant(value=str(name))]):
                return self._attribute(node, self.visit(of), name)
            case ast.Call(func=ast.Name(id="map"), args=[function, *rest]):
                self._visit_all(rest)
                return Several(self._names.result(self.visit(function)))
            case ast.Call(func=ast.Name(id="list" | "tuple" | "sorted"), args=[items]):
                return Several(self._names.item(self.visit(items)))
        callee: Value | None = self.visit(node.func)
        args = self._visit_all(node.args)
        kwargs = {each.arg: self.visit(each.value) for each in node.keywords}
        self._check_call(node, callee)
        own = callee.members.get("__init__") if isinstance(callee, OwnClass) else callee
        if isinstance(own, OwnFunction):
            given = (*zip(own.parameters, args, strict=False), *kwargs.items())
            own.given.update({name: value for name, value in given if name and value})
        return self._names.result(callee)

    def _check_call(self, node: ast.Call, callee: Value | None) -> None:
        function = self._names.init(callee.name) if isinstance(callee, Class) else callee
        if not isinstance(function, Function):
            return
        kwargs = {each.arg: each.value for each in node.keywords if each.arg}
        if function.name in _FLAGS and any(map(_is_number, [*node.args, *kwargs.values()])):
            self._report(node, f"{function.name}: a flag's number differs between versions")
        unpacks = any(isinstance(each, ast.Starred) for each in node.args)
        if unpacks or len(kwargs) < len(node.keywords):
            return
        if all(each.bind(node.args, kwargs) is None for each in function.signatures):
            shown = ", ".join([*("_" for _ in node.args), *(f"{name}=_" for name in kwargs)])
            self._report(node, f"{function.name}({shown}) fits no signature")

    # Other expressions

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Value | None:
        value: Value | None = self.visit(node.value)
        self._bind(node.target, value)
        return value

    def visit_Subscript(self, node: ast.Subscript) -> Value | None:
        self.visit(node.slice)
        return self._names.item(self.visit(node.value))

    def visit_IfExp(self, node: ast.IfExp) -> Value | None:
        return first_known(self._visit_all(self._live(node.test, [node.body], [node.orelse])))

    def visit_BoolOp(self, node: ast.BoolOp) -> Value | None:
        found: Value | None = None
        for operand in node.values:
            value: Value | None = self.visit(operand)
            found = first_known((found, value))
            if self._truth(operand) is isinstance(node.op, ast.Or):
                break
        return found

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._scopes.append({each.arg: None for each in _parameters(node.args)})
        self.visit(node.body)
        self._scopes.pop()

    def visit_ListComp(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp
    ) -> Value:
        self._scopes.append({})
        for each in node.generators:
            self._bind(each.target, self._names.item(self.visit(each.iter)))
            self._visit_all(each.ifs)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        item, *_ = self._visit_all(parts)
        self._scopes.pop()
        return Several(item)

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def _live(
        self, test: ast.expr, body: Sequence[ast.AST], orelse: Sequence[ast.AST]
    ) -> list[ast.AST]:
        """Visit a condition, and return what may run after it."""
        self.visit(test)
        truth = self._truth(test)
        return [*(body if truth is not False else ()), *(orelse if truth is not True else ())]

    def _truth(self, test: ast.expr) -> bool | None:
        """Return what a condition on `hasattr` is in this version, if that is known."""
        match test:
            case ast.Call(func=ast.Name(id="hasattr"), args=[of, ast.Constant(value=str(name))]):
                owner: Value | None = self.visit(of)
                if not isinstance(owner, Module | Class | Instance):
                    return None
                return self._names.find(owner, name) is not None
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                truth = self._truth(operand)
                return None if truth is None else not truth
            case ast.BoolOp(op=op, values=values):
                decisive = isinstance(op, ast.Or)
                return decisive if decisive in map(self._truth, values) else None
        return None

    def _annotated(self, node: ast.expr | None) -> Value | None:
        """Return an object of the annotated type."""
        match node:
            case None:
                return None
            case ast.Constant(value=str(text)):
                return self._annotated(ast.parse(text, mode="eval").body)
            case ast.BinOp(left=left, right=right):
                return self._annotated(left) or self._annotated(right)
            case ast.Name() | ast.Attribute():
                kind: Value | None = self.visit(node)
                return self._names.result(kind) if isinstance(kind, Class | OwnClass) else None
        self.visit(node)
        return None

    # Statements

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "tensorrt":
                self._scopes[-1][alias.asname or "tensorrt"] = Module()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "tensorrt":
            for alias in node.names:
                value = self._attribute(alias, Module(), alias.name)
                self._scopes[-1][alias.asname or alias.name] = value

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self.visit(node.value)
        for target in node.targets:
            match target, node.value:
                case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values):
                    for name, element in zip(names, values, strict=True):
                        self._bind(name, self.visit(element))
                case _:
                    self._bind(target, value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        value: Value | None = self.visit(node.value) if node.value else None
        self._bind(node.target, self._annotated(node.annotation) or value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        if isinstance(node.target, ast.Attribute):
            self._bind(node.target, None)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, self._names.item(self.visit(node.iter)))
        self._visit_all([*node.body, *node.orelse])

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            value = self.visit(item.context_expr)
            if item.optional_vars is not None:
                self._bind(item.optional_vars, value)
        self._visit_all(node.body)

    def visit_If(self, node: ast.If) -> None:
        self._visit_all(self._live(node.test, node.body, node.orelse))

    def visit_Return(self, node: ast.Return) -> None:
        value: Value | None = self.visit(node.value) if node.value else None
        if value is not None and value != OTHER:
            self._returned[-1].add(value)

    # Functions and classes of the file

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._scopes[-1][node.name] = self._function(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = self._visit_all(node.bases)
        base = next((each.name for each in bases if isinstance(each, Class)), None)
        own = self._classes.setdefault(node, OwnClass(base))
        self._scopes[-1][node.name] = own
        functions = [each for each in node.body if isinstance(each, ast.FunctionDef)]
        self._scopes.append(own.members)
        self._visit_all([each for each in node.body if each not in functions])
        self._scopes.pop()
        for function in functions:
            own.members[function.name] = self._function(function, own)
            if base is not None:
                self._check_override(function, base)

    def _function(self, node: ast.FunctionDef, own: OwnClass | None = None) -> Value | None:
        """Visit a function, or a method of a class, and return what its name stands for."""
        decorators = {
            getattr(each, "id", getattr(each, "attr", "")) for each in node.decorator_list
        }
        defaults = [each for each in node.args.kw_defaults if each is not None]
        self._visit_all([*node.decorator_list, *node.args.defaults, *defaults])
        parameters = _parameters(node.args)
        bound: dict[str, Value | None] = {}
        if own and parameters and "staticmethod" not in decorators:
            bound[parameters.pop(0).arg] = own if "classmethod" in decorators else OwnInstance(own)
        new = OwnFunction(tuple(each.arg for each in parameters))
        function = self._functions.setdefault(node, new)
        for each in parameters:
            given = function.given.get(each.arg)
            bound[each.arg] = self._annotated(each.annotation) or given or _presumed(each.arg)
        function.result = self._run(node, bound)
        return function.result if decorators & {"property", "cached_property"} else function

    def _run(self, node: ast.FunctionDef, scope: dict[str, Value | None]) -> Value | None:
        """Visit the body of a function, and return what it returns."""
        self._scopes.append(scope)
        self._returned.append(set())
        self._visit_all(node.body)
        returned = self._returned.pop()
        self._scopes.pop()
        return self._annotated(node.returns) or (returned.pop() if len(returned) == 1 else None)

    def _check_override(self, node: ast.FunctionDef, base: str) -> None:
        attributes = (each for each in ast.walk(node) if isinstance(each, ast.Attribute))
        if node.name == "__init__" and all(each.attr != "__init__" for each in attributes):
            self._report(node, f"{base}.__init__ is not called")
        called = self._names.callback_arguments(base, node.name)
        if called is not None and not _takes(node.args, 1 + called):
            self._report(node, f"{base}.{node.name} is called with {called} arguments")


def _presumed(name: str) -> Value | None:
    """The module is often handed on as Any."""
    return Module() if name == "trt" else None


def _parameters(arguments: ast.arguments) -> list[ast.arg]:
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def _takes(arguments: ast.arguments, count: int) -> bool:
    most = len(arguments.posonlyargs) + len(arguments.args)
    least = most - len(arguments.defaults)
    return arguments.vararg is not None or least <= count <= most


def _is_number(node: ast.expr) -> bool:
    """Tell a literal other than 0, such as 1 << 1."""
    parts = list(ast.walk(node))
    named = any(isinstance(part, ast.Name | ast.Attribute | ast.Call) for part in parts)
    return not named and not (isinstance(node, ast.Constant) and node.value == 0)
