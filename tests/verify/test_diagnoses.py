"""Planted faults: each of them is found where it is planted, and named with what mends it."""

import copy
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ray_ds import storage
from ray_ds.on_ray.board import Event
from ray_ds.verify import node_probe
from ray_ds.verify.changes import judge_join, judge_kill
from ray_ds.verify.collectives import judge_pairs, judge_sums
from ray_ds.verify.context import ClusterNode
from ray_ds.verify.group_member import GroupMember
from ray_ds.verify.node_health import judge_clocks, judge_limits, judge_locks, skew_s
from ray_ds.verify.node_settings import HEALTH_DEFAULTS, HEALTH_GOOD, judge_access, judge_health, judge_stop
from ray_ds.verify.serving import Load, judge_load
from ray_ds.verify.shared_storage import (
    judge_reads,
    judge_replaced,
    judge_speed,
    judge_writes,
    read_from_here,
    write_from_here,
)
from ray_ds.verify.tiny_training import Trained, judge_losses, largest_difference
from ray_ds.verify.training import judge_resume
from ray_ds.verify.versions import judge_arch_lists, judge_gpus, judge_versions


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return node_probe.probe_node()


@pytest.mark.parametrize("package", ["ray", "torch", "deepspeed", "pyarrow"])
def test_a_package_that_differs_on_one_node(here: dict[str, Any], package: str) -> None:
    other = copy.deepcopy(here)
    other["packages"][package] = "0.9"
    (problem,) = judge_versions(here, {"a": here, "b": other})
    wanted = here["packages"][package]
    assert problem.wrong == f"{package} on node b is 0.9, and {wanted} where the job's driver runs"
    assert problem.action == f"install {package} {wanted} on every node, or one image"


def test_other_source_files_of_the_same_version(
    here: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = []
    for name, text in (("first", "X = 1\n"), ("second", "X = 2\n")):
        (tmp_path / name / "planted").mkdir(parents=True)
        (tmp_path / name / "planted/__init__.py").write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [str(tmp_path / name), *sys.path])
            facts.append({**here, "ray_ds": node_probe.describe_package("planted")})
    assert judge_versions(facts[0], {"b": facts[0]}) == []
    (problem,) = judge_versions(facts[0], {"b": facts[1]})
    assert "other source files" in problem.wrong and str(tmp_path / "second") in problem.wrong
    shipped = {**here, "ray_ds": {**here["ray_ds"], "folder": "/tmp/ray/runtime_resources/working_dir_files/1/ray_ds"}}
    (problem,) = judge_versions(here, {"b": shipped})
    assert ".rayignore" in problem.action


def test_a_package_that_is_missing_is_said_to_be() -> None:
    assert node_probe.package_version("no-such-package") == "missing"
    assert node_probe.describe_package("no_such_package")["version"] == "missing"


def test_gpus_that_torch_does_not_reach_or_that_differ() -> None:
    good = {"driver": "550", "torch_cuda": "12.8", "reaches_gpu": True, "nccl": True}
    assert judge_gpus({"a": good, "b": dict(good)}) == []
    (problem,) = judge_gpus({"a": good, "b": {**good, "reaches_gpu": False}})
    assert "node b reaches no GPU" in problem.wrong and "driver 550" in problem.wrong
    assert "no NCCL" in judge_gpus({"a": {**good, "nccl": False}})[0].wrong
    assert judge_gpus({"a": good, "b": {**good, "driver": "535"}})[0].wrong == "nodes differ in driver: 535, 550"
    assert judge_arch_lists({"a": "9.0", "b": "9.0a"})[0].startswith("TORCH_CUDA_ARCH_LIST (9.0a) on node b")


def test_a_planted_build_lock_is_stale_unless_a_process_holds_it(here: dict[str, Any], tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 60, time.time() - 60))
    (problem,) = judge_locks({"a": {**here, "locks": node_probe.find_locks(tmp_path)}})
    assert str(lock) in problem.wrong and problem.action == f"delete {lock}"
    stale = node_probe.find_locks(tmp_path)
    with lock.open():
        held = node_probe.find_locks(tmp_path)
        assert judge_locks({"a": {**here, "locks": held}}) == []
        # a shared home folder: another node sees the lock and not its owner
        assert judge_locks({"a": {**here, "locks": held}, "b": {**here, "locks": stale}}) == []
    os.utime(lock)
    assert judge_locks({"a": {**here, "locks": node_probe.find_locks(tmp_path)}}) == []  # made just now


def test_limits_space_and_clocks() -> None:
    good = {"open_files": 65536, "shm_bytes": 8 << 30, "temp_free_bytes": 100 << 30, "temp": "/tmp"}
    assert judge_limits({"a": good}) == ([], [])
    problems, _ = judge_limits({"a": {**good, "open_files": 1024}, "b": {**good, "shm_bytes": 64 << 20}})
    assert "node a may open 1024 files" in problems[0].wrong and "ulimit -n" in problems[0].action
    assert "/dev/shm on node b holds 64 MiB" in problems[1].wrong and "--shm-size" in problems[1].action
    problems, _ = judge_limits({"a": {**good, "temp_free_bytes": 1 << 30}})
    assert "1.0 GiB left" in problems[0].wrong
    problems, advice = judge_limits({str(n): {**good, "open_files": 20000} for n in range(12)})
    assert problems == [] and len(advice) == 9 and advice[-1] == "and 4 more of the kind"
    assert (skew_s(105.0, 100.0, 101.0), skew_s(95.0, 100.0, 101.0), skew_s(100.5, 100.0, 101.0)) == (4.0, -5.0, 0.0)
    (problem,) = judge_clocks({"a": 0.5, "b": -5.0})
    assert problem.wrong == "the clock of node b is 5.0 s behind of the driver's"


def test_how_ray_was_started() -> None:
    assert judge_health(HEALTH_GOOD) == []
    (advice,) = judge_health(HEALTH_DEFAULTS)
    assert "after 15 s" in advice and "RAY_health_check_period_ms=500" in advice
    assert judge_stop(60) == [] and "RAY_JOB_STOP_WAIT_TIME_S=60" in judge_stop(3)[0]
    near = ClusterNode(node_id="a", address="127.0.0.2")
    far = ClusterNode(node_id="b", address="10.0.0.7")
    assert judge_access("disabled", (near,)) == judge_access("token", (far,)) == []
    assert "10.0.0.7 may run programs" in judge_access("disabled", (near, far))[0].wrong


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    taken = tmp_path / "runs"
    taken.write_text("a file")
    facts = write_from_here(str(taken / "verify"), "node1")
    (problem,) = judge_writes({"a": facts}, str(taken))
    assert problem.wrong.startswith(f"node a cannot write in run_dir ({taken}): ")
    assert "mount it writable" in problem.action and "every node mounts" in problem.action
    full = {"error": None, "free_bytes": 5 << 20}
    assert "5 MiB left as node b sees it" in judge_writes({"b": full}, "/runs")[0].wrong
    denied = {"error": "AccessDenied", "free_bytes": None}
    assert "credentials" in judge_writes({"b": denied}, "s3://bucket/runs")[0].action


def test_a_folder_that_is_not_shared_and_bytes_that_change(tmp_path: Path) -> None:
    mine, yours = str(tmp_path / "mine"), str(tmp_path / "yours")
    facts = write_from_here(mine, "node1")
    assert facts["error"] is None and facts["mb_s"] > 0
    good = read_from_here(mine, "node1", facts["sha256"], ["node1"])
    assert good["lag_s"] == 0.0 and judge_reads({"b": good}, mine) == []
    (problem,) = judge_reads({"b": read_from_here(yours, "node1", facts["sha256"], ["node1"])}, mine)
    assert "does not see in run_dir" in problem.wrong and "every node mounts" in problem.action
    data = bytearray(storage.read_bytes(f"{mine}/node1.bin"))
    data[7] ^= 1
    storage.write_bytes(f"{mine}/node1.bin", bytes(data))
    (problem,) = judge_reads({"b": read_from_here(mine, "node1", facts["sha256"], ["node1"])}, mine)
    assert problem.wrong == "node b read other bytes than node node1 wrote"


def test_storage_that_shows_changes_late_or_is_slow() -> None:
    late = {"error": None, "of": "node1", "is_same": True, "lag_s": None}
    assert "actimeo=1" in judge_reads({"b": late}, "/runs")[0].action
    assert judge_replaced({"a": 0.1, "b": None}, "/runs")[0].wrong.startswith("node b still reads the old content")
    slow = {"slowest_write_mb_s": 5.0, "slowest_read_mb_s": 500.0, "longest_lag_s": 3.0}
    advice = judge_speed(slow)
    assert len(advice) == 2 and "writes 5.0 MB/s" in advice[0] and "3.0 s late" in advice[1]


@pytest.fixture
def member() -> Iterator[GroupMember]:
    member = GroupMember("gloo")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    port = store.port
    del store
    member.join("127.0.0.1", port, 0, 1)
    yield member
    dist.destroy_process_group()


def test_a_sum_that_is_wrong_in_one_element(member: GroupMember, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge_sums("gloo", {"a rank 0": member.add_up()}) == []
    true_sum = dist.all_reduce

    def wrong_sum(values: torch.Tensor) -> None:
        true_sum(values)
        if values.numel() == 1 << 20:
            values[12345] += 1

    monkeypatch.setattr(dist, "all_reduce", wrong_sum)
    (problem,) = judge_sums("gloo", {"a rank 0": member.add_up()})
    assert problem.wrong == "gloo added up wrong on a rank 0: 1 elements of 1048576"
    assert "take the node out" in problem.action


def test_nodes_that_do_not_reach_each_other() -> None:
    reached, blocked = {"seconds": 0.1, "error": None}, {"seconds": None, "error": "port 4711: timed out"}
    assert judge_pairs({"a": {"a": reached, "b": reached}}) == []
    (problem,) = judge_pairs({"a": {"a": reached, "b": blocked}})
    assert problem.wrong == "a does not reach b: port 4711: timed out" and "firewall" in problem.action


def trained(losses: list[float], *, stopped_at: int | None = None, begins_at: int = 1, **more: float) -> Trained:
    records: list[Any] = [
        {"step": step, "loss": loss, "time": 100.0 + step, "restarts": 0, "world_size": 2, **more}
        for step, loss in enumerate(losses, 1)
    ]
    run: Any = None
    event = Event(time=100.0, kind="stepping", facts={"step": begins_at})
    return Trained(run=run, settings=run, records=records, events=[event], stopped_at=stopped_at, seconds=1.0)


def test_losses_that_depend_on_the_number_of_workers() -> None:
    good, other, short = trained([4.0, 3.0]), trained([4.0, 3.003]), trained([4.0])
    assert largest_difference(good.records, good.records) == 0.0
    difference = largest_difference(good.records, other.records)
    (problem,) = judge_losses({"with 2 workers": difference}, "with 1 worker")
    assert "with 2 workers differ from those with 1 worker: by 0.001" in problem.wrong
    assert "steps are missing" in judge_losses({"x": largest_difference(good.records, short.records)}, "y")[0].wrong
    assert judge_losses({"x": float("nan")}, "y")


def test_a_stop_that_is_not_obeyed_and_a_checkpoint_that_is_not_found() -> None:
    stopped = trained([4.0, 3.0], stopped_at=5)
    assert judge_resume(stopped, trained([4.0], begins_at=6)) == []
    assert "its checkpoint was not found" in judge_resume(stopped, trained([4.0], begins_at=1))[0].wrong
    assert "went on to the end" in judge_resume(trained([4.0, 3.0]), trained([4.0]))[0].wrong


def test_training_that_does_not_go_on_after_a_kill_or_does_not_grow() -> None:
    note = {"time": 101.5, "step": 1, "workers": 2}
    quiet = trained([4.0, 3.0, 2.0])
    went_on = judge_kill(note, trained([4.0, 3.0, 2.0], restarts=1), quiet)
    assert (went_on.outcome, went_on.figures["kill_to_step_s"]) == ("passed", 0.5)
    died = judge_kill(note, quiet, quiet)
    assert died.outcome == "failed" and "no step followed on the death" in died.problems[0].wrong
    assert judge_join(quiet, quiet, None).outcome == "failed"
    assert "did not grow" in judge_join(quiet, quiet, None).problems[0].wrong


def test_requests_that_fail_and_a_second_replica_that_does_not_come() -> None:
    load = Load(url="http://127.0.0.1:1", key="k", answers=3)
    assert judge_load(load, 4.0) == []
    load.errors.append("HTTP 500")
    problems = judge_load(load, None)
    assert problems[0].wrong == "1 of 4 requests failed: HTTP 500" and "no second replica" in problems[1].wrong
