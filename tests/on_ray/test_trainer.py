import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import pytest
import ray
import ray._private.state
import torch

from ray_ds.errors import ArtifactError, TakenOverError
from ray_ds.on_ray import trainer
from ray_ds.on_ray.trainer import TrainLoop, train_on_ray
from ray_ds.train.checkpoints.folders import committed_steps
from ray_ds.train.host import Host
from ray_ds.train.task import Stopped, TrainResult, TrainTask
from tests.on_ray.owners import take
from tests.train.runs import curve, make_settings, make_task, read_records, train_in_processes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SETTINGS = make_settings(steps=12, checkpoint_every=4, max_failures=1, snapshot_every=0)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def train_workers() -> list[dict[str, Any]]:
    """Return Ray's records of the training processes of this test's cluster, living and dead."""
    return [actor for actor in ray._private.state.actors().values() if "TrainWorker" in actor["ActorClassName"]]


def dies_once(task: TrainTask, host: Host) -> TrainResult | Stopped:
    """Train, but for one process that is killed after step 6, once."""
    from ray_ds.train.loop import train

    died = Path(task.output) / "died"
    report = host.report

    def report_and_die(record: Mapping[str, float]) -> None:
        report(record)
        if record["step"] == 6 and host.rank == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    host.report = report_and_die  # type: ignore[method-assign]
    return train(task, host)


def train_and_die(tmp_path: Path, **settings: Any) -> list[int]:
    """Return the steps of a run that lost a worker, in order; they gave what an undisturbed run gives."""
    task = make_task(tmp_path, make_settings(steps=12, max_failures=1, **settings), "killed")
    Path(task.output).mkdir(parents=True)
    steps: list[int] = []
    result = train_on_ray(
        task,
        work=str(tmp_path / "ray_train"),
        on_report=lambda record: steps.append(int(record["step"])),
        loop=dies_once,
    )
    assert (result.step, result.tokens) == (12, 12 * 256)
    whole = make_task(tmp_path, SETTINGS, "whole")
    train_in_processes(whole)
    assert curve(read_records(task)) == curve(read_records(whole))
    return steps


@pytest.mark.shows("Training survives the loss of a worker: it goes on from the last checkpoint with the same losses")
def test_killed_worker_is_replaced_and_the_losses_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    steps = train_and_die(tmp_path, checkpoint_every=4, snapshot_every=0)
    assert steps.count(5) == 2, "steps after the checkpoint of step 4 run again"
    assert steps.count(4) == 1


@pytest.mark.shows("A killed worker costs a step or two: its state was in the memory of other processes")
def test_killed_worker_costs_no_more_than_the_steps_since_the_last_snapshot(tmp_path: Path) -> None:
    steps = train_and_die(tmp_path, checkpoint_every=100, snapshot_every=1)
    assert [step for step in steps if steps.count(step) > 1] in ([], [6, 6], [5, 5], [5, 6, 5, 6])


def fails_once(task: TrainTask, kind: type[Exception], message: str, loop: TrainLoop | None = None) -> None:
    """Assert that a run ends with an error, and that its workers were never replaced."""
    before = len(train_workers())
    with pytest.raises(kind, match=message):
        train_on_ray(task, work=f"{task.output}/ray_train", on_report=lambda _: None, loop=loop)
    assert len(train_workers()) - before == task.settings.num_workers


def test_mistake_found_by_a_worker_ends_the_others_and_reaches_the_user_as_it_is(tmp_path: Path) -> None:
    def find(task: TrainTask, host: Host) -> TrainResult | Stopped:
        if host.rank == 1:
            raise ArtifactError("shards/0.arrow", "torn", "must be whole", "tokenize again")
        torch.distributed.barrier()
        raise AssertionError("the other worker is gone")

    fails_once(make_task(tmp_path, SETTINGS), ArtifactError, r"^shards/0.arrow \(torn\) must be whole; token", find)


def test_loss_that_is_no_number_ends_the_run_at_once(tmp_path: Path) -> None:
    task = make_task(tmp_path, make_settings(optimizer={"kind": "adamw", "eps": 1e-300}))
    fails_once(task, FloatingPointError, r"step \d+ is bad: the loss is (nan|inf); lower the learning rate")


@pytest.mark.shows("Training that another job has taken over ends at its next checkpoint, with the name of that job")
def test_run_that_another_job_has_taken_over_ends_at_its_next_checkpoint(tmp_path: Path) -> None:
    def lose_the_run(task: TrainTask, host: Host) -> TrainResult | Stopped:
        from ray_ds.train.loop import train

        report = host.report

        def report_and_lose(record: Mapping[str, float]) -> None:
            report(record)
            if record["step"] == 6 and host.rank == 0:
                take(task.output, "second")

        host.report = report_and_lose  # type: ignore[method-assign]
        return train(task, host)

    task = make_task(tmp_path, SETTINGS)
    options: dict[str, Any] = {"work": str(tmp_path / "w"), "on_report": lambda _: None, "loop": lose_the_run}
    with pytest.raises(TakenOverError, match=r"and job pretrain-second of ada, .* has taken it over"):
        train_on_ray(task, check_alone=take(task.output, "first"), **options)
    assert committed_steps(task.checkpoints) == [4]
    assert not (Path(task.output) / "model").exists()


def test_whatever_ray_train_raises_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def fit(self) -> None:
            raise RuntimeError("no room on the disk")

    monkeypatch.setattr(trainer, "_make_trainer", lambda *_: Broken())
    with pytest.raises(RuntimeError, match="no room on the disk"):
        train_on_ray(make_task(tmp_path, SETTINGS), work=str(tmp_path / "w"), on_report=lambda _: None)
