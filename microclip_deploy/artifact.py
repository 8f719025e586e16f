"""Directories on disk that are complete or absent, and verified when read.

Every file is written to a temporary sibling, flushed to disk and renamed; the manifest comes
last, so its presence means the directory is complete. Readers check the size and sha256 of every
listed file. Formats: safetensors and JSON. `exclusive` lets one process at a time write into one.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock, Timeout

from microclip_deploy.errors import CheckpointError, EnvironmentProblem, UsageError, printable

MANIFEST = "manifest.json"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that after a crash or a full disk either the old or the new one is there.

    Raises:
        EnvironmentProblem: the disk is full or the directory cannot be written.
    """
    with staged_file(path) as file:
        file.write(data)


@contextmanager
def staged_file(target: Path, mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """Give a hidden file beside `target` that takes its place when the block ends well.

    After an error or a signal `target` is what it was before. A link is followed, and a device or
    a pipe is written to: neither is replaced by a file.

    Args:
        target: what to write.
        mode: "w" for text: UTF-8, with escapes for the lone surrogates of undecodable file names.

    Raises:
        EnvironmentProblem: the disk is full or the directory cannot be written.
    """
    how = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""} if mode == "w" else {}
    real = Path(os.path.realpath(target))
    replaced = target.is_file() or not target.exists()  # /dev/stdout has no real path in a pipe
    written = real.with_name(f".{real.name}.{os.getpid()}.part") if replaced else target
    try:
        with open(written, mode, **how) as file:  # type: ignore[call-overload]  # text or none
            yield file
            file.flush()
            if replaced:
                os.fsync(file.fileno())
        if replaced:
            os.replace(written, real)
            _sync_directory(real.parent)
    except BaseException as error:
        if replaced:
            with suppress(OSError):
                written.unlink()
        if isinstance(error, OSError):
            raise write_problem(target, error) from error
        raise


def write_problem(path: Path, error: Exception) -> EnvironmentProblem:
    """Explain why a file could not be written."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space" if full else "check the path"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return EnvironmentProblem(
        f"{path}: could not be written: {reason}; nothing already written was lost; {remedy} and "
        "run again"
    )


def make_directory(directory: Path) -> None:
    """Make a directory for what will be written, with its parents.

    Raises:
        EnvironmentProblem: it cannot be made, or something else has its name.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_problem(directory, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON (UTF-8, indented, no NaN) atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # A file name that is no UTF-8 holds lone surrogates; as JSON escapes they read back the same.
    write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> Any:
    """Read a JSON file of ours.

    Raises:
        CheckpointError: the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a JSON file, found: {error}") from error


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    directory: Path, schema: str, content: Mapping[str, Any], files: list[str]
) -> None:
    """Write the manifest that declares `directory` complete.

    Args:
        directory: where the listed files already are.
        schema: "name/version"; readers accept exactly the versions they know.
        content: JSON-able fields.
        files: names relative to `directory`.
    """
    rewrite_manifest(directory, {"schema": schema, **content, "files": {}}, files)


def read_schema(directory: Path) -> str:
    """Return the schema a manifest names, which says how to read the rest; verify nothing else.

    Raises:
        CheckpointError: no manifest, or none with a schema.
    """
    schema = _stored(directory).get("schema")
    if not isinstance(schema, str):
        raise CheckpointError(
            f"{directory / MANIFEST}: expected a schema, found {schema}; give a directory that "
            "`adapt` or `export` wrote"
        )
    return schema


def read_manifest(directory: Path, schema: str) -> dict[str, Any]:
    """Read a manifest and verify every file it lists.

    Raises:
        CheckpointError: no manifest, another schema, a path that leaves the directory, or a file
            that is missing or whose bytes changed.
    """
    path = directory / MANIFEST
    manifest = _stored(directory)
    found = manifest.get("schema")
    if found != schema:
        raise CheckpointError(
            f"{path}: expected schema {schema}, found {found}; give a directory of the right kind, "
            "or write it again with this version"
        )
    if manifest.pop("sha256", None) != _manifest_sha256(manifest):
        raise CheckpointError(f"{path}: its content differs from its own sha256; restore it")
    try:
        for name, entry in manifest["files"].items():
            _verify(directory, name, int(entry["bytes"]), str(entry["sha256"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its list of files is damaged; restore it") from error
    return dict(manifest)


def _stored(directory: Path) -> dict[str, Any]:
    """Return a manifest as it stands; an empty one for JSON that is no object."""
    path = directory / MANIFEST
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{printable(directory)}: expected a finished artifact with {MANIFEST}, found "
            f"{_found(directory)}"
        )
    manifest = read_json(path)
    return manifest if isinstance(manifest, dict) else {}


def _found(directory: Path) -> str:
    """Say what there is in place of an artifact, and where one may be."""
    try:
        is_folder, exists = directory.is_dir(), directory.exists()
        inside = sorted(directory.iterdir()) if is_folder else []
    except OSError as error:
        return f"one that cannot be read ({error.strerror}); change its permissions"
    kind = "a folder" if is_folder else "a file" if exists else "nothing"
    if os.path.isfile(directory.parent / MANIFEST):
        return f"{kind} inside of one; give {printable(directory.parent)}"
    for folder in inside:
        if os.path.isfile(folder / MANIFEST):
            return f"a folder that holds such; give one of them, as {printable(folder)}"
    if not is_folder:
        return f"{kind} there; give the directory that `adapt` or `export` wrote"
    return (
        f"{'none' if inside else 'an empty folder'}; `adapt` and `export` write such; an "
        "interrupted `adapt` is finished with --resume"
    )


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Hash everything a manifest says but this hash."""
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _verify(directory: Path, name: str, size: int, sha256: str) -> None:
    path = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{directory}: the manifest names '{name}', outside the directory; refused"
        )
    if not path.is_file():
        raise CheckpointError(
            f"{path}: listed in the manifest and missing; restore it or run again"
        )
    if path.stat().st_size != size or sha256_file(path) != sha256:
        raise CheckpointError(f"{path}: its bytes are not the manifest's; restore it or run again")


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable where the system can open directories."""
    with suppress(PermissionError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rewrite_manifest(directory: Path, stored: Mapping[str, Any], added: list[str]) -> None:
    """Replace a manifest; of all the files it lists only the added ones are read.

    Args:
        directory: where the listed files already are.
        stored: what `read_manifest` returned, with other fields or fewer entries in "files".
        added: further names relative to `directory`.
    """
    entries = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
        for name in added
    }
    manifest = {**stored, "files": {**stored["files"], **entries}}
    write_json(directory / MANIFEST, {**manifest, "sha256": _manifest_sha256(manifest)})


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Give a hidden folder beside `target` that takes its place when the block ends well.

    After an error or a signal `target` is what it was before. Between the two renames that replace
    a directory it is absent for an instant; a kill just then leaves it as `.NAME.XXXX.part.old`.

    Raises:
        EnvironmentProblem: the folder cannot be made or renamed.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(".part", f".{target.name}.", target.parent))
        staging.chmod(0o777 & ~_umask())  # mkdtemp keeps others out
    except OSError as error:
        raise write_problem(target, error) from error
    try:
        yield staging
        if staging.is_dir():  # the block may have put it elsewhere
            _put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, target: Path) -> None:
    old = staging.with_name(f"{staging.name}.old")
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(staging, target)
        _sync_directory(target.parent)
    except OSError as error:
        raise write_problem(target, error) from error
    finally:  # also after a signal
        if old.exists() and not target.exists():
            os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


LOCK = ".lock"
"""File in the directory; one left behind by a killed process does not count."""


@contextmanager
def exclusive(
    directory: Path, busy: str, lock_name: str = LOCK, *, timeout_s: float = 0
) -> Iterator[None]:
    """Hold a directory, or fail at once.

    Args:
        directory: made if it is not there.
        busy: what to say where another process holds it.
        lock_name: of the file in it; another one holds something in the directory.
        timeout_s: how long to wait for it; -1 for as long as it takes.

    Raises:
        UsageError: another process holds it.
        EnvironmentProblem: it cannot be made or locked.
    """
    lock = FileLock(directory / lock_name, timeout=timeout_s)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"{directory}: {busy}") from error
    except (OSError, NotImplementedError) as error:
        raise write_problem(directory, error) from error
    try:
        yield
    finally:
        lock.release()
