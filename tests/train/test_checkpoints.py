from pathlib import Path

import pytest

from ray_ds.artifacts import FileInfo
from ray_ds.errors import ArtifactError, ConfigError
from ray_ds.train import checkpoints


def write(root: Path, step: int, *, keep: int = 3, world_size: int = 2) -> Path:
    """Commit a checkpoint of two files, as two ranks would."""
    folder = checkpoints.open_folder(str(root), step, rank=0)
    assert checkpoints.open_folder(str(root), step, rank=1) == folder
    for name in ("weights.pt", "optimizer.pt"):
        (folder / name).write_bytes(f"{name} of {step}".encode() * 100)
    files: list[FileInfo] = []
    for rank in range(world_size):
        files += checkpoints.seal_files(str(root), step, folder, rank=rank, world_size=world_size)
    checkpoints.commit(str(root), step, world_size=world_size, files=files, keep=keep)
    return folder


def latest_step(root: Path) -> int | None:
    found = checkpoints.find_latest(str(root))
    return found.step if found else None


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert checkpoints.find_latest(str(tmp_path / "absent")) is None


def test_newest_committed_counts_and_older_ones_go(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step, keep=2)
    assert latest_step(tmp_path) == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]
    found = checkpoints.find_latest(str(tmp_path))
    assert found is not None and [info.path for info in found.files] == ["optimizer.pt", "weights.pt"]


def test_torn_checkpoint_is_ignored_and_written_anew(tmp_path: Path) -> None:
    write(tmp_path, 10)
    folder = checkpoints.open_folder(str(tmp_path), 20, rank=0)
    (folder / "weights.pt").write_bytes(b"half")
    assert latest_step(tmp_path) == 10
    write(tmp_path, 20)
    assert latest_step(tmp_path) == 20


@pytest.mark.shows("A torn or damaged training checkpoint is noticed, and the one before it is used")
@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "commit"])
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 10)
    folder = write(tmp_path, 20)
    damage_file(folder, damage)
    assert latest_step(tmp_path) == 10
    checkpoints.delete_newer(str(tmp_path), 10)
    assert not folder.exists()


def damage_file(folder: Path, damage: str) -> None:
    weights = folder / "weights.pt"
    data = bytearray(weights.read_bytes())
    if damage == "missing":
        weights.unlink()
    elif damage == "commit":
        (folder / checkpoints.COMMITTED).write_text('{"step": 20, "wor')
    else:
        data[50] ^= 1
        weights.write_bytes(data if damage == "flip" else data[:-1])


def test_when_all_are_damaged_the_user_is_told(tmp_path: Path) -> None:
    damage_file(write(tmp_path, 10), "flip")
    with pytest.raises(ArtifactError) as error:
        checkpoints.find_latest(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}/step-00000010 (weights.pt: its sha256 differs) must be as its COMMITTED.json says, and no older "
        f"checkpoint is whole; restore it, or delete {tmp_path} to train from the start."
    )


def test_another_number_of_workers_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10)
    commit = checkpoints.find_latest(str(tmp_path))
    assert commit is not None
    checkpoints.check_world_size(commit, 2, str(tmp_path), field="pretrain.num_workers")
    with pytest.raises(ConfigError) as error:
        checkpoints.check_world_size(commit, 3, str(tmp_path), field="pretrain.num_workers")
    assert str(error.value) == (
        f"pretrain.num_workers (3) must be 2, as many workers as wrote checkpoint {tmp_path}/step-00000010; set it so, "
        f"or delete {tmp_path} to train from the start."
    )


def test_object_store_gets_each_ranks_files_and_gives_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "store")
    monkeypatch.setattr(checkpoints.storage, "is_remote", lambda uri: uri.startswith(root))
    files: list[FileInfo] = []
    for rank in range(2):
        folder = checkpoints.open_folder(root, 7, rank=rank)
        assert not folder.is_relative_to(tmp_path)
        (folder / "deepspeed").mkdir()
        (folder / "deepspeed" / f"{rank}.pt").write_bytes(bytes([rank]) * 100)
        files += checkpoints.seal_files(root, 7, folder, rank=rank, world_size=2)
        assert not folder.exists()
    assert checkpoints.find_latest(root) is None
    checkpoints.commit(root, 7, world_size=2, files=files, keep=1)
    found = checkpoints.find_latest(root)
    assert found is not None and [info.path for info in found.files] == ["deepspeed/0.pt", "deepspeed/1.pt"]
    copy = checkpoints.local_copy(root, 7)
    assert (copy / "deepspeed" / "1.pt").read_bytes() == bytes([1]) * 100
