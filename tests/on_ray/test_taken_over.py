"""A job that was suspended until another took its run over: it commits nothing and touches nothing after that."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ray_ds import artifacts, storage
from ray_ds.artifacts import find_artifact
from ray_ds.errors import TakenOverError
from ray_ds.train.checkpoints import CheckpointWriter, find_latest
from tests.on_ray.owners import take
from tests.stages.small_artifacts import stage_run
from tests.train.states import assert_readable, make_parts, metrics_of, start, write

TAKEN = r"run_dir .* must still belong to this job, and job pretrain-second of ada, .* has taken it over; let that job"


def make_writers(root: Path, check_alone: Callable[[], None]) -> list[CheckpointWriter]:
    options = {"world_size": 2, "keep": 1, "keep_best": False, "timeout_s": 20, "check_alone": check_alone}
    return [CheckpointWriter(str(root), rank=rank, **options) for rank in range(2)]  # type: ignore[arg-type]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def begin_by_hand(root: Path) -> Path:
    """Write what the second job has of a checkpoint that it has just begun."""
    begun = root / "step-00000012/second-0001/rank-00001.safetensors"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"the beginning")
    return begun


@pytest.mark.shows("A job that was suspended until another took its run over commits no checkpoint and deletes nothing")
def test_a_checkpoint_is_not_committed_once_another_job_has_the_run(tmp_path: Path) -> None:
    root = tmp_path / "work/checkpoints"
    writers = make_writers(root, take(str(tmp_path), "first"))
    write(writers, 4)
    before = files_of(root)
    parts = make_parts(8, 2)
    writers[0].start(parts[0], attempt="late", metrics=metrics_of(8), validation_loss=None)
    written = root / "step-00000008/late-0002/rank-00000.json"
    deadline = time.monotonic() + 20
    while not written.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    check_second = take(str(tmp_path), "second")
    begun = begin_by_hand(root)
    writers[1].start(parts[1], attempt="late", metrics="", validation_loss=None)
    with pytest.raises(TakenOverError, match=TAKEN):
        writers[0].wait(20)
    with pytest.raises(TakenOverError, match=TAKEN):
        writers[0].poll()
    writers[1].abandon("the job ends")
    writers[1].join()
    assert not (root / "step-00000008/COMMITTED.json").exists()
    assert begun.read_bytes() == b"the beginning" and before.items() <= files_of(root).items()
    check_second()
    found = find_latest(str(root))
    assert found is not None and found.step == 8, "what the first had written whole is the second's to use"
    assert_readable(root, found)


def test_a_job_that_lost_the_run_begins_no_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "work/checkpoints"
    writers = make_writers(root, take(str(tmp_path), "first"))
    take(str(tmp_path), "second")
    begun = begin_by_hand(root)
    start(writers, 16)
    with pytest.raises(TakenOverError, match=TAKEN):
        writers[0].wait(20)
    writers[1].abandon("the job ends")
    writers[1].join()
    assert begun.exists() and not (root / "step-00000016/COMMITTED.json").exists()


@pytest.mark.shows("A stage commits no artefact once another job has taken its folder over, however late that was")
def test_an_artefact_is_not_committed_once_another_job_has_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stage_run(tmp_path, "Corpus")
    run = replace(run, check_alone=take(run.uri, "first"))
    storage.write_bytes(run.path("documents-00000.parquet"), b"documents")
    sha256_file = storage.sha256_file

    def suspended(uri: str) -> str:
        take(run.uri, "second")
        return sha256_file(uri)

    monkeypatch.setattr(artifacts.storage, "sha256_file", suspended)
    with pytest.raises(TakenOverError, match=TAKEN):
        run.commit({}, seconds=0.0)
    assert find_artifact(run.uri) is None
    assert Path(run.path("documents-00000.parquet")).read_bytes() == b"documents"
    monkeypatch.undo()
    assert replace(run, check_alone=take(run.uri, "third")).commit({}, seconds=0.0).uri == run.uri
