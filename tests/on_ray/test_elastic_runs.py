"""Elastic training on real nodes that join, drain and die."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util import list_named_actors

from ray_ds.on_ray import trainer
from ray_ds.on_ray.elastic import SETTLE_S, ElasticTorchTrainer
from ray_ds.on_ray.keeper import find_keepers
from ray_ds.on_ray.outcome import LostTooOften
from ray_ds.on_ray.trainer import TrainingStopped
from ray_ds.train.host import Host
from ray_ds.train.task import Stopped, TrainResult, TrainTask
from tests.on_ray.elastic_runs import STEP_S, Run, bring_to, count_steps, drain_node, kill_node, worker_node_ids
from tests.on_ray.kill_join_schedules import SETTINGS, train_slowly
from tests.on_ray.two_nodes import start_cluster, wait_for
from tests.train.runs import make_settings, make_task

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster() as cluster:
        yield cluster


def is_keeper(actor: dict[str, str]) -> bool:
    return actor["name"].startswith("keeper-")


@pytest.mark.shows("Training grows onto a node that joins without losing a step: it pauses safely first")
def test_joined_node_is_used_and_no_step_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    bring_to(cluster, 1)
    run = Run(tmp_path)
    run.wait_until(lambda run: run.workers == 1)
    bring_to(cluster, 2)
    run.wait_until(lambda run: run.workers == 2)
    run.end()
    assert run.steps == list(range(1, len(run.steps) + 1)), "a step was lost or done twice"
    assert run.kinds().count("workers_started") == 2


@pytest.mark.shows(
    "A model divided over two workers grows by whole groups: one node that joins changes nothing, two do"
)
def test_nodes_are_used_once_a_whole_group_of_them_has_joined(cluster: Cluster, tmp_path: Path) -> None:
    bring_to(cluster, 2)
    run = Run(tmp_path, num_workers=[2, 4], parallel={"expert": 2})
    run.wait_until(lambda run: run.workers == 2)
    bring_to(cluster, 3)
    before = len(run.steps)
    run.wait_until(lambda run: len(run.steps) > before + (SETTLE_S + 3) / STEP_S)
    assert run.workers == 2 and "pause_asked" not in run.kinds()
    bring_to(cluster, 4)
    run.wait_until(lambda run: run.workers == 4)
    run.end()
    assert run.steps == list(range(1, len(run.steps) + 1)), "a step was lost or done twice"
    assert [event.facts["workers"] for event in run.events if event.kind == "workers_started"] == [2, 4]


@pytest.mark.shows("Training leaves a node that drains (`ray drain-node`, spot notice) in time, without losing a step")
def test_draining_node_is_left_in_time_and_no_step_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    bring_to(cluster, 2)
    run = Run(tmp_path)
    run.wait_until(lambda run: run.workers == 2)
    (leaving,) = worker_node_ids()[1:]
    deadline = time.time() + 60
    drain_node(cluster, leaving, 60)
    run.wait_until(lambda run: run.workers == 1)
    assert run.records[-1]["time"] < deadline
    run.end()
    assert run.steps == list(range(1, len(run.steps) + 1)), "a step was lost or done twice"
    assert "workers_lost" not in run.kinds()
    kill_node(cluster, leaving)


@pytest.mark.shows(
    "All nodes may drain and go: training's state is on storage in time, and the next node loses no step"
)
def test_all_nodes_drain_and_a_later_one_goes_on_without_a_step_lost(cluster: Cluster, tmp_path: Path) -> None:
    bring_to(cluster, 2)
    run = Run(tmp_path, loop=train_slowly, **{**SETTINGS, "checkpoint_every": 1000}, snapshot_every="auto", steps=2000)
    run.wait_until(lambda run: len(run.records) > 10 and run.records[-1]["world_size"] == 2)
    leaving = worker_node_ids()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda node_id: drain_node(cluster, node_id, 60), leaving))
    run.wait_until(lambda run: "leave_asked" in run.kinds() and run.kinds()[-1] == "safe")
    before = len(run.records)
    for node_id in leaving:
        kill_node(cluster, node_id)
    wait_for(lambda: not worker_node_ids())
    assert not any(is_keeper(actor) for actor in list_named_actors(all_namespaces=True)), "memory of the run is left"
    bring_to(cluster, 1)
    run.wait_until(lambda run: len(run.records) > before + 5)
    run.end()
    assert [int(record["step"]) for record in run.records] == list(range(1, len(run.records) + 1))
    assert "workers_lost" not in run.kinds()


@pytest.mark.shows("Training goes on with the survivors when a node is killed, from the newest state")
def test_killed_node_leaves_the_survivors_training(cluster: Cluster, tmp_path: Path) -> None:
    bring_to(cluster, 2)
    run = Run(tmp_path)
    run.wait_until(lambda run: run.workers == 2 and run.steps[-1] > 25)
    before = len(run.steps)
    kill_node(cluster, worker_node_ids()[1])
    run.wait_until(lambda run: run.workers == 1)
    run.end()
    first = next(step for step, record in zip(run.steps, run.records, strict=True) if record["workers"] == 1)
    assert run.steps[before - 1] - 10 <= first <= max(run.steps), "more than the steps since the last state were lost"
    assert run.kinds().count("workers_lost") == 1


@pytest.mark.shows("Training goes on from another node's memory though the one node with all workers is killed")
def test_the_only_node_with_workers_is_killed_and_another_has_the_state(cluster: Cluster, tmp_path: Path) -> None:
    bring_to(cluster, 2)
    settings = {**SETTINGS, "checkpoint_every": 1000, "num_workers": 1, "snapshot_every": 5, "steps": 2000}
    run = Run(tmp_path, loop=train_slowly, **settings)
    run.wait_until(lambda run: len(run.records) > 20)
    (name,) = {actor["name"].rpartition("-")[0] for actor in list_named_actors(all_namespaces=True) if is_keeper(actor)}
    beats = [ray.get(keeper.beats.remote()) for keeper in find_keepers(name.removeprefix("keeper-")).values()]
    (beat,) = [beat for of_node in beats for beat in of_node]
    before = len(run.records)
    kill_node(cluster, beat.node_id)
    run.wait_until(lambda run: run.kinds().count("stepping") == 2 and len(run.records) > before + 10)
    run.end()
    again = int(next(event.facts["step"] for event in run.events[::-1] if event.kind == "stepping"))
    assert 1 < again <= run.steps[before - 1] + 1, "nothing is on storage: it began anew"
    assert set(run.steps) == set(range(1, max(run.steps) + 1))


@pytest.mark.shows("A run that is told to stop ends once its state is safe; the next submit goes on from there")
def test_stopped_run_is_safe_and_the_next_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    bring_to(cluster, 1)
    run = Run(tmp_path, num_workers=1)
    run.wait_until(lambda run: len(run.steps) > 12)
    run.end()
    assert isinstance(run.error, TrainingStopped) and run.error.step == run.steps[-1]
    again = Run(tmp_path, num_workers=1, steps=run.error.step + 5)
    again.thread.join(60)
    assert again.result is not None and again.steps == [run.error.step + 1 + number for number in range(5)]


def test_run_that_waits_for_nodes_stops_when_told(cluster: Cluster, tmp_path: Path) -> None:
    bring_to(cluster, 1)
    run = Run(tmp_path, num_workers=[3, 4])
    time.sleep(3)
    run.end()
    assert isinstance(run.error, TrainingStopped) and run.error.step is None


def test_workers_that_die_without_coming_further_end_the_run(cluster: Cluster, tmp_path: Path) -> None:
    def fail(task: TrainTask, host: Host) -> TrainResult | Stopped:
        if (tries := Path(task.checkpoints) / "tries").exists():
            raise RuntimeError("no step")
        tries.parent.mkdir(parents=True, exist_ok=True)
        tries.touch()
        host.beat("step 1")
        time.sleep(2)
        raise RuntimeError("one step")

    bring_to(cluster, 1)
    run = Run(tmp_path, num_workers=1, loop=fail, max_failures=2)
    run.thread.join(200)
    assert isinstance(run.error, WorkerGroupError)
    assert [event.facts["in_a_row"] for event in run.events if event.kind == "workers_lost"] == [1, 2, 3]


def test_workers_that_are_killed_each_time_end_the_run_as_one_to_submit_again(cluster: Cluster, tmp_path: Path) -> None:
    def die(task: TrainTask, host: Host) -> TrainResult | Stopped:
        host.beat("step 1")
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    bring_to(cluster, 1)
    run = Run(tmp_path, num_workers=1, loop=die, max_failures=1)
    run.thread.join(200)
    assert isinstance(run.error, LostTooOften) and "submit it again to go on" in str(run.error)
    assert [event.facts["in_a_row"] for event in run.events if event.kind == "workers_lost"] == [1, 2]


@pytest.mark.shows("A worker that hangs is found in a set time: its stack traces are kept and training goes on")
def test_hung_worker_is_replaced_and_its_stacks_are_kept(cluster: Cluster, tmp_path: Path) -> None:
    def hang_once(task: TrainTask, host: Host) -> TrainResult | Stopped:
        hung = Path(task.checkpoints) / "hung"
        if not hung.exists():
            hung.parent.mkdir(parents=True, exist_ok=True)
            hung.touch()
            for step in (1, 2, 3):
                host.beat(f"step {step} micro-batch 1")
            time.sleep(600)
        return count_steps(task, host)

    bring_to(cluster, 1)
    run = Run(tmp_path, num_workers=1, loop=hang_once, hang_timeout_s=3.0)
    run.wait_until(lambda run: len(run.steps) > 3)
    run.end()
    (stacks,) = run.work.glob("hangs/*-rank-0.txt")
    assert "hang_once (" in stacks.read_text() and run.kinds().count("workers_lost") == 1


def test_stock_scaling_is_ray_trains_own(cluster: Cluster, tmp_path: Path) -> None:
    bring_to(cluster, 1)
    stock = make_task(tmp_path, make_settings(num_workers=[1, 2], scaling="stock"))
    assert type(trainer._make_trainer(stock, str(tmp_path), "name", None, None, print)) is TorchTrainer
    ours = make_task(tmp_path, make_settings(num_workers=[1, 2]))
    assert type(trainer._make_trainer(ours, str(tmp_path), "name", None, None, print)) is ElasticTorchTrainer
    for num_workers in ([1, 2], 1):
        run = Run(tmp_path / str(num_workers), num_workers=num_workers, scaling="stock", steps=5)
        run.thread.join(200)
        assert run.result is not None and run.steps == [1, 2, 3, 4, 5]


@pytest.mark.shows("A job that waits for nodes ends when it is told to stop, by our own scaling and by Ray Train's")
def test_stock_run_without_workers_stops_when_told(cluster: Cluster, tmp_path: Path) -> None:
    # The last test: Ray keeps for minutes what the run asked the autoscaler for, and its controller ends with us.
    bring_to(cluster, 1)
    run = Run(tmp_path, num_workers=[3, 4], scaling="stock")
    time.sleep(3)
    assert run.error is None and not run.records
    run.end()
    assert isinstance(run.error, TrainingStopped) and run.error.step is None
