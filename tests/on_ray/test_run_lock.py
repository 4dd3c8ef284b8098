import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import pytest
import ray
from ray.exceptions import ActorDiedError, RaySystemError

from ray_ds import storage
from ray_ds.errors import ClusterError, RetryableError, TakenOverError
from ray_ds.on_ray import lease, run_lock
from ray_ds.on_ray.lease import LEASE_S, SETTLE_S, Clock, LeaseFile, Owner, check_lease, lease_uri, read_lease
from ray_ds.on_ray.run_lock import RunLock, this_owner
from ray_ds.on_ray.stopping import end_on_sigterm, stop_request
from tests.on_ray.owners import START, make_owner


@dataclass
class Time:
    """A clock that moves when somebody waits; what else happens meanwhile is in `events`."""

    now: float = START
    events: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        due = [event for event in self.events if event[0] <= self.now]
        for event in due:
            self.events.remove(event)
            event[1]()

    @property
    def clock(self) -> Clock:
        return Clock(wall=lambda: self.now, sleep=self.sleep)


def holder(run: Path) -> str | None:
    """Return who the lease of a run directory names."""
    found = read_lease(str(run))
    return found.owner.job if found is not None else None


def test_free_run_directory_is_taken_after_a_moment_and_given_back(tmp_path: Path) -> None:
    time = Time()
    file = LeaseFile(str(tmp_path), make_owner("a"), time.clock)
    file.acquire()
    assert (time.now, holder(tmp_path)) == (START + SETTLE_S, "pretrain-a")
    assert lease_uri(str(tmp_path)) == f"{tmp_path}/work/lease.json"
    file.release()
    assert holder(tmp_path) is None
    file.release()


def test_living_owner_in_another_cluster_is_named_as_soon_as_it_shows_that_it_lives(tmp_path: Path) -> None:
    time = Time()
    first = LeaseFile(str(tmp_path), make_owner("a"), time.clock)
    first.acquire()
    time.events = [(time.now + 4, first.renew)]
    with pytest.raises(ClusterError) as raised:
        LeaseFile(str(tmp_path), make_owner("b", "c2"), time.clock).acquire()
    assert str(raised.value) == (
        f"run_dir ({tmp_path}) must have one job at work, and job pretrain-a of ada, process 42 on head, "
        "since 2027-01-15 08:00:00 UTC is; wait for it, stop it (`ray job stop pretrain-a` in the cluster c1), "
        "or use another run_dir."
    )
    assert time.now < START + 10
    assert holder(tmp_path) == "pretrain-a"


def test_dead_owner_in_another_cluster_is_outlived_and_the_log_says_how_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    time = Time()
    LeaseFile(str(tmp_path), make_owner("a"), time.clock).acquire()
    before = time.now
    with caplog.at_level("INFO", logger="ray_ds"):
        LeaseFile(str(tmp_path), make_owner("b", "c2"), time.clock).acquire()
    assert time.now == before + LEASE_S + SETTLE_S
    assert holder(tmp_path) == "pretrain-b"
    assert "waiting_for_lease" in caplog.messages[0] and "at_most_s=30" in caplog.messages[0]
    assert "job pretrain-a of ada" in caplog.messages[0]


@pytest.mark.parametrize("skew_s", [-600.0, 600.0])
def test_clocks_that_differ_by_minutes_decide_nothing(tmp_path: Path, skew_s: float) -> None:
    time = Time()
    skewed = Clock(wall=lambda: time.now + skew_s, sleep=time.sleep)
    first = LeaseFile(str(tmp_path), make_owner("a"), skewed)
    first.acquire()
    time.events = [(time.now + 4, first.renew)]
    with pytest.raises(ClusterError, match="job pretrain-a"):
        LeaseFile(str(tmp_path), make_owner("b", "c2"), time.clock).acquire()


def test_owner_of_the_same_cluster_and_one_of_yesterday_keep_nobody_waiting(tmp_path: Path) -> None:
    time = Time()
    LeaseFile(str(tmp_path), make_owner("a"), time.clock).acquire()
    before = time.now
    LeaseFile(str(tmp_path), make_owner("b"), time.clock).acquire()
    assert time.now == before + SETTLE_S
    time.now += 86_400
    LeaseFile(str(tmp_path), make_owner("c", "c2"), time.clock).acquire()
    assert time.now == before + SETTLE_S + 86_400 + SETTLE_S


def test_owner_that_leaves_meanwhile_is_not_waited_for(tmp_path: Path) -> None:
    time = Time()
    first = LeaseFile(str(tmp_path), make_owner("a"), time.clock)
    first.acquire()
    time.events = [(time.now + 3, first.release)]
    LeaseFile(str(tmp_path), make_owner("b", "c2"), time.clock).acquire()
    assert time.now < START + 10


def test_of_two_jobs_at_the_same_moment_one_is_refused(tmp_path: Path) -> None:
    time = Time()
    first, second = (LeaseFile(str(tmp_path), make_owner(name, name), time.clock) for name in "ab")
    outcomes: list[str] = []
    time.events = [(START + SETTLE_S / 2, second.acquire)]  # it found no lease either, and writes while the first waits
    read, times_read = lease.read_lease, 0

    def read_nothing_at_first(run_uri: str) -> lease.Lease | None:
        nonlocal times_read
        times_read += 1
        return None if times_read <= 2 else read(run_uri)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "read_lease", read_nothing_at_first)
        try:
            first.acquire()
            outcomes.append("a")
        except ClusterError as error:
            assert "job pretrain-b" in str(error)
    assert (outcomes, holder(tmp_path)) == ([], "pretrain-b")


def test_suspended_owner_stops_before_it_writes_again(tmp_path: Path) -> None:
    time = Time()
    first = LeaseFile(str(tmp_path), make_owner("a"), time.clock)
    first.acquire()
    check_lease(str(tmp_path), "token-a")
    LeaseFile(str(tmp_path), make_owner("b", "c2"), time.clock).acquire()
    with pytest.raises(TakenOverError, match=r"must still belong to this job, and job pretrain-b .* has taken it over"):
        first.renew()
    with pytest.raises(TakenOverError, match="pretrain-b"):
        check_lease(str(tmp_path), "token-a")
    check_lease(str(tmp_path), "token-b")
    first.release()
    assert holder(tmp_path) == "pretrain-b"


def test_slow_owner_whose_lease_nobody_took_renews_it(tmp_path: Path) -> None:
    time = Time()
    first = LeaseFile(str(tmp_path), make_owner("a"), time.clock)
    first.acquire()
    time.now += 1000
    check_lease(str(tmp_path), "token-a")
    first.renew()
    found = read_lease(str(tmp_path))
    assert found is not None
    assert found.renewed == time.now


def test_lease_that_vanished_is_lost_and_a_damaged_one_keeps_nobody_out(tmp_path: Path) -> None:
    time = Time()
    first = LeaseFile(str(tmp_path), make_owner("a"), time.clock)
    first.acquire()
    storage.write_bytes(lease_uri(str(tmp_path)), b"{")
    with pytest.raises(ClusterError, match="and its lease is gone"):
        first.renew()
    LeaseFile(str(tmp_path), make_owner("b"), time.clock).acquire()
    assert holder(tmp_path) == "pretrain-b"


DRIVER = """
import sys, time
import ray
from ray_ds.on_ray.run_lock import RunLock, this_owner
from tests.on_ray.owners import START, make_owner
ray.init(address=sys.argv[1], namespace="ray_ds", log_to_driver=False, configure_logging=False)
with RunLock(sys.argv[2], this_owner()) as lock:
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    context = ray.init(
        "local", num_cpus=1, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "RENEW_S", 0.1)


@pytest.mark.ray
def test_second_job_is_refused_with_the_name_of_the_first(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "pretrain-1"}}))
    first = this_owner()
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    second = this_owner()
    assert (first.job, first.pid, first.is_submitted) == ("pretrain-1", os.getpid(), True)
    assert (second.job, second.is_submitted) == (ray.get_runtime_context().get_job_id(), False)
    assert first.cluster == second.cluster != ""
    with RunLock(str(tmp_path), first) as lock:
        with pytest.raises(ClusterError) as raised, RunLock(f"{tmp_path}/", second):
            pass
        lock.check()
        with RunLock(str(tmp_path / "other"), second):
            assert holder(tmp_path / "other") == second.job
    assert f"job pretrain-1 of {first.user}, process {first.pid} on {first.host}, since" in str(raised.value)
    assert "wait for it, stop it (`ray job stop pretrain-1`), or use another run_dir" in str(raised.value)
    with RunLock(str(tmp_path), second):
        assert holder(tmp_path) == second.job
    assert holder(tmp_path) is None


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("A second job on a run directory is refused with the name of the first; a killed one blocks nobody")
def test_killed_job_blocks_nobody_in_its_cluster(address: str, tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, address, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "held\n"
        with pytest.raises(ClusterError, match=rf"process {driver.pid} on"), RunLock(str(tmp_path), this_owner()):
            pass
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        started = time.monotonic()
        with RunLock(str(tmp_path), this_owner()) as lock:
            assert time.monotonic() - started < 10
            lock.check()
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.ray
def test_of_many_jobs_at_the_same_moment_one_gets_in(address: str, tmp_path: Path) -> None:
    refused: list[ClusterError] = []
    inside: list[Owner] = []
    ended = threading.Event()

    def submit() -> None:
        owner = this_owner()
        try:
            with RunLock(str(tmp_path), owner):
                inside.append(owner)
                ended.wait(60)
        except ClusterError as error:
            refused.append(error)

    threads = [threading.Thread(target=submit) for _ in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(refused) + len(inside) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    ended.set()
    for thread in threads:
        thread.join()
    assert (len(inside), len(refused)) == (1, 2)


@pytest.mark.ray
def test_job_that_lost_its_run_directory_to_another_cluster_is_told(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ray_ds")
    with stop_request() as stop, RunLock(str(tmp_path), this_owner()) as lock:
        check: Callable[[], None] = pickle.loads(pickle.dumps(lock.check))  # as a worker gets it
        check()
        thief = replace(this_owner(), cluster="elsewhere", job="thief")
        stolen = lease.Lease(owner=thief, renewed=time.time(), renewals=1)
        storage.write_bytes(lease_uri(str(tmp_path)), lease._LEASE.dump_json(stolen))
        with pytest.raises(TakenOverError, match=r"and job thief of .* has taken it over"):
            check()
        deadline = time.monotonic() + 10
        while not stop.is_set() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert stop.is_set() and any("run_dir_lost" in line for line in caplog.messages)
    assert holder(tmp_path) == "thief"


def bare_lock(run: Path, monkeypatch: pytest.MonkeyPatch, now: Time) -> RunLock:
    """Return a lock whose actor is no part of the test, and whose lease is looked at all the time."""
    monkeypatch.setattr(RunLock, "_take_name", lambda _: None)
    monkeypatch.setattr(run_lock, "RENEW_S", 0.01)
    return RunLock(str(run), make_owner("a"), now.clock)


@pytest.mark.parametrize("error", [RaySystemError("the head is gone"), ActorDiedError()], ids=["head", "actor"])
def test_an_end_is_what_the_block_makes_it_though_ray_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run_lock.ray, "kill", fail)
    with pytest.raises(RetryableError, match="workers were lost"), bare_lock(tmp_path, monkeypatch, Time()):
        raise RetryableError("workers were lost; submit it again to go on")


@pytest.mark.shows("A job whose run directory another one has taken over stops by itself and names that one")
def test_a_job_that_was_taken_over_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = Time()
    monkeypatch.setattr(RunLock, "_give_name_back", lambda _: None)
    lock = bare_lock(tmp_path, monkeypatch, now)
    before = signal.getsignal(signal.SIGTERM)
    try:
        end_on_sigterm()
        with pytest.raises(TakenOverError, match="pretrain-b"), lock:
            other = LeaseFile(str(tmp_path), make_owner("b", "c2"), now.clock)
            for _ in range(1000):  # the lock may be about to write its own lease: until it looks again
                other._write()
                time.sleep(0.02)
    finally:
        signal.signal(signal.SIGTERM, before)
