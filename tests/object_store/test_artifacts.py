"""Artefacts, token shards and checkpoints of training, kept on a real S3 server."""

from pathlib import Path

import numpy as np
import pytest

from ray_ds import storage
from ray_ds.artifacts import TokenShards, find_artifact, open_artifact
from ray_ds.data.shard_file import write_shard
from ray_ds.data.shards import TokenSplit
from ray_ds.errors import ArtifactError
from ray_ds.stage_run import StageRun
from ray_ds.train import checkpoints
from tests.train.states import assert_readable, make_writers, write

DIGEST = "0123456789abcdef"


def write_shards(folder: str) -> TokenShards:
    """Write two shards of a training split as the tokenize stage does, and commit them."""
    run = StageRun(
        step="tokenize",
        stage="tokenize",
        stage_version=1,
        kind="TokenShards",
        run_dir=folder,
        uri=storage.join(folder, DIGEST),
        digest=DIGEST,
        settings={},
        inputs=(),
    )
    storage.write_bytes(run.work_path("scratch"), b"unfinished")
    for number in range(2):
        tokens = np.arange(1000, dtype=np.uint16) + number
        write_shard(run.path("train", f"{number:05d}.arrow"), [tokens], [f"doc-{number}"], np.uint16)
    assert find_artifact(run.uri) is None
    made = run.commit({}, seconds=1.0)
    assert isinstance(made, TokenShards)
    return made


@pytest.mark.shows(
    "A run's artefacts, token shards and checkpoints live on an S3-compatible store (tried on SeaweedFS)"
)
def test_token_shards_are_read_back(folder: str, tmp_path: Path) -> None:
    made = write_shards(folder)
    found = open_artifact(made.uri, [TokenShards])
    assert found == made
    assert [info.path for info in found.manifest.files] == ["train/00000.arrow", "train/00001.arrow"]
    found.verify_files()
    split = TokenSplit.open(made.uri, "train", tmp_path)
    assert split.num_tokens == 2000 and list(split.doc_ids()) == ["doc-0", "doc-1"]
    assert split.shard_tokens(1).tolist() == list(range(1, 1001))


def test_a_changed_object_is_found_by_its_hash(folder: str) -> None:
    made = write_shards(folder)
    path = made.path("train/00001.arrow")
    data = storage.read_bytes(path)
    storage.write_bytes(path, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(ArtifactError, match=r"train/00001\.arrow .*sha256"):
        made.verify_files()


def test_checkpoints_are_written_read_and_thinned_out(folder: str) -> None:
    for world_size, step in ((3, 10), (2, 20)):
        write(make_writers(folder, world_size, keep=1), step, attempt=f"of-{step}")
    found = checkpoints.find_latest(folder)
    assert found is not None and (found.step, found.world_size) == (20, 2)
    assert_readable(folder, found)
    assert {entry.path.split("/")[0] for entry in storage.list_files(folder)} == {"step-00000020"}


def test_a_torn_checkpoint_is_passed_over(folder: str) -> None:
    writers = make_writers(folder, 2, keep=2)
    write(writers, 10)
    write(writers, 20)
    for entry in storage.list_files(storage.join(folder, "step-00000020")):
        if not entry.path.endswith(".safetensors"):
            continue
        storage.write_bytes(storage.join(folder, "step-00000020", entry.path), b"torn")
        break
    found = checkpoints.find_latest(folder)
    assert found is not None and found.step == 10 and len(found.passed_over) == 1
