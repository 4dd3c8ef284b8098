"""What checkpoints a folder holds, which of them are whole, and how they go."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pyarrow import fs

from ray_ds import storage
from ray_ds.errors import ArtifactError, StorageUnavailable
from ray_ds.logs import log_event
from ray_ds.train.checkpoints.commit import (
    COMMITTED,
    Commit,
    DamageError,
    assemble,
    checkpoint_uri,
    rank_json,
    read_commit,
    read_part,
    seal,
)

HASH_THREADS = 8
Verify = Literal["sha256", "sizes"]
_STEP = re.compile(r"step-(\d{8,})/")


def find_latest(root: str, *, verify: Verify = "sha256", every: int = 1) -> Commit | None:
    """Return the newest whole checkpoint; None where there is none, not even a damaged one.

    Args:
        root: folder of all checkpoints.
        verify: whether the files' hashes are checked, or only their sizes.
    Raises:
        ArtifactError: there are checkpoints, and all are damaged; or the storage cannot be read.
        StorageUnavailable: an object store does not answer; later it may.
    """
    try:
        return _find_latest(root, verify, every)
    except StorageUnavailable:
        raise
    except OSError as error:
        allowed = "must be readable, to tell which checkpoint to go on from"
        raise ArtifactError(root, f"{error}", allowed, "see that the storage answers, then try again") from error


def _find_latest(root: str, verify: Verify, every: int) -> Commit | None:
    passed_over: list[str] = []
    damaged: list[tuple[str, str]] = []
    for step, listed in sorted(_list_steps(root).items(), reverse=True):
        if step % every:
            continue
        uri = checkpoint_uri(root, step)
        try:
            commit, reason = _read_whole(root, step, listed, verify), "writing it was not finished"
        except DamageError as error:
            commit, reason = None, str(error)
            damaged.append((uri, reason))
        if commit is not None:
            return dataclasses.replace(commit, passed_over=tuple(passed_over))
        log_event(
            "checkpoint_damaged" if (uri, reason) in damaged else "checkpoint_torn", checkpoint=uri, reason=reason
        )
        passed_over.append(f"{uri}: {reason}")
    if not damaged:
        return None
    uri, reason = damaged[0]
    allowed = f"must be as its {COMMITTED} says, and no older checkpoint is whole"
    raise ArtifactError(uri, reason, allowed, f"restore it, or delete {root} to train from the start")


def _list_steps(root: str) -> dict[int, dict[str, int]]:
    """Return the steps that have a folder, with the sizes of the files in it."""
    found: dict[int, dict[str, int]] = {}
    for entry in storage.list_files(root):
        if match := _STEP.match(entry.path):
            found.setdefault(int(match[1]), {})[entry.path[match.end() :]] = entry.bytes
    return found


def _read_whole(root: str, step: int, listed: dict[str, int], verify: Verify) -> Commit | None:
    """Return a checkpoint whose files are as they were written; None for a torn one.

    Raises:
        DamageError: they are not.
    """
    uri = checkpoint_uri(root, step)
    damage = None
    try:
        commit = read_commit(root, step)
        if commit is not None:
            _check_files(uri, commit, listed, verify)
            return commit
    except DamageError as error:
        damage = error
    finished = _finish(root, step, listed)
    if finished is None and damage is not None:
        raise damage
    return finished


def _finish(root: str, step: int, listed: dict[str, int]) -> Commit | None:
    """Write the last file of a checkpoint that is whole but for it; return None for one that is not."""
    uri = checkpoint_uri(root, step)
    for path in sorted(path for path in listed if path.endswith("/rank-00000.json")):
        try:
            first, _ = read_part(uri, path)
            paths = [rank_json(path.split("/")[0], rank) for rank in range(first.world_size)]
            commit = assemble([read_part(uri, path) for path in paths])
            _check_files(uri, commit, listed, "sha256")
        except (DamageError, FileNotFoundError):
            continue
        if commit.step == step:
            log_event("checkpoint_finished", checkpoint=uri, reason=f"all but its {COMMITTED} was whole")
            storage.write_bytes(storage.join(uri, COMMITTED), seal(commit))
            return commit
    return None


def _check_files(uri: str, commit: Commit, listed: dict[str, int], verify: Verify) -> None:
    """Compare a checkpoint's files with what its commit says."""
    for info in commit.files:
        # A listing may lag behind; the file itself is asked before it counts as missing.
        size = listed.get(info.path, -1)
        size = size if size == info.bytes else _size(storage.join(uri, info.path))
        if size != info.bytes:
            raise DamageError(f"{info.path}: {size if size >= 0 else 'no'} bytes instead of {info.bytes}")
    if verify == "sizes":
        return
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        try:
            hashes = list(pool.map(lambda info: storage.sha256_file(storage.join(uri, info.path)), commit.files))
        except FileNotFoundError as error:
            raise DamageError(f"a file went while it was read ({error})") from None
    for info, sha256 in zip(commit.files, hashes, strict=True):
        if sha256 != info.sha256:
            raise DamageError(f"{info.path}: its sha256 differs")


def _size(uri: str) -> int:
    """Return a file's size; -1 where there is none."""
    system, path = storage.filesystem(uri)
    with storage.failures_named(uri):
        info = system.get_file_info(path)
    return int(info.size) if info.type == fs.FileType.File else -1


def latest_step(root: str) -> int | None:
    """Return the newest step with a COMMITTED.json, without a look into its files."""
    return max(committed_steps(root), default=None)


def committed_steps(root: str) -> list[int]:
    """Return the steps with a COMMITTED.json, oldest first."""
    return sorted(step for step, listed in _list_steps(root).items() if COMMITTED in listed)


def sync_new(attempt: Path) -> None:
    """Make the new folder of an attempt, and what it lies in, survive a power cut."""
    attempt.mkdir(parents=True, exist_ok=True)  # a rank without tensors has none yet
    for folder in (attempt, attempt.parent, attempt.parent.parent):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def delete_newer(root: str, step: int) -> None:
    """Delete what there is of later steps, when training goes on from an earlier one."""
    for newer in _list_steps(root):
        if newer > step:
            delete(root, newer)


def delete(root: str, step: int) -> None:
    """Delete a checkpoint, the file that makes it count first; an absent one is no error."""
    uri = checkpoint_uri(root, step)
    delete_file(storage.join(uri, COMMITTED))
    storage.delete_folder(uri)


def delete_file(uri: str) -> None:
    """Delete a file; an absent one is no error."""
    system, path = storage.filesystem(uri)
    with storage.failures_named(uri):
        if system.get_file_info(path).type == fs.FileType.File:
            system.delete_file(path)


def delete_old(root: str, *, keep: int, keep_best: bool, every: int = 1) -> None:
    """Delete all checkpoints but the newest, the newest regular one, and the regular one with the best validation loss.

    Args:
        every: multiples of this many steps are regular ones, which a roll back goes to.
    """
    steps = committed_steps(root)
    kept = {*steps[-keep:], *[step for step in steps if step % every == 0][-1:]}
    is_chosen = keep_best and len(steps) > keep
    best = _best_step(root, [step for step in steps if step % every == 0]) if is_chosen else None
    for step in steps:
        if step not in kept and step != best:
            delete(root, step)


def find_best(root: str, *, every: int, last: int) -> Commit | None:
    """Return the checkpoint with the lowest validation loss; None where no loss is a number.

    Args:
        root: folder of all checkpoints.
        every: multiples of this many steps are regular ones; when others are written depends on who came and went.
        last: the last step, which counts too.
    Raises:
        ArtifactError: the checkpoint is damaged.
    """
    listed = _list_steps(root)
    step = _best_step(root, [step for step in listed if step % every == 0 or step == last])
    if step is None:
        return None
    uri = checkpoint_uri(root, step)
    try:
        commit = read_commit(root, step)
        assert commit is not None, "it has a loss"
        _check_files(uri, commit, listed[step], "sha256")
    except DamageError as error:
        allowed = f"must be as its {COMMITTED} says: it has the lowest validation loss of all"
        raise ArtifactError(uri, str(error), allowed, "restore it, or delete it to take the next best") from error
    return commit


def _best_step(root: str, steps: Iterable[int]) -> int | None:
    """Return the step with the lowest validation loss, of equal ones the latest; None where no loss is a number."""
    losses = {step: loss for step in steps if (loss := _validation_loss(root, step)) is not None}
    return min(losses, key=lambda step: (losses[step], -step), default=None)


def _validation_loss(root: str, step: int) -> float | None:
    """Return the validation loss of a checkpoint; None where it has none, or one that is no number."""
    try:
        commit = read_commit(root, step)
    except DamageError:
        return None
    loss = commit.validation_loss if commit is not None else None
    return loss if loss is not None and math.isfinite(loss) else None


def delete_torn(root: str, *, step: int, attempt: str) -> None:
    """Delete what earlier attempts left unfinished, and nothing of a checkpoint that counts.

    Args:
        root: folder of all checkpoints.
        step: of the checkpoint being written.
        attempt: its folder's name; other ranks write into it already.
    """
    for other, listed in _list_steps(root).items():
        uri = checkpoint_uri(root, other)
        try:
            commit = read_commit(root, other)
        except DamageError:
            continue
        if commit is None and other != step:
            storage.delete_folder(uri)
            continue
        used = {attempt} | ({commit.attempt} if commit is not None else set())
        for folder in {path.split("/")[0] for path in listed if "/" in path} - used:
            storage.delete_folder(storage.join(uri, folder))
