"""Ray nodes of a test as processes of its own, `ray start --block` each, ended by their ids."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")
BIN = Path(sys.executable).parent
STORE_BYTES = 80_000_000


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(what: str, check: Callable[[], T], *, timeout_s: float) -> T:
    """Return the first true value of a check, asked again and again.

    Raises:
        AssertionError: there was none in time.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := check()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.25)
    return value


class RayProcesses:
    """A Ray cluster that a test starts node by node.

    Args:
        folder: a short path, for Ray's sockets and logs.
        environment: of all nodes, beside what every node of a test has.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.address = f"127.0.0.2:{free_port()}"
        self.dashboard_port = free_port()
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "AUTOSCALER_METRIC_PORT": str(free_port()),
            **environment,
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def start_head(self, *arguments: str, num_cpus: int, **environment: str) -> subprocess.Popen[bytes]:
        """Start the head, and wait until it listens."""
        port = self.address.rpartition(":")[2]
        head = ["--head", f"--port={port}", f"--dashboard-port={self.dashboard_port}", f"--temp-dir={self.folder}/ray"]
        client = f"--ray-client-server-port={free_port()}"
        process = self._start("head", [*head, client, f"--num-cpus={num_cpus}", *arguments], environment)
        eventually("the GCS listens", lambda: self._listens(int(port), process), timeout_s=60)
        return process

    def start_worker(self, name: str, *arguments: str, num_cpus: int, **environment: str) -> subprocess.Popen[bytes]:
        """Start another node."""
        return self._start(name, [f"--address={self.address}", f"--num-cpus={num_cpus}", *arguments], environment)

    def log(self, name: str) -> str:
        """Return what a node's process printed."""
        return (self.folder / f"{name}.log").read_text()

    def environment(self) -> dict[str, str]:
        """Return the environment of the nodes."""
        return dict(self._environment)

    def _start(self, name: str, arguments: Sequence[str], extra: Mapping[str, str]) -> subprocess.Popen[bytes]:
        fixed = ["--block", "--disable-usage-stats", "--node-ip-address=127.0.0.2", "--dashboard-agent-listen-port=0"]
        sizes = [
            f"--object-store-memory={STORE_BYTES}",
            "--memory=500000000",
            "--min-worker-port=0",
            "--max-worker-port=0",
        ]
        # As in a pod, where a shell sets limits and becomes `ray start`, so that this gets the signals.
        words = ["ray", "start", *fixed, *sizes, *arguments]
        shell = ["bash", "-c", "ulimit -c 0; " + shlex.join(words)]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                shell,
                env={**self._environment, **extra},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _listens(self, port: int, process: subprocess.Popen[bytes]) -> bool:
        assert process.poll() is None, self.log("head")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.2", port)) == 0

    def stop(self) -> None:
        """End every process that was started here, and what those started."""
        doomed = []
        for process in self._processes:
            if process.poll() is None:
                parent = psutil.Process(process.pid)
                doomed += [parent, *parent.children(recursive=True)]
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for one in doomed:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        for process in self._processes:
            process.wait(10)
