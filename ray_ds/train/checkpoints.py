"""Checkpoints of unfinished training: folders whose last file names all others with their sha256.

`<root>/step-00000100/...` counts once its `COMMITTED.json` is there. A folder without one is a torn checkpoint and is
ignored; one whose files do not match is damaged, and the one before it is taken.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic
from pyarrow import fs

from ray_ds import storage
from ray_ds.artifacts import FileInfo
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.logs import log_event

COMMITTED = "COMMITTED.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What a checkpoint's last file says."""

    step: int
    """Optimizer steps done; the data of the next follow from it."""
    world_size: int
    """Workers that wrote it; DeepSpeed lets as many read it."""
    files: tuple[FileInfo, ...]


_ADAPTER = pydantic.TypeAdapter(Commit)


def checkpoint_uri(root: str, step: int) -> str:
    """Return the folder of a step's checkpoint."""
    return storage.join(root, f"step-{step:08d}")


def find_latest(root: str) -> Commit | None:
    """Return the newest checkpoint whose files are as they were written; None where there is none.

    Raises:
        ArtifactError: there are checkpoints, and all are damaged.
    """
    first_damage: tuple[str, str] | None = None
    for step in sorted(_committed_steps(root), reverse=True):
        uri = checkpoint_uri(root, step)
        found = _read(uri)
        if isinstance(found, Commit):
            return found
        log_event("checkpoint_damaged", checkpoint=uri, reason=found)
        first_damage = first_damage or (uri, found)
    if first_damage is None:
        return None
    uri, reason = first_damage
    allowed = f"must be as its {COMMITTED} says, and no older checkpoint is whole"
    raise ArtifactError(uri, reason, allowed, f"restore it, or delete {root} to train from the start")


def _committed_steps(root: str) -> list[int]:
    paths = [entry.path for entry in storage.list_files(root) if entry.path.endswith(f"/{COMMITTED}")]
    return [int(path.split("/")[0].removeprefix("step-")) for path in paths]


def _read(uri: str) -> Commit | str:
    """Return a checkpoint's commit, or what is wrong with it."""
    try:
        commit = _ADAPTER.validate_json(storage.read_bytes(storage.join(uri, COMMITTED)))
    except pydantic.ValidationError as error:
        return f"{COMMITTED}: {error.errors()[0]['msg']}"
    sizes = {entry.path: entry.bytes for entry in storage.list_files(uri)}
    for info in commit.files:
        if sizes.get(info.path) != info.bytes:
            return f"{info.path}: {sizes.get(info.path, 'no')} bytes instead of {info.bytes}"
        if storage.sha256_file(storage.join(uri, info.path)) != info.sha256:
            return f"{info.path}: its sha256 differs"
    return commit


def check_world_size(commit: Commit, world_size: int, root: str, *, field: str) -> None:
    """Refuse to go on with another number of workers than wrote a checkpoint.

    Raises:
        ConfigError: DeepSpeed could not load it.
    """
    if commit.world_size != world_size:
        allowed = (
            f"must be {commit.world_size}, as many workers as wrote checkpoint {checkpoint_uri(root, commit.step)}"
        )
        raise ConfigError(field, world_size, allowed, f"set it so, or delete {root} to train from the start")


def open_folder(root: str, step: int, *, rank: int) -> Path:
    """Return a local folder to write a step's checkpoint into.

    On a file system that all nodes share it is the checkpoint's own folder, which rank 0 empties; the others wait for
    it before they write. For an object store it is a temporary folder, and each process has its own.
    """
    uri = checkpoint_uri(root, step)
    if storage.is_remote(uri):
        return Path(tempfile.mkdtemp(prefix="ray_ds-checkpoint-"))
    folder = storage.local_path(uri)
    if rank:
        return folder
    # Its last file goes first, so that a process killed here leaves a torn checkpoint and not a damaged one.
    (folder / COMMITTED).unlink(missing_ok=True)
    storage.delete_folder(uri)
    folder.mkdir(parents=True)
    return folder


def seal_files(root: str, step: int, folder: Path, *, rank: int, world_size: int) -> list[FileInfo]:
    """Bring a rank's share of the files to safety and return their names, sizes and sha256.

    On a shared file system the share is every `world_size`-th file, flushed to disk; for an object store it is what
    this rank wrote, uploaded.
    """
    entries = storage.list_files(str(folder))
    uri = checkpoint_uri(root, step)
    if not storage.is_remote(uri):
        entries = entries[rank::world_size]
        for entry in entries:
            _sync(folder / entry.path)
    infos = [
        FileInfo(path=entry.path, bytes=entry.bytes, sha256=storage.sha256_file(str(folder / entry.path)))
        for entry in entries
    ]
    if storage.is_remote(uri):
        upload_folder(folder, uri)
        shutil.rmtree(folder)
    return infos


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def upload_folder(folder: Path, uri: str) -> None:
    """Copy a local folder's files into a folder on an object store."""
    system, path = storage.filesystem(uri)
    fs.copy_files(str(folder), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=system)


def commit(root: str, step: int, *, world_size: int, files: Sequence[FileInfo], keep: int) -> None:
    """Make a checkpoint count, then delete all but the newest `keep`; called by one process after all have sealed."""
    content = Commit(step=step, world_size=world_size, files=tuple(sorted(files, key=lambda info: info.path)))
    data = json.dumps(dataclasses.asdict(content), indent=1).encode()
    storage.write_bytes(storage.join(checkpoint_uri(root, step), COMMITTED), data)
    for old in sorted(_committed_steps(root))[:-keep]:
        delete(root, old)


def delete_newer(root: str, step: int) -> None:
    """Delete checkpoints of later steps: those that were damaged, when training goes on from an earlier one."""
    for newer in _committed_steps(root):
        if newer > step:
            delete(root, newer)


def delete(root: str, step: int) -> None:
    """Delete a checkpoint, the file that makes it count first."""
    uri = checkpoint_uri(root, step)
    system, path = storage.filesystem(storage.join(uri, COMMITTED))
    system.delete_file(path)
    storage.delete_folder(uri)


def local_copy(root: str, step: int) -> Path:
    """Return a folder with the checkpoint's files: its own, or for an object store a temporary copy."""
    uri = checkpoint_uri(root, step)
    if not storage.is_remote(uri):
        return storage.local_path(uri)
    folder = Path(tempfile.mkdtemp(prefix="ray_ds-resume-"))
    system, path = storage.filesystem(uri)
    fs.copy_files(path, str(folder), source_filesystem=system, destination_filesystem=fs.LocalFileSystem())
    return folder
