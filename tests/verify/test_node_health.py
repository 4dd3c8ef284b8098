"""Stale locks, small limits and wrong clocks are found, and what is right is left alone."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from ray_ds.verify.node_health import judge_clocks, judge_limits, judge_locks, skew_s
from ray_ds.verify.node_probe import extensions_folder, find_locks, is_open

GOOD = {
    "open_files": 1 << 20,
    "shm_bytes": 8 << 30,
    "temp": "/tmp",
    "temp_free_bytes": 100 << 30,
    "locks": [],
}


def plant_lock(folder: Path, age_s: float = 60.0) -> Path:
    path = folder / "py311_cpu" / "fused_op" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path


def judge(*nodes: Path) -> list[str]:
    facts = {f"n{number}": {"locks": find_locks(folder)} for number, folder in enumerate(nodes)}
    return [f"{problem.wrong}; {problem.action}" for problem in judge_locks(facts)]


def test_a_lock_whose_owner_is_dead_is_named_with_its_file(tmp_path: Path) -> None:
    path = plant_lock(tmp_path)
    (found,) = judge(tmp_path)
    assert found == (
        f"the build lock {path} on node n0 has no owner: it hangs every later worker that builds there; delete {path}"
    )


def test_a_lock_that_a_build_holds_is_left_alone(tmp_path: Path) -> None:
    path = plant_lock(tmp_path)
    with open(path):
        assert is_open(path)
        assert judge(tmp_path) == []
    assert not is_open(path)


def test_a_lock_that_was_made_a_moment_ago_is_left_alone(tmp_path: Path) -> None:
    plant_lock(tmp_path, age_s=0.0)
    assert judge(tmp_path) == []


def test_a_lock_in_a_shared_home_that_another_node_holds_is_left_alone() -> None:
    lock = {"path": "/home/u/.cache/torch_extensions/op/lock", "file": "7-1", "age_s": 100.0}
    nodes = {"a": {"locks": [{**lock, "is_held": False}]}, "b": {"locks": [{**lock, "is_held": True}]}}
    assert judge_locks(nodes) == []
    nodes["b"]["locks"][0]["is_held"] = False
    assert len(judge_locks(nodes)) == 1, "one file is one problem"


def test_locks_are_looked_for_where_torch_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_folder() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from torch.utils.cpp_extension import get_default_build_root

    assert str(extensions_folder()) == get_default_build_root()


def test_good_limits_are_right() -> None:
    assert judge_limits({"a": GOOD}) == ([], [])


@pytest.mark.parametrize(
    ("change", "wrong", "action"),
    [
        ({"open_files": 1024}, "may open 1024 files", "ulimit -n 65536"),
        ({"shm_bytes": 64 << 20}, "/dev/shm on node a holds 64 MiB", "--shm-size"),
        ({"temp_free_bytes": 1 << 30}, "/tmp on node a has 1.0 GiB left", "TMPDIR"),
    ],
)
def test_limits_that_are_too_small_are_problems(change: dict[str, Any], wrong: str, action: str) -> None:
    problems, advice = judge_limits({"a": {**GOOD, **change}})
    assert wrong in problems[0].wrong and action in problems[0].action and not advice


def test_limits_that_are_scarce_are_advice_and_not_said_a_thousand_times() -> None:
    problems, advice = judge_limits({f"n{number}": {**GOOD, "open_files": 20000} for number in range(20)})
    assert problems == [] and len(advice) == 9 and advice[-1] == "and 12 more of the kind"


def test_a_clock_is_wrong_only_beyond_the_time_that_the_question_took() -> None:
    assert skew_s(100.0, sent=99.0, received=103.0) == 0.0
    assert skew_s(110.0, sent=99.0, received=103.0) == 7.0
    assert skew_s(90.0, sent=99.0, received=103.0) == -9.0
    ahead, behind = judge_clocks({"a": 7.0, "b": -9.0, "c": 0.5})
    assert "node a is 7.0 s ahead" in ahead.wrong and "node b is 9.0 s behind" in behind.wrong
