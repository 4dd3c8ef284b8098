"""A run directory that a node cannot write, does not see or sees late is named with the node."""

import shutil
import threading
import time
from pathlib import Path

import pytest

from ray_ds.verify import shared_storage
from ray_ds.verify.shared_storage import (
    judge_reads,
    judge_replaced,
    judge_speed,
    judge_writes,
    read_from_here,
    wait_for_content,
    write_from_here,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_storage, "FILE_BYTES", 1 << 16)
    monkeypatch.setattr(shared_storage, "SEEN_WITHIN_S", 0.3)


def test_what_one_wrote_the_other_reads(tmp_path: Path) -> None:
    written = write_from_here(str(tmp_path), "one")
    read = read_from_here(str(tmp_path), "one", written["sha256"], ["one"])
    assert judge_writes({"a": written}, str(tmp_path)) == [] and judge_reads({"b": read}, str(tmp_path)) == []
    assert written["mb_s"] > 0 and written["free_bytes"] > 0 and read["mb_s"] > 0 and read["lag_s"] < 0.3


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # nobody, root included, makes a folder below a file
    run_dir = str(tmp_path / "file")
    (problem,) = judge_writes({"a": write_from_here(f"{run_dir}/work", "one")}, run_dir)
    assert problem.wrong.startswith(f"node a cannot write in run_dir ({run_dir}): ") and "mount it" in problem.action


def test_an_object_store_that_refuses_asks_for_credentials() -> None:
    (problem,) = judge_writes({"a": {"error": "ACCESS_DENIED"}}, "s3://bucket/runs")
    assert "ACCESS_DENIED" in problem.wrong and "credentials" in problem.action


def test_a_full_disk_is_named() -> None:
    (problem,) = judge_writes({"a": {"error": None, "free_bytes": 5 << 20}}, "/runs")
    assert problem.wrong == "run_dir (/runs) has 5 MiB left as node a sees it"


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    written = write_from_here(str(tmp_path / "of_a"), "one")
    (tmp_path / "of_b").mkdir()
    read = read_from_here(str(tmp_path / "of_b"), "one", written["sha256"], ["one"])
    (problem,) = judge_reads({"b": read}, "/runs")
    assert "node b does not see in run_dir (/runs)" in problem.wrong and "every node mounts" in problem.action


def test_other_bytes_are_named(tmp_path: Path) -> None:
    written = write_from_here(str(tmp_path), "one")
    write_from_here(str(tmp_path), "one")
    (problem,) = judge_reads({"b": read_from_here(str(tmp_path), "one", written["sha256"], ["one"])}, "/runs")
    assert "read other bytes" in problem.wrong


def test_a_listing_that_lags_is_named(tmp_path: Path) -> None:
    written = write_from_here(str(tmp_path), "one")
    read = read_from_here(str(tmp_path), "one", written["sha256"], ["one", "two"])
    (problem,) = judge_reads({"b": read}, "/runs")
    assert "does not list" in problem.wrong and "actimeo" in problem.action
    threading.Timer(0.1, lambda: shutil.copy(tmp_path / "one.bin", tmp_path / "two.bin")).start()
    late = read_from_here(str(tmp_path), "one", written["sha256"], ["one", "two"])
    assert judge_reads({"b": late}, "/runs") == [] and late["lag_s"] > 0.05


def test_a_file_that_stays_old_is_named(tmp_path: Path) -> None:
    note = tmp_path / "note"
    note.write_bytes(b"old")
    lag_s = wait_for_content(str(note), b"new")
    (problem,) = judge_replaced({"b": lag_s, "c": 0.1}, "/runs")
    assert lag_s is None and problem.wrong.startswith("node b still reads the old content")
    started = time.monotonic()
    note.write_bytes(b"new")
    assert wait_for_content(str(note), b"new") is not None and time.monotonic() - started < 0.2


def test_slow_storage_is_advice() -> None:
    good = {"slowest_write_mb_s": 500.0, "slowest_read_mb_s": 500.0, "longest_lag_s": 0.0}
    assert judge_speed(good) == []
    slow = judge_speed({"slowest_write_mb_s": 5.0, "slowest_read_mb_s": 500.0, "longest_lag_s": 3.0})
    assert len(slow) == 2 and "writes 5.0 MB/s" in slow[0] and "3.0 s late" in slow[1]
