"""Training's figures at the endpoint that Prometheus scrapes."""

import os

os.environ["RAY_AUTH_MODE"] = "disabled"

import time
import urllib.request
from collections.abc import Iterator

import pytest
import ray

from ray_ds.on_ray.gauges import GAUGES, TrainGauges
from ray_ds.train.metrics import FIELDS

pytestmark = pytest.mark.ray

RECORD = {name: 1.5 + number for number, name in enumerate(FIELDS)}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        "local",
        num_cpus=1,
        object_store_memory=80_000_000,
        include_dashboard=False,
        _system_config={"metrics_report_interval_ms": 200},
    )
    yield
    ray.shutdown()


def scrape() -> dict[str, float]:
    """Return training's samples as the node shows them, by name and run."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples = [line for line in lines if line.startswith("ray_ds_train_")]
    return {f"{line.split('{')[0]} {_label(line, 'run')}": float(line.rsplit(" ", 1)[1]) for line in samples}


def _label(line: str, name: str) -> str:
    return line.split(f'{name}="')[1].split('"')[0]


def wait_for(expected: dict[str, float]) -> None:
    deadline = time.monotonic() + 60.0
    seen: dict[str, float] = {}
    while seen != expected and time.monotonic() < deadline:
        time.sleep(0.2)
        try:
            seen = scrape()
        except OSError:  # the node's agent is still starting
            continue
    assert seen == expected


@pytest.mark.shows("Prometheus finds training's loss, MFU, goodput, lost time and memory at Ray's own endpoint")
def test_the_endpoint_shows_every_gauge_with_the_last_value() -> None:
    gauges = TrainGauges("pretrain-01234567")
    gauges.show({"step": 1, "loss": 9.0})
    gauges.show(RECORD)
    expected = {f"{name} pretrain-01234567": RECORD[name.removeprefix("ray_ds_train_")] for name in GAUGES}
    wait_for(expected)
    gauges.show({"step": 3, "restarts": 0, "loss": 0.25})
    key = "ray_ds_train_{} pretrain-01234567".format
    wait_for({**expected, key("step"): 3.0, key("restarts"): 0.0, key("loss"): 0.25})
