"""TOML recipes and dotted overrides -> validated, frozen settings.

This module knows no field of anybody: the caller brings the pydantic model. Precedence:
override > recipe > the recipe it extends > default.
"""

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from microclip_deploy.errors import UsageError

COMPLETE = "microclip"
"""The shipped recipe that names every setting."""

Settings = TypeVar("Settings", bound=BaseModel)


class _Recipe(NamedTuple):
    """A recipe that was found."""

    name: str
    """Unique: a shipped name, or the resolved path."""
    source: Traversable
    folder: Path
    """Where its relative `extends` starts."""


def resolve(model: type[Settings], recipe: str | None, overrides: Iterable[str] = ()) -> Settings:
    """Return the settings of a recipe with overrides applied.

    Args:
        model: pydantic model of the whole settings.
        recipe: name of a shipped recipe, path of a TOML file, or None for the defaults.
        overrides: "section.key=value" strings; the value is TOML, bare words are strings.

    Raises:
        UsageError: unknown recipe or key, or a value out of range; names the dotted path.
    """
    values = read_recipe(recipe) if recipe else {}
    for override in overrides:
        values = merge(values, parse_override(override))
    return validate(model, values)


def validate(model: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Build `model` from plain values, turning pydantic's complaints into one UsageError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UsageError(
            "\n".join(_explain(model, problem) for problem in error.errors())
        ) from error


def read_recipe(recipe: str) -> dict[str, Any]:
    """Read a TOML recipe; `extends = "NAME"` starts from another one.

    Args:
        recipe: name of a shipped recipe, or path of a TOML file. In `extends` a relative path
            starts at the folder of the recipe that names it.

    Raises:
        UsageError: a recipe is missing, no TOML, or extends itself.
    """
    return _read_chain(_find(recipe, Path()), ())


def shipped_recipes() -> list[str]:
    """Return the names of the recipes inside the package."""
    folder = resources.files("microclip_deploy") / "recipes"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir())


def recipe_text(name: str) -> str:
    """Return a shipped recipe as its file says it.

    Raises:
        UsageError: no recipe of this name is shipped.
    """
    if name not in shipped_recipes():
        near = difflib.get_close_matches(name, shipped_recipes(), n=1)
        hint = f"; did you mean {near[0]}?" if near else "; `microclip-deploy recipes` lists them"
        raise UsageError(f"recipe '{name}': expected one that is shipped, found none{hint}")
    return _find(name, Path()).source.read_text("utf-8")


def recipe_changes(name: str) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """Return which recipe a shipped one starts from, and what it sets otherwise.

    Returns:
        The name of the other recipe: the one it extends, otherwise `COMPLETE`. Dotted name of each
        setting -> (value, value there).
    """
    base = str(_toml(_find(name, Path())).get("extends", COMPLETE))
    complete = read_recipe(COMPLETE)
    before, after = (dict(_dotted(merge(complete, read_recipe(each)))) for each in (base, name))
    return base, {key: (value, before[key]) for key, value in after.items() if value != before[key]}


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value with its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the nested values of `top` laid over it."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both_tables = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = merge(below, value) if both_tables else value  # type: ignore[arg-type]
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """Turn "a.b=1" into {"a": {"b": 1}}."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"--set: expected section.key=value, found '{text}'")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def _read_chain(recipe: _Recipe, below: tuple[str, ...]) -> dict[str, Any]:
    """Read a recipe and what it extends; `below` are the recipes that led here."""
    if recipe.name in below:
        circle = " -> ".join((*below[below.index(recipe.name) :], recipe.name))
        raise UsageError(
            f"recipe {recipe.name}: expected `extends` to come to an end, found the circle "
            f"{circle}; remove one of them"
        )
    values = _toml(recipe)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise UsageError(
            f"recipe {recipe.name}: extends: expected the name of a shipped recipe or the path of "
            f"a TOML file, found {parent!r}; write it in quotes"
        )
    found = _find(parent, recipe.folder)
    return merge(_read_chain(found, (*below, recipe.name)), values)


def _find(recipe: str, folder: Path) -> _Recipe:
    """Locate a recipe; a shipped name wins over a file of that name."""
    if recipe in shipped_recipes():
        shipped = resources.files("microclip_deploy") / "recipes" / f"{recipe}.toml"
        return _Recipe(recipe, shipped, Path())
    path = folder / recipe
    try:
        found = path.is_file()
    except OSError:  # such as a name that is too long
        found = False
    if not found:
        raise UsageError(
            f"recipe '{path}': expected a TOML file or one of {', '.join(shipped_recipes())}, "
            "found neither; check the name"
        )
    return _Recipe(str(path.resolve()), path, path.parent)


def _toml(recipe: _Recipe) -> dict[str, Any]:
    try:
        return tomllib.loads(recipe.source.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"recipe {recipe.name}: expected valid TOML, found: {error}; correct it"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"recipe {recipe.name}: expected UTF-8, found: {error}; save it as UTF-8"
        ) from error
    except OSError as error:
        raise UsageError(
            f"recipe {recipe.name}: expected a readable file, found: {error.strerror or error}; "
            "change its permissions or give another"
        ) from error


def _explain(model: type[BaseModel], problem: Any) -> str:
    dotted = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"setting {dotted}: {problem['msg']}; found {problem['input']!r}"
    near = difflib.get_close_matches(dotted, _dotted_names(model), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"setting {dotted}: no such setting{hint}"


def _dotted_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += _dotted_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names
