"""A pack: photos decoded once, in tars of which each has its index beside it.

Any tool that reads WebDataset's shards reads them. The manifest comes last and names all shards;
until then a file marks the folder as unfinished, so that no command takes a part for the whole.
"""

import json
from pathlib import Path
from typing import Any

from microclip_deploy import artifact
from microclip_deploy.data import location
from microclip_deploy.data.remote import is_remote
from microclip_deploy.errors import DataError, printable

SCHEMA = "microclip.pack/1"

UNFINISHED = "UNFINISHED"
"""File that is there while a pack is made."""


def shards_of(root: str) -> list[str] | None:
    """Return the shards of a pack, by its manifest; None where there is no pack.

    Raises:
        DataError: it is not finished, or a shard is missing or of another size.
        CheckpointError: its manifest or an index was changed.
    """
    manifest = _manifest(root)
    if manifest is None:
        return None
    for shard in manifest["shards"]:
        found = location.status(f"{root}/{shard['name']}")
        if found is None or found.size != shard["bytes"]:
            raise DataError(
                f"{printable(root)}: expected {shard['name']} of {shard['bytes']} bytes, found "
                f"{'none' if found is None else f'{found.size} bytes'}; copy it again, or run "
                "`pack` again, which makes what is missing"
            )
    return [f"{root}/{shard['name']}" for shard in manifest["shards"]]


def is_pack(root: str) -> bool:
    """Say whether there is a finished pack, without looking at its shards."""
    return _manifest(root) is not None


def _manifest(root: str) -> dict[str, Any] | None:
    """Return the manifest of a pack; here its indices are verified, in a store they are not."""
    path = f"{root}/{artifact.MANIFEST}"
    if not is_remote(root) and (Path(root) / UNFINISHED).is_file():
        raise DataError(
            f"{printable(root)}: expected a pack, found an unfinished one; run `pack` again, which "
            "continues"
        )
    if location.status(path) is None:
        return None
    try:
        found = json.loads(location.read(path))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not str(found.get("schema")).startswith("microclip.pack/"):
        return None
    return found if is_remote(root) else artifact.read_manifest(Path(root), SCHEMA)
