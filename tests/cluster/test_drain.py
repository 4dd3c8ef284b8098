"""A node that is to go says so in time: on SIGTERM, as a deleted pod gets it, and on its cloud's notice."""

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import pytest
import ray

from tests.cluster.cluster_files import CLUSTER, shared_settings
from tests.cluster.ray_processes import RayProcesses, eventually

SCRIPT = CLUSTER / "image" / "ray-ds-drain-on-notice"
SETTINGS = {**shared_settings(), "RAY_AUTH_MODE": "disabled"}
DRAIN_S = float(SETTINGS["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])


class Metadata(BaseHTTPRequestHandler):
    """What the metadata servers of Amazon and Google answer; `server.notice` is the end of the machine, or None."""

    def do_PUT(self) -> None:
        self._answer(200 if self.path == "/latest/api/token" else 404, "session-token")

    def do_GET(self) -> None:
        notice = self.server.notice  # type: ignore[attr-defined]
        if self.path == "/latest/meta-data/spot/instance-action":
            allowed = self.headers["X-aws-ec2-metadata-token"] == "session-token"
            status = 401 if not allowed else 404 if notice is None else 200
            self._answer(status, json.dumps({"action": "terminate", "time": notice}))
        elif self.path == "/computeMetadata/v1/instance/preempted":
            status = 200 if self.headers["Metadata-Flavor"] == "Google" else 403
            self._answer(status, "FALSE" if notice is None else "TRUE")
        else:
            self._answer(404, "")

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def metadata() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.notice = None  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def give_notice(server: ThreadingHTTPServer, seconds: float) -> None:
    """Announce the end of the machine."""
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    server.notice = end.strftime("%Y-%m-%dT%H:%M:%SZ")  # type: ignore[attr-defined]


def watch(server: ThreadingHTTPServer, environment: dict[str, str], *arguments: str) -> "subprocess.Popen[str]":
    """Start the watcher."""
    address = f"http://127.0.0.1:{server.server_address[1]}"
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(
        command, env={**environment, "RAY_DS_METADATA_URL": address}, text=True, stdout=subprocess.PIPE
    )


@pytest.mark.parametrize(("cloud", "low", "high"), [("aws", 100, 120), ("gcp", 30, 30)])
def test_the_clouds_notices_are_read(
    cloud: str, low: int, high: int, metadata: ThreadingHTTPServer, tmp_path: Path
) -> None:
    (tmp_path / "ray").write_text(f'#!/bin/sh\necho "$@" >"{tmp_path}/called"\n')
    (tmp_path / "ray").chmod(0o755)
    watcher = watch(metadata, {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, cloud)
    time.sleep(0.7)
    assert watcher.poll() is None and not (tmp_path / "called").exists()
    give_notice(metadata, 119)
    assert watcher.wait(10) == 0
    words = (tmp_path / "called").read_text().split()
    assert words[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"] and "--node-id" not in words
    assert low <= int(words[-1]) <= high


def test_an_unknown_cloud_is_refused() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), "azure"], capture_output=True, text=True)
    assert result.returncode == 2 and "must be aws or gcp, and a node's id or none" in result.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayProcesses]:
    with tempfile.TemporaryDirectory(prefix="drain") as folder:
        nodes = RayProcesses(Path(folder), SETTINGS)
        try:
            nodes.start_head("--include-dashboard=false", num_cpus=0)
            ray.init(nodes.address, log_to_driver=False)
            yield nodes
        finally:
            ray.shutdown()
            nodes.stop()


@ray.remote(num_cpus=1, max_retries=0)
def work(started: str, seconds: float) -> str:
    """Return the node this ran on, after a while; a file tells that it has begun."""
    Path(started).touch()
    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id()


def node_with(resource: str) -> str | None:
    """Return the living node that has a resource."""
    return next((node["NodeID"] for node in ray.nodes() if node["Alive"] and resource in node["Resources"]), None)


def draining() -> dict[str, int]:
    """Return the nodes that drain, and when each ends, in ms since 1970."""
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("A pod or node that gets SIGTERM drains: its work ends first, no new work comes, then it leaves")
def test_sigterm_drains_the_node_and_spares_its_work(cluster: RayProcesses, tmp_path: Path) -> None:
    process = cluster.start_worker("pod", '--resources={"pod": 1}', num_cpus=1)
    node_id = eventually("the node joins", lambda: node_with("pod"), timeout_s=120)
    result = work.options(resources={"pod": 0.1}).remote(str(tmp_path / "started"), 5.0)
    eventually("the work runs", (tmp_path / "started").exists, timeout_s=120)
    os.kill(process.pid, signal.SIGTERM)
    deadline_ms = eventually("it drains", draining, timeout_s=10)[node_id]
    assert abs(deadline_ms / 1000 - time.time() - DRAIN_S) < 6
    assert ray.get(result, timeout=30) == node_id
    left = time.monotonic()
    process.wait(30)
    assert time.monotonic() - left < 30 < DRAIN_S  # it leaves once it is idle, long before the deadline


@pytest.mark.ray
@pytest.mark.slow
def test_a_cloud_s_notice_drains_this_node_and_no_other(
    cluster: RayProcesses, metadata: ThreadingHTTPServer, tmp_path: Path
) -> None:
    process = cluster.start_worker("spot", '--resources={"spot": 1}', num_cpus=1)
    node_id = eventually("the node joins", lambda: node_with("spot"), timeout_s=120)
    held = work.options(resources={"spot": 0.1}).remote(str(tmp_path / "started"), 600.0)
    eventually("the work runs", (tmp_path / "started").exists, timeout_s=120)
    give_notice(metadata, 120)
    watcher = watch(metadata, {**cluster.environment(), "RAY_ADDRESS": cluster.address}, "aws", node_id)
    assert watcher.wait(60) == 0
    assert set(eventually("it drains", draining, timeout_s=10)) == {node_id}
    assert process.poll() is None  # nobody ends it: the work has the time that the cloud gives
    ray.cancel(held, force=True)
