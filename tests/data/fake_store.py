"""An object store for tests: a local folder that is read as `s3://bucket/...`, counts its reads and may be slow."""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from ray_ds import storage
from ray_ds.artifacts import Artifact
from ray_ds.data.shard_cache import ShardCache
from ray_ds.data.shard_file import write_shard
from ray_ds.data.shard_folder import ShardFile
from tests.stages.small_artifacts import stage_run

BUCKET = "s3://bucket"


@dataclass(frozen=True)
class FakeStore:
    """Travels to other processes, which `install` it for themselves; all write one log of what they fetched."""

    root: Path
    log: Path
    block_bytes: int = 1 << 16
    block_s: float = 0.0

    def install(self) -> "FakeStore":
        storage.filesystem, storage.read_blocks = self.filesystem, self.read_blocks
        return self

    def filesystem(self, uri: str) -> tuple[fs.FileSystem, str]:
        return fs.LocalFileSystem(), str(self.path(uri))

    def path(self, uri: str) -> Path:
        return self.root / uri.removeprefix(f"{BUCKET}/") if uri.startswith(BUCKET) else Path(uri)

    def read_blocks(self, uri: str) -> Iterator[bytes]:
        if uri.startswith(BUCKET):
            with open(self.log, "a") as log:
                log.write(f"{uri}\n")
        with open(self.path(uri), "rb") as file:
            while block := file.read(self.block_bytes):
                time.sleep(self.block_s)
                yield block

    def fetched(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


@contextlib.contextmanager
def installed_store(folder: Path) -> Iterator[FakeStore]:
    """Give a store in place of the real ones, which are put back afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("filesystem", "read_blocks"):
            patch.setattr(storage, name, getattr(storage, name))
        (folder / "store").mkdir()
        yield FakeStore(folder / "store", folder / "log").install()


def put_shards(
    store: FakeStore, *, num_shards: int, tokens: int | list[int], split: str = "train", has_counts: bool = True
) -> str:
    """Write TokenShards into the store, a document a shard, and return their URI there."""
    run = stage_run(store.root, "TokenShards", name=f"{split}-{num_shards}-{tokens}-{has_counts}")
    rng = np.random.default_rng(num_shards)
    counts = [tokens] * num_shards if isinstance(tokens, int) else tokens
    for number, count in enumerate(counts):
        document = rng.integers(3, 300, count).astype(np.uint16)
        write_shard(run.path(split, f"{number:05d}.arrow"), [document], [f"{split}-{number}"], np.uint16)
    names = {f"{number:05d}.arrow": count for number, count in enumerate(counts)}
    facts = {"shard_tokens": {split: names}} if has_counts else {}
    artifact: Artifact = run.commit(facts, seconds=0.0)
    return artifact.uri.replace(str(store.root), BUCKET)


def read(cache: ShardCache, shard: ShardFile) -> None:
    with cache.open(shard) as file:
        assert hashlib.sha256(file.read()).hexdigest() == shard.sha256


def open_all(store: FakeStore, folder: Path, shards: list[ShardFile], barrier: Barrier) -> None:
    store.install()
    cache = ShardCache(folder)
    barrier.wait()
    for shard in shards:
        read(cache, shard)
