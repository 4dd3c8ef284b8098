"""Killed work resumes with the same bytes, and committed work is not done again."""

import hashlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from ray_ds.errors import InputError
from ray_ds.on_ray.units import Commit, Publish, WorkUnit, run_units
from tests.on_ray.two_nodes import add_node, committed_units, raylet_pid, read_attempts, start_cluster, wait_for

pytestmark = pytest.mark.ray

NUM_UNITS = 6
HELD = "00002"
WORK = "work/test"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster() as started:
        yield started


def _make_units() -> list[WorkUnit[str]]:
    names = [f"{number:05d}" for number in range(NUM_UNITS)]
    return [
        WorkUnit(name=name, input_hash=hashlib.sha256(name.encode()).hexdigest()[:16], payload=name) for name in names
    ]


def _make_work(hold: Path) -> Callable[[str, Publish], dict[str, Any]]:
    """Return work that waits, in one unit, as long as the file `hold` is there."""

    def work(name: str, publish: Publish) -> dict[str, Any]:
        publish(f"out/{name}.bin", name.encode() * 1000)
        while name == "00002" and hold.exists():
            time.sleep(0.05)
        return {"length": len(name)}

    return work


def _run(root: Path, hold: Path) -> list[Commit]:
    return run_units(_make_units(), _make_work(hold), root=str(root), folder=WORK, step="test")


def _outputs(root: Path) -> dict[str, bytes]:
    paths = [*root.glob("out/*"), *root.glob("work/test/commits/*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def _run_and_kill(root: Path, hold: Path, find_pids: Callable[[dict[str, Any]], list[int]]) -> list[Commit]:
    """Run; when all units but the held one are committed, kill what `find_pids` names; let go once it is begun again.

    A worker outlives its raylet while it is busy, and Ray 2.60 begins its task again only when it is gone: so for the
    death of a machine both are killed. Left alone, the worker commits the unit, and the repeated task finds that.
    """
    hold.touch()
    results: list[list[Commit]] = []
    runner = threading.Thread(target=lambda: results.append(_run(root, hold)), daemon=True)
    runner.start()
    wait_for(lambda: len(committed_units(root / WORK)) == NUM_UNITS - 1)
    (held,) = wait_for(lambda: [attempt for attempt in read_attempts(root / WORK) if attempt["unit"] == HELD])
    for pid in find_pids(held):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(read_attempts(root / WORK)) == NUM_UNITS + 1)
    hold.unlink()
    runner.join(timeout=120)
    assert results, "the run did not finish"
    return results[0]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed")
    _run(root, root / "no-hold")
    return _outputs(root)


def _assert_only_the_held_unit_was_repeated(root: Path) -> None:
    repeated = Counter(attempt["unit"] for attempt in read_attempts(root / WORK))
    assert {name: count for name, count in repeated.items() if count > 1} == {HELD: 2}


def test_a_killed_worker_costs_one_unit(cluster: Cluster, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    _run_and_kill(tmp_path, tmp_path / "hold", lambda held: [held["pid"]])
    assert _outputs(tmp_path) == undisturbed
    _assert_only_the_held_unit_was_repeated(tmp_path)


def test_a_killed_raylet_with_its_worker_costs_one_unit(
    cluster: Cluster, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    try:
        _run_and_kill(tmp_path, tmp_path / "hold", lambda held: [raylet_pid(cluster, held["node_id"]), held["pid"]])
    finally:
        add_node(cluster)
    assert _outputs(tmp_path) == undisturbed
    _assert_only_the_held_unit_was_repeated(tmp_path)


def test_a_second_run_does_only_what_is_missing_or_damaged(cluster: Cluster, tmp_path: Path) -> None:
    first = _run(tmp_path, tmp_path / "no-hold")
    before = _outputs(tmp_path)
    assert [commit.unit for commit in first] == [unit.name for unit in _make_units()]
    (tmp_path / "out/00001.bin").write_bytes(b"cut")
    (tmp_path / "out/00003.bin").unlink()
    next(tmp_path.glob("work/test/commits/00004-*")).write_bytes(b'{"unit": "000')
    assert _run(tmp_path, tmp_path / "no-hold") == first
    assert _outputs(tmp_path) == before
    repeated = Counter(attempt["unit"] for attempt in read_attempts(tmp_path / WORK))
    assert sorted(name for name, count in repeated.items() if count > 1) == ["00001", "00003", "00004"]


def test_a_users_mistake_comes_back_as_it_was(cluster: Cluster, tmp_path: Path) -> None:
    def work(name: str, publish: Publish) -> dict[str, Any]:
        raise InputError("raw.txt", "gone", "must be there", "put it back")

    with pytest.raises(InputError, match=r"raw.txt \(gone\) must be there; put it back"):
        run_units(_make_units(), work, root=str(tmp_path), folder=WORK, step="test")
