import os
from pathlib import Path

import pytest

from ray_ds import storage


def test_write_is_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = str(tmp_path / "folder" / "file.json")
    storage.write_bytes(target, b"one")
    storage.write_bytes(target, b"two")
    assert storage.read_bytes(target) == b"two"
    assert os.listdir(tmp_path / "folder") == ["file.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = str(tmp_path / "file")
    storage.write_bytes(target, b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes(target, b"new")
    assert Path(target).read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_list_files_is_sorted_and_hides_partial_writes(tmp_path: Path) -> None:
    for name in ("b/x", "a/y", "a/.z.1.ab.partial"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"123")
    assert storage.list_files(str(tmp_path)) == [
        storage.FileEntry(path="a/y", bytes=3),
        storage.FileEntry(path="b/x", bytes=3),
    ]
    assert storage.list_files(str(tmp_path / "absent")) == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt"]),
        ("**/*.txt", ["a.txt", "x/b.txt", "x/y/c.txt"]),
        ("x/*.txt", ["x/b.txt"]),
        ("x/y/c.txt", ["x/y/c.txt"]),
        ("?.txt", ["a.txt"]),
        ("z/*", []),
    ],
)
def test_glob(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert storage.glob_files(f"{tmp_path}/{pattern}") == [f"{tmp_path}/{name}" for name in expected]


def test_relative_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="is relative"):
        storage.read_bytes("runs/file")
    assert storage.is_absolute("s3://bucket/x") and storage.is_absolute("/x") and not storage.is_absolute("x")


def test_sha256_matches_hashlib(tmp_path: Path) -> None:
    import hashlib

    data = os.urandom(storage.HASH_BLOCK_BYTES + 17)
    (tmp_path / "f").write_bytes(data)
    assert storage.sha256_file(str(tmp_path / "f")) == hashlib.sha256(data).hexdigest()
