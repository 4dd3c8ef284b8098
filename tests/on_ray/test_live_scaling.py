"""A real Serve on loopback: replicas come with load and go without, models are swapped, processes are killed."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator

os.environ["RAY_AUTH_MODE"] = "disabled"

import aiohttp
import psutil
import pytest
import ray

from jobs.bench.autoscaling.live import PLACES, Traffic, ask, clients, make_model, make_settings, num_running, put_up
from ray_ds.artifacts import Artifact
from ray_ds.config.serve import AutoscalingSettings, ServeSettings
from ray_ds.serve.client import read_health
from tests.cluster.ray_processes import eventually, free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    return [make_model(tmp_path_factory.mktemp("models"), seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    ray.init(address="local", num_cpus=4, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    yield free_port()
    ray.serve.shutdown()
    ray.shutdown()


def with_scaling(port: int, **scaling: object) -> ServeSettings:
    return make_settings(port, AutoscalingSettings(**scaling))  # type: ignore[arg-type]


def processes(name: str) -> list[int]:
    """Return the ids of this test's own Ray actors of a kind."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}"):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


async def until(what: str, check: Callable[[], bool], timeout_s: float) -> None:
    """Wait until a check is true."""
    await asyncio.to_thread(eventually, what, check, timeout_s=timeout_s)


@pytest.mark.shows(
    "Load brings a second replica by what engines report; it goes when the load is over, its streams whole"
)
def test_load_brings_a_replica_and_quiet_takes_it_away(models: list[Artifact], port: int) -> None:
    # Reports of two replicas are not of the same moment, so one client that goes to and fro may count as two; those
    # must fit into one replica.
    settings = make_settings(port, AutoscalingSettings(max_replicas=2, downscale_delay_s=5.0), places=PLACES * 2)
    url = put_up(models[0], settings)

    async def drive() -> Traffic:
        traffic = Traffic()
        async with clients(url, 1, traffic):  # goes on while the second replica comes and goes
            async with clients(url, PLACES * 4, traffic):
                await until("a second replica", lambda: num_running(settings) == 2, 60)
                await asyncio.sleep(3.0)
            await until("one replica", lambda: num_running(settings) == 1, 60)
            await asyncio.sleep(3.0)
        return traffic

    traffic = asyncio.run(drive())
    assert traffic.errors == [] and traffic.answers > 0


@pytest.mark.shows("A model is swapped under load without a failed request")
def test_a_model_is_swapped_under_load(models: list[Artifact], port: int) -> None:
    settings = with_scaling(port, max_replicas=1)
    url = put_up(models[0], settings)

    async def drive() -> Traffic:
        traffic = Traffic()
        async with clients(url, 3, traffic):
            for model in (models[1], models[0]):
                await asyncio.sleep(1.0)
                await asyncio.to_thread(put_up, model, settings)
            await asyncio.sleep(3.0)
        return traffic

    traffic = asyncio.run(drive())
    assert traffic.errors == [] and traffic.answers > 10
    health = read_health(url)
    assert health is not None and health["digest"] == models[0].digest


@pytest.mark.shows("Without requests the last replica goes; the next request brings it back and is answered")
def test_zero_and_back(models: list[Artifact], port: int) -> None:
    scaling = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 1.0, "downscale_to_zero_delay_s": 2.0}
    settings = with_scaling(port, **scaling)
    url = put_up(models[0], settings)

    async def drive() -> Traffic:
        traffic = Traffic()
        await until("no replica", lambda: num_running(settings) == 0, 20)
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(ask(session, url, traffic) for _ in range(3)))
        return traffic

    traffic = asyncio.run(drive())
    assert traffic.errors == [] and traffic.answers == 3


@pytest.mark.shows(
    "SIGKILL of a replica or of Serve's controller under load: every request ends, in an answer or an error"
)
def test_kills_under_load_leave_no_request_without_an_end(models: list[Artifact], port: int) -> None:
    settings = with_scaling(port, min_replicas=2, max_replicas=2)
    url = put_up(models[0], settings)

    async def drive() -> tuple[Traffic, Traffic]:
        of_replica, of_controller = Traffic(), Traffic()
        await until("two replicas", lambda: num_running(settings) == 2, 30)
        async with clients(url, 4, of_replica):
            await asyncio.sleep(2.0)
            os.kill(processes("ServeReplica:ray-ds")[0], signal.SIGKILL)
            await asyncio.sleep(3.0)
        await until("two replicas again", lambda: len(processes("ServeReplica:ray-ds")) == 2, 30)
        async with clients(url, 4, of_controller):
            await asyncio.sleep(1.0)
            os.kill(processes("ServeController")[0], signal.SIGKILL)
            await asyncio.sleep(4.0)
        return of_replica, of_controller

    of_replica, of_controller = asyncio.run(asyncio.wait_for(drive(), 90))
    assert of_replica.answers > 4 and of_controller.answers > 4
    assert 1 <= len(of_replica.errors) <= 8, "those that the killed replica had, and a try or two of theirs"
    assert of_controller.errors == [], "requests do not pass the controller"
