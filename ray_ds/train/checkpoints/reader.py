"""A checkpoint as a state to load from, whatever number of ranks wrote it."""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from pydantic import JsonValue
from torch import Tensor

from ray_ds import storage
from ray_ds.artifacts import FileInfo
from ray_ds.errors import ArtifactError
from ray_ds.train.catalog import Catalog, Found, decode_index
from ray_ds.train.checkpoints import commit as commits
from ray_ds.train.checkpoints.commit import Commit, DamageError, RankPart
from ray_ds.train.checkpoints.tensor_file import TensorFile
from ray_ds.train.state import Kind, Stretch

ACTION = "restore it, or delete the checkpoint's folder to go on from the one before"


class CheckpointReader:
    """A `StateReader` of a checkpoint; files on an object store are copied here when they are first read, and checked.

    To be closed after use: it keeps files open, and copies in a temporary folder.
    """

    def __init__(self, root: str, commit: Commit) -> None:
        """Read what lies where.

        Args:
            root: folder of all checkpoints.
            commit: what `find_latest` returned.
        Raises:
            ArtifactError: the checkpoint is no longer as it was written, or the storage does not answer.
        """
        self._uri = commits.checkpoint_uri(root, commit.step)
        self._commit = commit
        self._infos = {info.path: info for info in commit.files}
        self._files: dict[str, TensorFile] = {}
        self._cache = tempfile.TemporaryDirectory(prefix="ray_ds-checkpoint-") if storage.is_remote(root) else None
        self._catalog: Catalog[RankPart] = Catalog(self._uri)
        self._own: list[Mapping[str, JsonValue]] = []
        for rank in range(commit.world_size):
            part = self._read_part(rank)
            index = decode_index(part.index, storage.join(self._uri, commits.rank_json(commit.attempt, rank)))
            self._own.append(index.own)
            self._catalog.add(index, part)

    def __enter__(self) -> "CheckpointReader":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the files and delete the copies."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._cache is not None:
            self._cache.cleanup()

    @property
    def facts(self) -> Mapping[str, JsonValue]:
        """What `EngineState.facts` was."""
        return self._commit.facts

    @property
    def extra(self) -> Mapping[str, JsonValue]:
        """What the loop gave to `pack`."""
        return self._commit.extra

    def own(self, rank: int) -> Mapping[str, JsonValue]:
        """Return what the loop gave to `pack` for a rank alone; empty for a rank that was not there then."""
        return self._own[rank] if rank < len(self._own) else {}

    def metrics(self) -> str:
        """Return the records of all steps up to this checkpoint.

        Raises:
            ArtifactError: the file is damaged.
        """
        path = f"{self._commit.attempt}/{commits.METRICS}"
        try:
            data = storage.read_bytes(storage.join(self._uri, path))
        except OSError as error:
            raise self._damaged(path, str(error)) from error
        if commits.hash_bytes(data) != self._info(path).sha256:
            raise self._damaged(path, "its sha256 differs")
        return data.decode()

    def has(self, name: str, kind: Kind) -> bool:
        """Tell whether the state has a tensor."""
        return self._catalog.has(name, kind)

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        """Return elements of a flattened tensor, 1-D on the CPU in the type they were written.

        Raises:
            ArtifactError: the pieces do not cover them, or are damaged.
        """
        return self._catalog.read(Stretch(name=name, kind=kind, start=start, stop=stop), self._fetch)

    def _read_part(self, rank: int) -> RankPart:
        path = commits.rank_json(self._commit.attempt, rank)
        try:
            return commits.read_part(self._uri, path, sha256=self._info(path).sha256)[0]
        except (DamageError, OSError) as error:
            raise self._damaged(path, str(error)) from error

    def _info(self, path: str) -> FileInfo:
        info = self._infos.get(path)
        if info is None:
            raise self._damaged(path, f"{commits.COMMITTED} does not name it")
        return info

    def _fetch(self, found: Found[RankPart], target: Tensor) -> None:
        part, run = found.part, found.run
        path = part.tensors.get(run.tensor)
        if path is None:
            raise self._damaged(commits.rank_json(part.attempt, part.rank), f"it names no file for {run.tensor}")
        try:
            self._open(path).read_into(run.tensor, run.offset + found.first, target)
        except OSError as error:
            raise self._damaged(path, f"{run.kind} of {run.name}: {error}") from error

    def _open(self, path: str) -> TensorFile:
        if path not in self._files:
            info = self._info(path)
            local = self._download(info) if self._cache is not None else storage.local_path(self._uri) / path
            file = TensorFile(local)
            self._files[path] = file
            if file.size != info.bytes:
                raise self._damaged(path, f"{file.size} bytes instead of {info.bytes}")
        return self._files[path]

    def _download(self, info: FileInfo) -> Path:
        """Copy a file here and check it on the way."""
        assert self._cache is not None
        target = Path(self._cache.name) / info.path.replace("/", "-")
        digest = hashlib.sha256()
        with open(target, "wb") as file:
            for block in storage.read_blocks(storage.join(self._uri, info.path)):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != info.sha256:
            raise self._damaged(info.path, "its sha256 differs")
        return target

    def _damaged(self, path: str, value: str) -> ArtifactError:
        allowed = "must be readable and as it was written"
        return ArtifactError(storage.join(self._uri, path), value, allowed, ACTION)
