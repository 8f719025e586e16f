"""Recipes and overrides: every mistake is one message with the dotted name."""

import json
from pathlib import Path

import pytest

from microclip_deploy.adapt.trainer import Recipe
from microclip_deploy.config import parse_override, resolve, shipped_recipes
from microclip_deploy.errors import UsageError


def test_the_defaults_are_the_published_method() -> None:
    assert resolve(Recipe, "microclip") == Recipe()


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


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "./a.toml"\n')
    with pytest.raises(UsageError, match=r"circle .*a\.toml -> .*b\.toml -> .*a\.toml; remove"):
        resolve(Recipe, str(tmp_path / "a.toml"))


@pytest.mark.parametrize("value", ["5", "true", '["default"]', "{}"])
def test_extends_is_a_name(tmp_path: Path, value: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"extends = {value}\n")
    with pytest.raises(UsageError, match=r"mine\.toml: extends: expected the name"):
        resolve(Recipe, str(path))


def test_extends_starts_at_the_folder_of_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.toml").write_text('extends = "default"\n[adapt]\nepochs = 7\n')
    (tmp_path / "sub" / "mine.toml").write_text('extends = "../base.toml"\n[adapt]\nseed = 3\n')
    found = resolve(Recipe, str(tmp_path / "sub" / "mine.toml"))
    assert (found.adapt.epochs, found.adapt.seed) == (7, 3)


def test_a_shipped_name_wins_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "default").write_text("nonsense")
    path = tmp_path / "mine.toml"
    path.write_text('extends = "default"\n')
    assert resolve(Recipe, str(path)) == resolve(Recipe, "default")


@pytest.mark.parametrize("name", ["nothing.toml", "", "x" * 300, "a\0b", "."])
def test_a_missing_parent_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"extends = {json.dumps(name)}\n")
    with pytest.raises(UsageError, match="expected a TOML file or one of"):
        resolve(Recipe, str(path))


def test_a_recipe_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# caf\xe9\n")
    with pytest.raises(UsageError, match=r"latin\.toml: expected UTF-8"):
        resolve(Recipe, str(path))


def test_an_unreadable_recipe_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "secret.toml"
    path.write_text("")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UsageError, match=r"secret\.toml: .*Permission denied"):
        resolve(Recipe, str(path))


def test_broken_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[adapt\n")
    with pytest.raises(UsageError, match=r"broken\.toml"):
        resolve(Recipe, str(path))
