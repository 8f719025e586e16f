"""Recipes and overrides: every mistake is one message with the dotted name."""

from pathlib import Path

import pytest

from microclip_deploy.adapt import Recipe
from microclip_deploy.config import parse_override, resolve, shipped_recipes
from microclip_deploy.errors import UsageError


def test_default_recipe_is_the_default() -> None:
    assert resolve(Recipe, "default") == Recipe()


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    assert isinstance(resolve(Recipe, name), Recipe)


def test_override_beats_recipe_beats_parent(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "default"\n[adapt]\ngamma = 0.2\nepochs = 3\n')
    found = resolve(Recipe, str(path), ["adapt.epochs=4", "ncut.affinity=cosine"])
    assert (found.adapt.gamma, found.adapt.epochs, found.ncut.affinity) == (0.2, 4, "cosine")
    assert found.adapt.batch_size == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapt.batchsize=3", "did you mean adapt.batch_size"),
        ("adapt.lr=fast", "adapt.lr"),
        ("adapt.lr=-1", "adapt.lr"),
        ("views.crops=0", "views.crops"),
        ("nonsense", "section.key=value"),
        ("=3", "section.key=value"),
    ],
)
def test_mistakes_name_the_setting(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(Recipe, None, [override])


def test_values_are_toml_and_bare_words_are_strings() -> None:
    assert parse_override("a.b=1e-3") == {"a": {"b": 0.001}}
    assert parse_override("a=[1, 2]") == {"a": [1, 2]}
    assert parse_override("a.b=cosine") == {"a": {"b": "cosine"}}


def test_broken_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[adapt\n")
    with pytest.raises(UsageError, match=r"broken\.toml"):
        resolve(Recipe, str(path))
