import errno
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_ds import storage
from ray_ds.errors import StorageRefused


def test_write_is_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = str(tmp_path / "folder" / "file.json")
    storage.write_bytes(target, b"one")
    storage.write_bytes(target, b"two")
    assert storage.read_bytes(target) == b"two"
    assert os.listdir(tmp_path / "folder") == ["file.json"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own; root mounts it, others get a limit that the kernel enforces alike."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "ray_ds", folder]).returncode == 0
    ):
        yield folder
        subprocess.run(["umount", folder], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.shows("A full disk stops the job with the disk's name and its free bytes; what was there stays whole")
def test_a_full_disk_keeps_the_old_file_and_says_which_disk(small_disk: Path) -> None:
    target = str(small_disk / "folder" / "file")
    storage.write_bytes(target, b"old")
    with pytest.raises(StorageRefused, match="must be on a disk with room for it; free space at /") as error:
        storage.write_bytes(target, b"new" * 700_000)
    assert error.value.errno in storage.DISK_FULL
    assert error.value.field == target
    if os.path.ismount(small_disk):
        assert f"of 1,048,576 bytes are free on the disk at {small_disk}" in str(error.value)
    assert Path(target).read_bytes() == b"old"
    assert os.listdir(small_disk / "folder") == ["file"]
    storage.write_bytes(target, b"new")
    assert storage.read_bytes(target) == b"new"


def test_a_write_that_fails_for_another_reason_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(tmp_path / "file")
    storage.write_bytes(target, b"old")

    def broken_disk(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken_disk)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        storage.write_bytes(target, b"new")
    assert Path(target).read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_uri_is_the_path_it_names(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/50%25#x", b"1")
    assert storage.read_bytes(f"{tmp_path}/50%25#x") == b"1" == storage.read_bytes(f"file://{tmp_path}/50%25#x")


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
