"""Scraping, alerts and dashboards, in a real Prometheus that reads a real Ray cluster with its token on."""

import functools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_ds.on_ray.gauges import GAUGES
from tests.cluster.cluster_files import CLUSTER, PROJECT
from tests.cluster.ray_processes import BIN, RayProcesses, eventually, free_port

FOLDER = CLUSTER / "dashboards"
DASHBOARDS = ("training.json", "cluster.json")
OWN = re.compile(r"\bray_ds_train_[a-z_]+")
INTERVALS = {"RAY_metrics_report_interval_ms": "1000", "REPORTER_UPDATE_INTERVAL_MS": "1000"}
ELSEWHERE = re.compile(r"ray_serve_|_gpus_|_gram_|unexpected_worker_failure|up\{job=.ray.\} == 0")
"""What this cluster has nothing of: an endpoint, GPUs, failures."""


def program(name: str) -> str:
    """Return where Prometheus or promtool lies."""
    found = shutil.which(name, path=f"{os.environ.get('RAY_DS_PROMETHEUS', '')}:{os.environ['PATH']}")
    assert found is not None, (
        f"{name} (not found) must be on PATH or in the folder that RAY_DS_PROMETHEUS names; "
        "install Debian's package: apt-get install prometheus."
    )
    return found


def panels(name: str) -> list[dict[str, Any]]:
    """Return the panels of a dashboard, rows included."""
    found: list[dict[str, Any]] = json.loads((FOLDER / name).read_text())["panels"]
    return found


def expressions(name: str) -> list[str]:
    """Return the queries of a dashboard, with Grafana's variables filled in."""
    targets = [target["expr"] for panel in panels(name) for target in panel.get("targets", [])]
    return [expression.replace("$run", ".*") for expression in targets]


def rule_expressions() -> list[str]:
    """Return the queries of the alerts."""
    groups = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def test_every_training_metric_has_a_panel() -> None:
    found = {name for expression in expressions("training.json") for name in OWN.findall(expression)}
    assert found == set(GAUGES)
    in_rules = {name for expression in rule_expressions() for name in OWN.findall(expression)}
    assert in_rules <= found


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboards_can_be_imported(name: str) -> None:
    dashboard = json.loads((FOLDER / name).read_text())
    assert {"uid", "title", "schemaVersion", "templating", "panels"} <= dashboard.keys()
    ids = [panel["id"] for panel in panels(name)]
    assert len(set(ids)) == len(ids)
    covered: set[tuple[int, int]] = set()
    for panel in panels(name):
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not covered & cells, f"{panel['title']} lies over another panel"
        covered |= cells
        if panel["type"] != "row":
            assert panel["title"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
            assert panel["datasource"]["uid"] == "${datasource}" and panel["targets"]


def test_promtool_finds_no_fault() -> None:
    config = [program("promtool"), "check", "config", "--syntax-only", str(FOLDER / "prometheus.yml")]
    rules = [program("promtool"), "check", "rules", "--lint=all", "--lint-fatal", str(FOLDER / "rules.yml")]
    for command in (config, rules):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_alerts_fire_when_they_should() -> None:
    command = [program("promtool"), "test", "rules", str(Path(__file__).parent / "rules_test.yml")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    tested = (Path(__file__).parent / "rules_test.yml").read_text()
    for alert in re.findall(r"alert: (\w+)", (FOLDER / "rules.yml").read_text()):
        assert re.search(rf"alertname: {alert}\n +exp_alerts:", tested), f"{alert} is never seen to fire"


def get(url: str, token: str | None = None) -> Any:
    """Return the JSON that an address answers with."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[RayProcesses, str]]:
    """A head that wants a token, and a driver that sets the gauges."""
    with tempfile.TemporaryDirectory(prefix="prom") as folder:
        token = secrets.token_hex(16)
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, **INTERVALS}
        nodes = RayProcesses(Path(folder), environment)
        driver = None
        try:
            nodes.start_head(num_cpus=1)
            driver = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.gauges_driver", nodes.address],
                env={**nodes.environment(), "PYTHONPATH": str(PROJECT)},
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            yield nodes, token
        finally:
            if driver is not None:
                driver.kill()
                driver.wait(10)
            nodes.stop()


@pytest.fixture(scope="module")
def query(cluster: tuple[RayProcesses, str]) -> Iterator[Callable[[str], list[Any]]]:
    """Start Prometheus with our own files, and return what asks it."""
    nodes, token = cluster
    with tempfile.TemporaryDirectory(prefix="prom") as folder:
        config = (FOLDER / "prometheus.yml").read_text()
        assert "localhost:8265" in config
        config = config.replace("localhost:8265", f"127.0.0.1:{nodes.dashboard_port}").replace(": 10s", ": 1s")
        Path(folder, "prometheus.yml").write_text(config)
        Path(folder, "ray_token").write_text(token)
        shutil.copy(FOLDER / "rules.yml", folder)
        address = f"127.0.0.1:{free_port()}"
        command = [
            program("prometheus"),
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
        ]
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)

        def ask(expression: str) -> list[Any]:
            text = urllib.parse.urlencode({"query": expression})
            answer = get(f"http://{address}/api/v1/query?{text}")
            found: list[Any] = answer["data"]["result"]
            return found

        def is_ready() -> bool:
            assert process.poll() is None, Path(folder, "log").read_text()
            try:
                return bool(ask(f'{GAUGES[-1]}{{run="good"}}'))
            except urllib.error.URLError:
                return False

        try:
            eventually("Prometheus has the last gauge", is_ready, timeout_s=120)
            yield ask
        finally:
            process.kill()
            process.wait(10)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("A real Prometheus finds Ray's nodes by token, and every panel on training shows data in it")
def test_queries_on_training_return_data(query: Callable[[str], list[Any]]) -> None:
    for expression in expressions("training.json"):
        assert OWN.search(expression)
        found = eventually(expression, functools.partial(query, expression), timeout_s=30)
        expected = {"good"} if "train_loss{" in expression else {"good", "bad"}  # the loss of the other is NaN
        assert {result["metric"]["run"] for result in found} == expected, expression


@pytest.mark.ray
@pytest.mark.slow
def test_queries_on_the_cluster_parse_and_return_what_there_is(query: Callable[[str], list[Any]]) -> None:
    for expression in expressions("cluster.json"):
        if ELSEWHERE.search(expression):
            query(expression)  # one that does not parse is answered with 400
        else:
            eventually(expression, functools.partial(query, expression), timeout_s=30)


@pytest.mark.ray
@pytest.mark.slow
def test_alerts_see_what_ray_exports(query: Callable[[str], list[Any]]) -> None:
    assert all(isinstance(query(expression), list) for expression in rule_expressions())
    (fired,) = eventually("NaN", lambda: query('ALERTS{alertname="TrainingNotANumber"}'), timeout_s=30)
    assert fired["metric"]["run"] == "bad"
    assert not query('ALERTS{alertname="NodeUnreachable", alertstate="firing"}')


@pytest.mark.ray
@pytest.mark.slow
def test_the_list_of_nodes_wants_the_token(cluster: tuple[RayProcesses, str]) -> None:
    nodes, token = cluster
    url = f"http://127.0.0.1:{nodes.dashboard_port}/api/prometheus/sd"
    eventually("the dashboard lists nodes", lambda: listed(url, token), timeout_s=60)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(url)


def listed(url: str, token: str) -> list[str]:
    """Return the nodes that the dashboard lists, none while it is not up."""
    try:
        return [target for group in get(url, token) for target in group["targets"]]
    except urllib.error.URLError:
        return []


def test_a_missing_prometheus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(BIN))
    monkeypatch.delenv("RAY_DS_PROMETHEUS", raising=False)
    with pytest.raises(AssertionError, match=r"^promtool \(not found\) must be on PATH .*; install Debian's package"):
        program("promtool")
