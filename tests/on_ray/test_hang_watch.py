import logging
import math
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import pytest
import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ray_ds.on_ray.hang_watch import KILL_ALL_S, SLOW_S, Beat, HangWatch, find_hung, patience_s
from ray_ds.on_ray.keeper import SnapshotKeeper
from ray_ds.on_ray.keepers import KeeperFleet
from ray_ds.on_ray.pulse import PULSE_S, Pulse
from ray_ds.train.stacks import ProcessView
from tests.on_ray.two_nodes import wait_for

TIMEOUT_S = 60.0


def make_beat(rank: int, place: str = "step 12 micro-batch 3", *, within: int = 3, silent_s: float = 100.0) -> Beat:
    """Return where a process of three is, in the thirteenth step of its worker group."""
    return Beat(
        attempt=1,
        rank=rank,
        world_size=3,
        node_id=f"node{rank}",
        pid=1000 + rank,
        started=1,
        place=place,
        step=12,
        within=within,
        is_warm=True,
        silent_s=silent_s,
    )


def test_process_that_is_furthest_behind_is_the_one_the_others_wait_for() -> None:
    beats = [make_beat(0, within=7), make_beat(1, within=2, silent_s=90), make_beat(2, within=7, silent_s=120)]
    assert find_hung(beats, TIMEOUT_S) is beats[1]
    beats[2] = replace(beats[2], step=11, within=9)
    assert find_hung(beats, TIMEOUT_S) is beats[2]


def test_nothing_is_hung_while_one_process_gets_on() -> None:
    beats = [make_beat(0), make_beat(1), make_beat(2, silent_s=TIMEOUT_S - 1)]
    assert find_hung(beats, TIMEOUT_S) is None


def test_nothing_is_hung_while_the_state_of_one_process_is_unknown() -> None:
    assert find_hung([make_beat(0), make_beat(1)], TIMEOUT_S) is None
    assert find_hung([], TIMEOUT_S) is None


@pytest.mark.parametrize(
    "place",
    ["start", "building the model", "loading the state", "validation", "keeping the state", "writing the model"],
)
def test_all_but_steps_may_take_half_an_hour(place: str) -> None:
    beat = make_beat(0, place)
    assert patience_s(beat, TIMEOUT_S) == SLOW_S
    assert patience_s(beat, 2 * SLOW_S) == 2 * SLOW_S
    others = [make_beat(1, "step 13 micro-batch 0"), make_beat(2, "step 13 micro-batch 0")]
    assert find_hung([beat, *others], TIMEOUT_S) is None
    assert find_hung([replace(beat, silent_s=SLOW_S + 1), *others], TIMEOUT_S) is not None


def test_first_step_after_a_start_may_compile_for_half_an_hour() -> None:
    cold = replace(make_beat(0), is_warm=False)
    assert (patience_s(cold, TIMEOUT_S), patience_s(make_beat(0), TIMEOUT_S)) == (SLOW_S, TIMEOUT_S)


def test_safe_process_may_wait_for_ever_but_not_for_a_hung_one() -> None:
    safe = [make_beat(rank, "safe", silent_s=math.inf) for rank in range(3)]
    assert find_hung(safe, TIMEOUT_S) is None
    hung = make_beat(1)
    assert find_hung([safe[0], hung, safe[2]], TIMEOUT_S) is hung


def test_keeper_says_how_long_a_process_is_where_it_is_and_forgets_older_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    keeper = SnapshotKeeper(0)
    beat = make_beat(0, silent_s=0.0)
    for _ in range(2):
        keeper.beat(beat)
        now[0] += 5
    assert keeper.beats() == [replace(beat, silent_s=10.0)]
    keeper.beat(replace(beat, within=4))
    assert [known.silent_s for known in keeper.beats()] == [0.0]
    keeper.beat(replace(beat, attempt=2))
    keeper.beat(replace(beat, rank=1))
    assert [(known.attempt, known.rank) for known in keeper.beats()] == [(2, 0)]
    keeper.leave(1, 0)
    assert len(keeper.beats()) == 1
    keeper.leave(2, 0)
    assert keeper.beats() == []


@dataclass
class Nodes:
    """Nodes with processes that are where a test says."""

    all: list[Beat]
    stopped: set[int] = field(default_factory=set)
    killed: list[int] = field(default_factory=list)

    def beats(self) -> Sequence[Beat]:
        return self.all

    def view(self, beats: Sequence[Beat]) -> Mapping[int, ProcessView]:
        states = {beat.rank: "T (stopped)" if beat.rank in self.stopped else "S (sleeping)" for beat in beats}
        return {rank: ProcessView(pid=1, state=state, text=f"in f{rank}\n") for rank, state in states.items() if rank}

    def kill(self, beat: Beat) -> bool:
        self.killed.append(beat.rank)
        return True


def test_hung_process_is_told_once_with_all_traces_and_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nodes = Nodes([make_beat(0, within=5), make_beat(1), make_beat(2, within=5)])
    watch = HangWatch(TIMEOUT_S, nodes, str(tmp_path / "hangs"))
    with caplog.at_level(logging.INFO, logger="ray_ds"):
        hang = watch.look(0.0)
        assert hang is not None
        assert [watch.look(second) for second in range(1, 20)] == [None] * 19
    assert (hang.beat, nodes.killed) == (nodes.all[1], [1])
    (file,) = (tmp_path / "hangs").glob("*-rank-1.txt")
    assert caplog.messages == [
        f'hung rank=1 node=node1 place="step 12 micro-batch 3" seconds=100 traces={file}',
    ]
    text = file.read_text()
    assert text.startswith("rank 1 is hung: the others wait for it\n")
    assert "rank 0: 'step 12 micro-batch 3' for 100 s, pid 1000 on node node0" in text
    assert text.index("in f1") < text.index("its node did not answer") < text.index("in f2")


def test_stopped_process_is_at_fault_whoever_seems_to_be_behind(tmp_path: Path) -> None:
    nodes = Nodes([make_beat(0), make_beat(1), make_beat(2, within=9)], stopped={2})
    HangWatch(TIMEOUT_S, nodes, str(tmp_path)).look(0.0)
    assert nodes.killed == [2]


def test_rest_of_a_group_that_does_not_end_is_killed_too(tmp_path: Path) -> None:
    nodes = Nodes([make_beat(0), make_beat(1, within=1), make_beat(2)])
    watch = HangWatch(TIMEOUT_S, nodes, str(tmp_path))
    watch.look(0.0)
    watch.look(KILL_ALL_S - 1)
    assert nodes.killed == [1]
    watch.look(KILL_ALL_S + 3)
    assert nodes.killed == [1, 0, 1, 2]


def test_next_worker_group_is_watched_anew(tmp_path: Path) -> None:
    nodes = Nodes([make_beat(0), make_beat(1, within=1), make_beat(2)])
    watch = HangWatch(TIMEOUT_S, nodes, str(tmp_path))
    watch.look(0.0)
    # What is left of the old group is seen beside the new one.
    fresh = [replace(make_beat(rank, silent_s=1.0), attempt=2) for rank in range(3)]
    nodes.all = [*nodes.all[:1], *fresh]
    assert watch.look(100.0) is None
    nodes.all = [replace(beat, silent_s=100.0, within=3 - beat.rank) for beat in fresh]
    hang = watch.look(200.0)
    assert hang is not None
    assert (hang.beat.attempt, nodes.killed) == (2, [1, 2])


def test_traces_that_cannot_be_written_keep_nobody_alive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    nodes = Nodes([make_beat(0), make_beat(1, within=1), make_beat(2)])
    with caplog.at_level(logging.INFO, logger="ray_ds"):
        assert HangWatch(TIMEOUT_S, nodes, str(tmp_path / "file")).look(0.0) is not None
    assert 'traces="could not be written to' in caplog.text
    assert nodes.killed == [1]


RUN = "hangs"


def hang_once(config: dict[str, Any]) -> int:
    """Train two steps in which nothing happens, then wait for each other; in the first group one hangs in step 3."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    folder = Path(config["folder"])
    attempt = 2 if (folder / f"started-{rank}").exists() else 1
    (folder / f"started-{rank}").touch()
    pulse = Pulse(RUN, rank=rank, world_size=2, attempt=attempt)
    for step in (1, 2, 3):
        pulse.beat(f"step {step} micro-batch 0")
    if attempt == 1 and rank == 1:
        time.sleep(2 * PULSE_S)  # a process that stops earlier has not said yet that it has come so far
        stops_here(folder, config["kind"])
    if attempt == 1:
        pulse.beat("step 3 gradients")  # as the loop does before it waits for the others
        waits_for_the_other()
    pulse.close()
    return attempt


def stops_here(folder: Path, kind: str) -> None:
    (folder / "hung").touch()
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def waits_for_the_other() -> None:
    time.sleep(3600)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("A hung worker is found in a set time, all stack traces are kept, and training goes on without it")
@pytest.mark.parametrize("kind", ["stopped", "deadlock"])
def test_hung_worker_of_ray_train_is_found_in_time_with_traces_and_replaced(kind: str, tmp_path: Path) -> None:
    timeout_s = 3.0
    ray.init("local", num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    fleet = KeeperFleet(RUN)
    try:
        fleet.refresh([node["NodeID"] for node in ray.nodes()])
        trainer = DataParallelTrainer(
            hang_once,
            train_loop_config={"folder": str(tmp_path), "kind": kind},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(
                name="hangs", storage_path=str(tmp_path / "ray"), failure_config=FailureConfig(max_failures=1)
            ),
        )
        outcome: list[Any] = []
        fit = threading.Thread(target=lambda: outcome.append(trainer.fit().return_value), daemon=True)
        fit.start()
        wait_for((tmp_path / "hung").exists)
        hung_at = time.monotonic()
        watch = HangWatch(timeout_s, fleet, str(tmp_path / "hangs"))
        hang = wait_for(lambda: watch.look(time.monotonic()))
        found_at = time.monotonic()
        assert (hang.beat.rank, hang.beat.place) == (1, "step 3 micro-batch 0")
        assert hang.beat.silent_s > timeout_s
        assert found_at - hung_at < timeout_s + 10
        text = Path(hang.traces).read_text()
        mine, other = text.split("===== rank 0 =====")
        assert "stops_here (test_hang_watch.py" in mine
        assert "waits_for_the_other (test_hang_watch.py" in other
        fit.join(timeout=90)
        assert outcome == [2], "the second group ends well"
        print(f"found in {found_at - hung_at:.1f} s, replaced in {time.monotonic() - found_at:.1f} s")
        assert fleet.beats() == []
    finally:
        fleet.shutdown()
        ray.shutdown()
