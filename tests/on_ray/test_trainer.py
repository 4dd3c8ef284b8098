import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import pytest
import ray
import ray._private.state

from ray_ds.errors import ConfigError
from ray_ds.on_ray.trainer import train_on_ray
from tests.train.runs import curve, make_settings, make_task, read_records, train_in_processes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SETTINGS = make_settings(steps=12, checkpoint_every=4, max_failures=1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def kill_a_worker() -> None:
    """Kill one training process of this test's cluster."""
    actors = ray._private.state.actors().values()
    workers = [a["Pid"] for a in actors if "TrainWorker" in a["ActorClassName"] and a["State"] == "ALIVE"]
    os.kill(workers[-1], signal.SIGKILL)


@pytest.mark.shows("Training survives the loss of a worker: it goes on from the last checkpoint with the same losses")
def test_killed_worker_is_replaced_and_the_losses_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    task = make_task(tmp_path, SETTINGS, "killed")
    steps: list[int] = []

    def watch(record: Mapping[str, float]) -> None:
        if record["step"] == 6 and 6 not in steps:
            kill_a_worker()
        steps.append(int(record["step"]))

    result = train_on_ray(task, work=str(tmp_path / "ray_train"), on_report=watch)
    assert (result.step, result.tokens) == (12, 12 * 256)
    assert steps.count(5) == 2, "steps after the checkpoint of step 4 run again"
    assert steps.count(4) == 1
    whole = make_task(tmp_path, SETTINGS, "whole")
    train_in_processes(whole)
    assert curve(read_records(task)) == curve(read_records(whole))


def test_mistake_found_by_a_worker_reaches_the_user_as_it_is(tmp_path: Path) -> None:
    settings = make_settings(steps=4, max_failures=0)
    task = make_task(tmp_path, settings, "two")
    train_in_processes(task)
    alone = make_task(tmp_path, make_settings(steps=4, max_failures=0, num_workers=1), "two")
    with pytest.raises(ConfigError, match=r"num_workers \(1\) must be 2, as many workers as wrote checkpoint"):
        train_on_ray(alone, work=str(tmp_path / "ray_train"), on_report=lambda _: None)
