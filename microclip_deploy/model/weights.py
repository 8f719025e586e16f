"""Where a CLIP model's weights come from: found on this disk, fetched, or refused with a way out.

open_clip name + tag     the Hugging Face cache, otherwise the hub
hf-hub:ORG/REPO          the same
open_clip name + FILE    a .safetensors file, which does not tell how it was trained
local-dir:PATH           configuration and .safetensors in one folder
demo                     the folder inside this package
"""

import difflib
import json
import queue
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from http.client import HTTPException
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import open_clip
from huggingface_hub import constants
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError, safe_open

from microclip_deploy.errors import CheckpointError, EnvironmentProblem, MicroclipError, printable

DEMO_MODELS = {"demo": "letters", "demo-objects": "objects"}
"""Name of a tiny model inside the package -> the folder in `demo` that holds it."""

CONFIG = "open_clip_config.json"
"""What makes a folder a model directory, beside a .safetensors file."""

# Entries of OpenAI's own archives that are no weights.
_OPENAI_ENTRIES = {"input_resolution", "context_length", "vocab_size"}

# How pixels become the input, which differs between weights of one model.
_PIXELS = ("mean", "std", "interpolation", "resize_mode")

# How many tags a message names.
_SHOWN = 3

# How open_clip words weights that are not there; the exceptions behind it differ by version.
_NOT_THERE = ("Failed to download", "Failed initial config/weights load", "Required pretrained")

# How long the hub may take for a sign of life.
_ANSWER_S = 8.0

# What open_clip raises for weights that are missing, damaged or of another architecture.
LOAD_ERRORS = (
    RuntimeError, ValueError, KeyError, TypeError, AssertionError, OSError, SafetensorError
)  # fmt: skip

_Loaded = TypeVar("_Loaded")


def resolve_name(model: str) -> str:
    """Return open_clip's name of `model`; the demo's are directories inside this package."""
    if model in DEMO_MODELS:
        folder = resources.files("microclip_deploy") / "demo" / DEMO_MODELS[model] / "model"
        return f"local-dir:{folder}"
    plain = model.replace("/", "-")  # OpenAI writes ViT-B/32
    return plain if plain in open_clip.list_models() else model


def default_tag(model: str) -> str | None:
    """Return the tag of OpenAI's weights, or None for a model that OpenAI did not train."""
    return "openai" if open_clip.is_pretrained_cfg(resolve_name(model), "openai") else None


def check_source(model: str, pretrained: str | None) -> None:
    """Refuse what would end in random weights or in unpickling a file.

    Raises:
        CheckpointError: with the nearest name, or what to give in place of it.
    """
    name = resolve_name(model)
    if name.startswith("local-dir:"):
        _check_directory(Path(name.removeprefix("local-dir:")))
    elif not name.startswith("hf-hub:"):
        _check_name(model, name)
        _check_pretrained(model, name, pretrained)


def _check_directory(directory: Path) -> None:
    missing = [
        wanted
        for wanted, there in (
            (CONFIG, (directory / CONFIG).is_file()),
            ("a .safetensors file", any(directory.glob("*.safetensors"))),
        )
        if not there
    ]
    if missing:
        raise CheckpointError(
            f"--model local-dir:{printable(directory)}: expected a folder with {CONFIG} and a "
            f".safetensors file, found none with {' and '.join(missing)}{_kind_of(directory)}; "
            "give the folder of an open_clip model"
        )


def _check_name(model: str, name: str) -> None:
    if name in open_clip.list_models():
        return
    path = Path(model)
    if (path / CONFIG).is_file():
        told = f"found a folder; write --model local-dir:{model}"
    elif path.is_dir():
        told = f"found a folder without {CONFIG}{_kind_of(path)}; give a model"
    elif path.is_file():
        told = "found a file; give weights with --pretrained, beside the --model they belong to"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        told = f"found no such name; for a repository on the hub write --model hf-hub:{model}"
    else:
        known = {each.casefold(): each for each in [*open_clip.list_models(), *DEMO_MODELS]}
        near = difflib.get_close_matches(model.casefold(), known, n=3)
        hint = f"did you mean {', '.join(known[each] for each in near)}? " if near else ""
        told = f"found no such name; {hint}open_clip.list_models() lists all"
    raise CheckpointError(
        f"--model {printable(model)}: expected an open_clip name, hf-hub:ORG/REPO, local-dir:PATH "
        f"or demo, {told}"
    )


def _kind_of(directory: Path) -> str:
    """Say what a folder is that was taken for a model."""
    for name in ("manifest.json", "inputs.json"):
        if (directory / name).is_file():
            return ", which `adapt` or `export` wrote"
    return "" if directory.is_dir() else ", as it does not exist"


def _check_pretrained(model: str, name: str, pretrained: str | None) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    listed = f"tags of {model}: {', '.join(tags) or 'none'}"
    if pretrained is None:
        raise CheckpointError(
            f"--model {model}: expected --pretrained TAG or FILE, found none; {listed}"
        )
    path = Path(pretrained)
    if path.is_file():
        _check_file(path, name)
    elif path.is_dir():
        raise CheckpointError(
            f"--pretrained {printable(pretrained)}: expected a tag or a .safetensors file, found a "
            f"folder; write --model local-dir:{printable(pretrained)}, without --pretrained"
        )
    elif pretrained not in tags:
        raise CheckpointError(
            f"--pretrained {printable(pretrained)}: neither a file nor a tag of {model}; {listed}"
        )


def _check_file(path: Path, name: str) -> None:
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{printable(path)}: expected a .safetensors file; other formats can run code when "
            "they are read; convert it with safetensors.torch.save_file"
        )
    try:
        with safe_open(path, framework="pt") as file:
            entries = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{printable(path)}: expected a .safetensors file, found: {error}; fetch it again"
        ) from error
    if entries & _OPENAI_ENTRIES:
        raise CheckpointError(
            f"{printable(path)}: expected weights alone, found {', '.join(_OPENAI_ENTRIES)}, as "
            "in OpenAI's archives; save it again without these entries, and give --model "
            f"{quick_gelu_form(name) or name}"
        )
    if any(entry.startswith("vision_model.") for entry in entries):
        raise CheckpointError(
            f"{printable(path)}: expected weights in open_clip's layout, found those of "
            "transformers; fetch the model from a repository with open_clip_config.json"
        )


def quick_gelu_form(name: str) -> str | None:
    """Return the name of the same model with QuickGELU in place of GELU, if there is one."""
    other = f"{name}-quickgelu"
    return other if other in open_clip.list_models() else None


def file_warning(model: str, pretrained: str | None) -> str | None:
    """Return what a weights file leaves open, if weights of this model differ in that.

    Raises:
        CheckpointError: a configuration beside the file says that the model is another one.
    """
    name = resolve_name(model)
    if pretrained is None or not Path(pretrained).is_file():
        return None
    taken = {**asdict(PreprocessCfg()), **(open_clip.get_model_config(name) or {})}
    beside = Path(pretrained).parent / CONFIG
    if beside.is_file():
        _check_beside(beside, model, taken)
        return None
    tags = open_clip.list_pretrained_tags_by_model(name)
    trained = {tag: open_clip.get_pretrained_cfg(name, tag) or {} for tag in tags}
    quick = [tag for tag, said in trained.items() if _differing(said, taken, "quick_gelu")]
    pixels = [tag for tag, said in trained.items() if _differing(said, taken, *_PIXELS)]
    remedies = []
    if quick:
        remedies.append(f"if it is {_some(quick)}, give --model {quick_gelu_form(name) or name}")
    if pixels:
        remedies.append(
            f"if it is {_some(pixels)}, give --model local-dir:PATH with its preprocessing in "
            f"{CONFIG}"
        )
    if not remedies:
        return None
    activation = "QuickGELU" if taken.get("quick_gelu") else "GELU"
    return (
        f"{printable(pretrained)} does not tell how it was trained, and --model {model} means "
        f"{activation} and OpenAI's preprocessing; {'; '.join(remedies)}"
    )


def _check_beside(config: Path, model: str, taken: Mapping[str, Any]) -> None:
    """Refuse a weights file whose folder describes another model."""
    try:
        stored = json.loads(config.read_text("utf-8"))
        said = {**stored.get("preprocess_cfg", {}), **stored["model_cfg"]}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return  # not open_clip's, whatever its name
    differing = _differing({"quick_gelu": False, **said}, taken, "quick_gelu", *_PIXELS)
    if differing:
        raise CheckpointError(
            f"--pretrained: {printable(config)}, which is beside it, and --model {model} "
            f"differ in {', '.join(differing)}; write "
            f"--model local-dir:{printable(config.parent)}"
        )


def _differing(said: Mapping[str, Any], taken: Mapping[str, Any], *keys: str) -> list[str]:
    """Return which settings of weights are others than the ones that are taken."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value or False

    return [key for key in keys if key in said and plain(said[key]) != plain(taken.get(key))]


def _some(tags: list[str]) -> str:
    """Name a few tags and count the others."""
    more = f" or one of {len(tags) - _SHOWN} more" if len(tags) > _SHOWN else ""
    return ", ".join(tags[:_SHOWN]) + more


# ------------------------------------------------------------------------------ cache and hub


def from_cache_or_hub(load: Callable[[], _Loaded], model: str) -> _Loaded:
    """Load with what is on this disk; only where something is missing, with the hub.

    Without a network the hub's client would try for a minute before it says so.

    Args:
        load: what reads files through huggingface_hub; called once more if some are missing.
        model: for messages.

    Raises:
        EnvironmentProblem: files are missing and the hub cannot be reached.
    """
    try:
        with _cache_alone():
            return load()
    except LOAD_ERRORS as error:
        if not _is_missing(error):
            raise
    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    reason = offline or _unreachable(constants.ENDPOINT)
    if reason is not None:
        raise EnvironmentProblem(
            f"model {model}: its files are not on this computer, and {constants.ENDPOINT} cannot "
            f"be reached ({reason}); connect, or bring the files from elsewhere: a Hugging Face "
            "cache that HF_HOME names, a model's folder (--model local-dir:PATH), or its weights "
            "(--model NAME --pretrained FILE.safetensors)"
        )
    return load()


def load_problem(error: Exception, model: str) -> MicroclipError:
    """Return the error of a model that could not be loaded, by what went wrong."""
    causes = list(_causes(error))
    if any(
        isinstance(cause, RepositoryNotFoundError | RemoteEntryNotFoundError) for cause in causes
    ):
        return CheckpointError(
            f"model {model}: expected a repository with {CONFIG} on {constants.ENDPOINT}, found "
            f"none ({first_line(causes[-1])}); check the name, and log in if it is private: "
            "hf auth login"
        )
    if any(sign in str(error) for sign in _NOT_THERE):
        return EnvironmentProblem(
            f"model {model}: its weights could not be downloaded: {first_line(error)}; "
            "check the network, or download them elsewhere and use --model local-dir:PATH"
        )
    return CheckpointError(
        f"model {model}: could not be loaded: {first_line(error)}; check that the weights are "
        "whole and belong to this model"
    )


@contextmanager
def _cache_alone() -> Iterator[None]:
    """Keep huggingface_hub from the network, as the environment variable does."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_missing(error: Exception) -> bool:
    absent = (LocalEntryNotFoundError, OfflineModeIsEnabled)
    return "Required pretrained" in str(error) or any(
        isinstance(cause, absent) for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unreachable(url: str) -> str | None:
    """Return why nothing answers at a URL, proxies included, or None.

    In a thread: names, proxies and every address of a host have waits of their own.
    """
    found = queue.SimpleQueue[str | None]()
    threading.Thread(target=lambda: found.put(_refusal(url)), daemon=True).start()
    try:
        return found.get(timeout=_ANSWER_S)
    except queue.Empty:
        return f"no answer within {_ANSWER_S:.0f} s"


def _refusal(url: str) -> str | None:
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=_ANSWER_S).close()
    except urllib.error.HTTPError:
        return None  # whatever it thinks of this request, it is there
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        # The hub's client may know certificates that this one does not.
        return None if isinstance(reason, ssl.SSLError) else str(reason)
    return None


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's message on one line."""
    lines = str(error).splitlines()
    return " ".join(line.strip() for line in lines[:3]) if lines else type(error).__name__
