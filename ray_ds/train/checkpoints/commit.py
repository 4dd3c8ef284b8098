"""The JSON files of a checkpoint: each rank's, and the last one, which makes the checkpoint count."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pydantic
from pydantic import JsonValue

from ray_ds import storage
from ray_ds.artifacts import FileInfo

COMMITTED = "COMMITTED.json"
METRICS = "metrics.jsonl"

_HEAD = b'{"sha256":"%s","content":'
_TAIL = b"}\n"
_Decoded = TypeVar("_Decoded")


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What a checkpoint's last file says."""

    step: int
    """Optimizer steps done."""
    attempt: str
    """The folder its files are in."""
    world_size: int
    """Ranks that wrote it; any number can read it."""
    facts: dict[str, JsonValue]
    """As in `EngineState`."""
    extra: dict[str, JsonValue]
    """What the loop gave to `pack`."""
    validation_loss: float | None
    """None where it was not measured at this step."""
    files: tuple[FileInfo, ...]
    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that do not count, each with the reason; found by `find_latest`, not part of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPart:
    """What a rank's JSON file says; the rank's files are safe once it is there."""

    step: int
    attempt: str
    rank: int
    world_size: int
    validation_loss: float | None
    files: tuple[FileInfo, ...]
    """Its own, but for this one."""
    tensors: dict[str, str]
    """The file that each tensor of the index is in."""
    index: dict[str, JsonValue]
    """Of `train.packing`."""


_COMMIT: pydantic.TypeAdapter[Commit] = pydantic.TypeAdapter(Commit)
_PART: pydantic.TypeAdapter[RankPart] = pydantic.TypeAdapter(RankPart)


class DamageError(Exception):
    """A file of a checkpoint is not as it was written; the message says which and how."""


def checkpoint_uri(root: str, step: int) -> str:
    """Return the folder of a step's checkpoint."""
    return storage.join(root, f"step-{step:08d}")


def rank_json(attempt: str, rank: int) -> str:
    """Return the path of a rank's JSON file below its checkpoint."""
    return f"{attempt}/rank-{rank:05d}.json"


def hash_bytes(data: bytes) -> str:
    """Return the sha256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def seal(content: Commit | RankPart) -> bytes:
    """Return a JSON file that tells whether it is whole."""
    fields = {field.name: getattr(content, field.name) for field in dataclasses.fields(content)}
    fields.pop("passed_over", None)
    fields["files"] = [dataclasses.asdict(info) for info in content.files]
    body = json.dumps(fields, separators=(",", ":")).encode()
    return _HEAD % hash_bytes(body).encode() + body + _TAIL


def _unseal(data: bytes, adapter: "pydantic.TypeAdapter[_Decoded]", path: str) -> _Decoded:
    size = len(_HEAD % (b"0" * 64))
    body = data[size : -len(_TAIL)]
    if data != _HEAD % hash_bytes(body).encode() + body + _TAIL:
        raise DamageError(f"{path}: its sha256 differs")
    try:
        return adapter.validate_python(json.loads(body))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        raise DamageError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def read_commit(root: str, step: int) -> Commit | None:
    """Return what a step's COMMITTED.json says; None where there is none.

    Raises:
        DamageError: it is not as it was written.
    """
    try:
        data = storage.read_bytes(storage.join(checkpoint_uri(root, step), COMMITTED))
    except FileNotFoundError:
        return None
    found = _unseal(data, _COMMIT, COMMITTED)
    if found.step != step:
        raise DamageError(f"{COMMITTED}: it is of step {found.step}")
    return found


def read_part(uri: str, path: str, *, sha256: str | None = None) -> tuple[RankPart, FileInfo]:
    """Return what a rank's JSON file says, and the file's own size and hash.

    Raises:
        DamageError: it is not as it was written.
        FileNotFoundError: there is none.
    """
    data = storage.read_bytes(storage.join(uri, path))
    info = FileInfo(path=path, bytes=len(data), sha256=hash_bytes(data))
    if sha256 is not None and info.sha256 != sha256:
        raise DamageError(f"{path}: its sha256 differs")
    return _unseal(data, _PART, path), info


def assemble(parts: Sequence[tuple[RankPart, FileInfo]]) -> Commit:
    """Return the commit of a checkpoint from what all its ranks say.

    Raises:
        DamageError: they are not the parts of one checkpoint.
    """
    ordered = sorted(parts, key=lambda pair: pair[0].rank)
    first = ordered[0][0]
    for number, (part, info) in enumerate(ordered):
        same = (part.step, part.attempt, part.world_size) == (first.step, first.attempt, len(parts))
        if not same or part.rank != number:
            raise DamageError(f"{info.path}: it is of another checkpoint")
        for key in ("facts", "extra"):
            if part.index.get(key) != first.index.get(key):
                raise DamageError(f"{info.path}: its {key} differ from rank 0's")
    files = [info for part, own in ordered for info in (*part.files, own)]
    content: dict[str, Any] = {
        "step": first.step,
        "attempt": first.attempt,
        "world_size": first.world_size,
        "facts": first.index["facts"],
        "extra": first.index["extra"],
        "validation_loss": first.validation_loss,
        "files": tuple(sorted(files, key=lambda info: info.path)),
    }
    return Commit(**content)
