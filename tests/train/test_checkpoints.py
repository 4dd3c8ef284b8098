import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ray_ds import storage
from ray_ds.errors import ArtifactError, RetryableError, StorageUnavailable
from ray_ds.train import checkpoints
from ray_ds.train.checkpoints import folders, rank_writing
from tests.train.object_store import use_object_store
from tests.train.states import assert_readable, make_parts, make_writers, metrics_of, start, write


def find_step(root: Path) -> int | None:
    found = checkpoints.find_latest(str(root))
    return found.step if found else None


def folder_names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert checkpoints.find_latest(str(tmp_path / "absent")) is None
    assert checkpoints.latest_step(str(tmp_path / "absent")) is None


@pytest.mark.shows("A training checkpoint is written beside training and read by any number of workers")
@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_a_checkpoint_is_read_by_other_numbers_of_ranks(tmp_path: Path, world_size: int) -> None:
    for step in (10, 13):
        writers = make_writers(tmp_path, world_size)
        write(writers, step, attempt=f"of-{step}", loss=1.5)
        assert [writer.state for writer in writers] == ["idle"] * world_size
        found = checkpoints.find_latest(str(tmp_path))
        assert found is not None
        assert (found.step, found.world_size, found.validation_loss, found.passed_over) == (step, world_size, 1.5, ())
        assert_readable(tmp_path, found)


def test_newest_counts_and_older_ones_go(tmp_path: Path) -> None:
    writers = make_writers(tmp_path, 2, keep=2)
    for step in (10, 20, 30):
        write(writers, step)
    assert find_step(tmp_path) == 30
    assert checkpoints.latest_step(str(tmp_path)) == 30
    assert folder_names(tmp_path) == ["step-00000020", "step-00000030"]


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    writers = make_writers(tmp_path, 1, keep=1, keep_best=True)
    for step, loss in [(10, 3.0), (20, 2.0), (30, float("nan")), (40, 2.5), (50, None)]:
        write(writers, step, loss=loss)
    assert folder_names(tmp_path) == ["step-00000020", "step-00000050"]
    write(writers, 60, loss=1.0)
    assert folder_names(tmp_path) == ["step-00000060"]


def test_the_best_that_stays_is_a_regular_checkpoint(tmp_path: Path) -> None:
    writers = make_writers(tmp_path, 1, keep=10)
    for step, loss in [(10, 2.0), (15, 1.0), (20, 3.0), (30, 4.0), (35, 5.0)]:
        write(writers, step, loss=loss)
    folders.delete_old(str(tmp_path), keep=1, keep_best=True, every=10)
    assert folder_names(tmp_path) == ["step-00000010", "step-00000030", "step-00000035"]


@pytest.mark.parametrize(("last", "best"), [(50, 40), (45, 45)])
def test_the_best_is_a_regular_checkpoint_or_the_last(tmp_path: Path, last: int, best: int) -> None:
    writers = make_writers(tmp_path, 2, keep=10)
    for step, loss in [(10, 3.0), (15, 0.5), (20, 2.0), (30, math.nan), (40, 2.0), (45, 1.0), (50, None)]:
        write(writers, step, loss=loss)
    found = checkpoints.find_best(str(tmp_path), every=10, last=last)
    assert found is not None and found.step == best, "of equal losses the latest"
    assert_readable(tmp_path, found)


def test_no_checkpoint_is_the_best_where_no_loss_is_a_number(tmp_path: Path) -> None:
    writers = make_writers(tmp_path, 1)
    for step, loss in [(10, math.nan), (15, 1.0), (20, None)]:
        write(writers, step, loss=loss)
    assert checkpoints.find_best(str(tmp_path), every=10, last=20) is None


def test_a_best_checkpoint_that_is_damaged_is_never_silently_passed_over(tmp_path: Path) -> None:
    writers = make_writers(tmp_path, 1)
    for step, loss in [(10, 1.0), (20, 2.0)]:
        write(writers, step, loss=loss)
    (weights,) = (tmp_path / "step-00000010").rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(
        ArtifactError, match=r"step-00000010 \(.*sha256 differs\) must be as its COMMITTED.json says: it has"
    ):
        checkpoints.find_best(str(tmp_path), every=10, last=20)
    checkpoints.delete(str(tmp_path), 10)
    found = checkpoints.find_best(str(tmp_path), every=10, last=20)
    assert found is not None and found.step == 20


def test_files_are_plain_safetensors_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_writing, "FILE_BYTES", 100)
    write(make_writers(tmp_path, 2), 10)
    folder = tmp_path / "step-00000010"
    content = json.loads((folder / "COMMITTED.json").read_text())["content"]
    names = [info["path"] for info in content["files"]]
    assert f"{content['attempt']}/rank-00001-00001.safetensors" in names
    said = json.loads((folder / content["attempt"] / "rank-00001.json").read_text())["content"]
    part = make_parts(10, 2)[1]
    assert said["index"] == part.index
    loaded = {name: load_file(folder / path)[name] for name, path in said["tensors"].items()}
    assert loaded.keys() == part.tensors.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in part.tensors.items())
    found = checkpoints.find_latest(str(tmp_path))
    assert found is not None
    assert_readable(tmp_path, found)


def test_torn_checkpoint_is_reported_and_goes_when_the_next_is_written(tmp_path: Path) -> None:
    write(make_writers(tmp_path, 2), 10)
    for step in (20, 30):
        torn = tmp_path / f"step-{step:08d}" / "killed-0001"
        torn.mkdir(parents=True)
        (torn / "rank-00000.safetensors").write_bytes(b"half")
    found = checkpoints.find_latest(str(tmp_path))
    assert found is not None and found.step == 10
    assert found.passed_over == tuple(f"{tmp_path}/step-{step:08d}: writing it was not finished" for step in (30, 20))
    write(make_writers(tmp_path, 2), 20, attempt="second")
    assert find_step(tmp_path) == 20
    assert folder_names(tmp_path) == ["step-00000010", "step-00000020"]
    assert folder_names(tmp_path / "step-00000020") == ["COMMITTED.json", "second-0001"]


def test_what_an_earlier_attempt_left_is_not_mixed_in(tmp_path: Path) -> None:
    old, new = make_writers(tmp_path, 2), make_writers(tmp_path, 2)
    stale, fresh = make_parts(10, 2, seed=99), make_parts(10, 2)
    old[1].start(stale[1], attempt="old", metrics="", validation_loss=None)
    new[0].start(fresh[0], attempt="new", metrics=metrics_of(10), validation_loss=None)
    with pytest.raises(
        ArtifactError, match=r"\(the parts of ranks 1 missing after .* s\) must be written by all ranks"
    ):
        new[0].wait(0.3)
    assert find_step(tmp_path) is None
    new[1].start(fresh[1], attempt="new", metrics="", validation_loss=None)
    for writer in new:
        writer.wait(30)
    found = checkpoints.find_latest(str(tmp_path))
    assert found is not None
    assert_readable(tmp_path, found)
    old[1].abandon("the test is over")


def test_a_step_is_written_again_after_a_roll_back(tmp_path: Path) -> None:
    writers = make_writers(tmp_path, 2)
    start(writers, 10, seed=99)
    for writer in writers:
        writer.wait(30)
    write(writers, 10)
    found = checkpoints.find_latest(str(tmp_path))
    assert found is not None and found.attempt == "first-0002"
    assert_readable(tmp_path, found)
    assert folder_names(tmp_path / "step-00000010") == ["COMMITTED.json", "first-0002"]


DATA = "first-0002/rank-00001.safetensors"


def cut_off(folder: Path) -> str:
    (folder / DATA).write_bytes((folder / DATA).read_bytes()[:-1])
    return f"{DATA}: {(folder / DATA).stat().st_size} bytes instead of {(folder / DATA).stat().st_size + 1}"


def flip(folder: Path) -> str:
    data = bytearray((folder / DATA).read_bytes())
    data[-1] ^= 1
    (folder / DATA).write_bytes(data)
    return f"{DATA}: its sha256 differs"


def remove(folder: Path) -> str:
    size = (folder / DATA).stat().st_size
    (folder / DATA).unlink()
    return f"{DATA}: no bytes instead of {size}"


def spoil_two(folder: Path) -> str:
    (folder / "COMMITTED.json").write_text('{"step": 20, "wor')
    (folder / "first-0002" / "rank-00000.json").write_text("{}")
    return "COMMITTED.json: it is damaged or of another format"


@pytest.mark.shows("A torn or damaged training checkpoint is noticed, and the one before it is used")
@pytest.mark.parametrize("damage", [cut_off, flip, remove, spoil_two])
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    writers = make_writers(tmp_path, 2)
    write(writers, 10)
    write(writers, 20)
    reason = damage(tmp_path / "step-00000020")
    found = checkpoints.find_latest(str(tmp_path))
    assert found is not None and found.step == 10
    assert found.passed_over == (f"{tmp_path}/step-00000020: {reason}",)
    assert_readable(tmp_path, found)
    checkpoints.delete_newer(str(tmp_path), 10)
    assert folder_names(tmp_path) == ["step-00000010"]


def test_sizes_alone_are_checked_where_that_is_asked_for(tmp_path: Path) -> None:
    writers = make_writers(tmp_path, 2)
    write(writers, 10)
    write(writers, 20)
    flip(tmp_path / "step-00000020")
    found = checkpoints.find_latest(str(tmp_path), verify="sizes")
    assert found is not None and found.step == 20
    cut_off(tmp_path / "step-00000020")
    found = checkpoints.find_latest(str(tmp_path), verify="sizes")
    assert found is not None and found.step == 10


@pytest.mark.parametrize("damage", ["missing", "spoilt"])
def test_a_whole_checkpoint_without_its_last_file_is_finished(tmp_path: Path, damage: str) -> None:
    writers = make_writers(tmp_path, 2)
    write(writers, 10)
    write(writers, 20)
    last = tmp_path / "step-00000020" / "COMMITTED.json"
    before = last.read_bytes()
    last.unlink() if damage == "missing" else last.write_bytes(before[:-5])
    found = checkpoints.find_latest(str(tmp_path))
    assert found is not None and (found.step, found.passed_over) == (20, ())
    assert last.read_bytes() == before


def test_when_all_are_damaged_the_user_is_told(tmp_path: Path) -> None:
    writers = make_writers(tmp_path, 2)
    write(writers, 10)
    write(writers, 20)
    flip(tmp_path / "step-00000020")
    (tmp_path / "step-00000010" / "first-0001" / "rank-00000.json").unlink()
    with pytest.raises(ArtifactError) as error:
        checkpoints.find_latest(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}/step-00000020 ({DATA}: its sha256 differs) must be as its COMMITTED.json says, and no older "
        f"checkpoint is whole; restore it, or delete {tmp_path} to train from the start."
    )


def test_the_reader_names_the_damaged_file(tmp_path: Path) -> None:
    writers = make_writers(tmp_path, 2)
    write(writers, 10)
    write(writers, 20)
    found = checkpoints.find_latest(str(tmp_path))
    assert found is not None
    cut_off(tmp_path / "step-00000020")
    with pytest.raises(ArtifactError) as error:
        assert_readable(tmp_path, found)
    size = (tmp_path / "step-00000020" / DATA).stat().st_size
    assert str(error.value) == (
        f"{tmp_path}/step-00000020/{DATA} ({size} bytes instead of {size + 1}) must be readable and as it was written; "
        "restore it, or delete the checkpoint's folder to go on from the one before."
    )


def test_start_returns_while_storage_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    original = rank_writing.write_tensors

    def slow(*arguments: object) -> object:
        assert goes_on.wait(30)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rank_writing, "write_tensors", slow)
    writers = make_writers(tmp_path, 2)
    start(writers, 10)
    assert [writer.state for writer in writers] == ["writing", "writing"]
    with pytest.raises(
        ArtifactError, match=r"step-00000010 \(its own files missing after .* s\) must be written by all"
    ):
        writers[0].wait(0.05)
    goes_on.set()
    for writer in writers:
        writer.wait(30)
    assert find_step(tmp_path) == 10


def test_one_ranks_failure_reaches_all_and_frees_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full: set[str] = {"rank-00001"}
    original = rank_writing.write_tensors

    def write_tensors(folder: str, path: str, tensors: object) -> object:
        info = original(folder, path, tensors)  # type: ignore[arg-type]
        if any(name in path for name in full):
            raise OSError(28, "No space left on device")
        return info

    monkeypatch.setattr(rank_writing, "write_tensors", write_tensors)
    writers = make_writers(tmp_path, 3)
    for step in (10, 20):
        start(writers, step)
        for writer in writers:
            with pytest.raises(
                ArtifactError, match=r"\(.*No space left on device\) must be written; make room or mend"
            ):
                writer.wait(30)
            assert writer.state == "failed"
            writer.poll()
        assert not list(tmp_path.rglob("*.safetensors"))
    full.clear()
    write(writers, 30)
    assert folder_names(tmp_path) == ["step-00000030"]
    full.add("rank-00002")
    for step in (40, 50, 60):
        start(writers, step)
        for writer in writers:
            with pytest.raises(ArtifactError):
                writer.wait(30)
    for writer in writers:
        with pytest.raises(ArtifactError) as error:
            writer.poll()
        assert str(error.value).startswith(f"{tmp_path} (3 checkpoints in a row failed, the last with: ")
        assert "No space left on device) must take checkpoints; make room or mend the storage" in str(error.value)
        assert str(error.value).endswith("start again: training goes on from step 30.")
    with pytest.raises(ArtifactError, match="3 checkpoints in a row"):
        start(writers, 70)


def test_a_rank_that_does_not_write_is_waited_for_and_named(tmp_path: Path) -> None:
    writers = make_writers(tmp_path, 3)
    writers[0]._timeout_s = writers[1]._timeout_s = 0.3
    parts = make_parts(10, 3)
    for writer, part in zip(writers[:2], parts, strict=False):
        writer.start(part, attempt="first", metrics="", validation_loss=None)
    for writer in writers[:2]:
        with pytest.raises(RetryableError, match=r"\(the parts of ranks 2 missing after 0.3 s\) must be written"):
            writer.wait(30)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert find_step(tmp_path) is None


def test_a_checkpoint_is_abandoned_when_the_loop_knows_better(tmp_path: Path) -> None:
    writers = make_writers(tmp_path, 2)
    writers[0].start(make_parts(10, 2)[0], attempt="first", metrics="", validation_loss=None)
    writers[0].abandon("rank 1 has failed")
    with pytest.raises(RetryableError, match=r"\(rank 1 has failed\) must be written"):
        writers[0].wait(30)


def test_a_part_packed_anew_too_early_never_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = make_parts(10, 1)[0]
    original = rank_writing.write_tensors

    def write_tensors(*arguments: object) -> object:
        info = original(*arguments)  # type: ignore[arg-type]
        part.tensors["float32-00000"][0] += 1
        return info

    monkeypatch.setattr(rank_writing, "write_tensors", write_tensors)
    writer = make_writers(tmp_path, 1)[0]
    writer.start(part, attempt="first", metrics="", validation_loss=None)
    with pytest.raises(AssertionError, match="of step 10 were overwritten while they were written"):
        writer.wait(30)
    assert find_step(tmp_path) is None


def test_a_process_ends_while_storage_hangs(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from ray_ds.train.checkpoints import folders, rank_writing\n"
        "from tests.train.states import make_writers, start\n"
        "rank_writing.write_tensors = lambda *arguments: time.sleep(600)\n"
        "writers = make_writers(sys.argv[1], 1)\n"
        "start(writers, 10)\n"
        "print(writers[0].state)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "writing\n"), done.stderr


def test_a_checkpoint_on_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = use_object_store(monkeypatch)
    root = "s3://bucket/run/checkpoints"
    writers = make_writers(root, 4, keep=1)
    write(writers, 10)
    write(writers, 20)
    assert {key.split("/")[3] for key in store.objects} == {"step-00000020"}
    found = checkpoints.find_latest(root)
    assert found is not None
    assert_readable(root, found)
    store.requests.clear()
    name = next(run["name"] for run in _runs(make_parts(20, 4)[2].index) if run["kind"] == "master")
    piece = next(run for run in _runs(make_parts(20, 4)[2].index) if run["name"] == name)
    with checkpoints.CheckpointReader(root, found) as reader:
        reader.read(name, "master", piece["start"], piece["start"] + piece["numel"])
    fetched = [key for verb, key in store.requests if verb == "GET" and key.endswith(".safetensors")]
    assert fetched == ["bucket/run/checkpoints/step-00000020/first-0002/rank-00002.safetensors"]
    key = fetched[0]
    store.objects[key] = store.objects[key][:-1] + bytes([store.objects[key][-1] ^ 1])
    with pytest.raises(ArtifactError, match=r"rank-00002.safetensors \(its sha256 differs\) must be readable and as"):
        assert_readable(root, found)


def _runs(index: object) -> list[dict[str, object]]:
    assert isinstance(index, dict)
    return index["runs"]


def test_storage_that_does_not_answer_is_no_reason_to_take_an_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    store = use_object_store(monkeypatch)
    root = "s3://bucket/checkpoints"
    writers = make_writers(root, 1)
    write(writers, 10)
    write(writers, 20)
    store.refuses = lambda number, verb, key: verb == "GET" and key.endswith("step-00000020/COMMITTED.json")
    with pytest.raises(StorageUnavailable, match=r"step-00000020/COMMITTED.json: 503 SlowDown\) must be reachable"):
        checkpoints.find_latest(root)


def test_an_absent_checkpoint_is_deleted_without_error(tmp_path: Path) -> None:
    checkpoints.delete(str(tmp_path), 10)
    write(make_writers(tmp_path, 1), 20)
    checkpoints.delete(str(tmp_path), 20)
    assert folder_names(tmp_path) == []
    assert storage.exists(str(tmp_path))
