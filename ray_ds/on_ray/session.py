"""Connecting a process to the Ray cluster it is meant for."""

import argparse
import os
import socket
import sys
import time

import ray

from ray_ds.errors import ClusterError

NAMESPACE = "ray_ds"
CONNECT_TIMEOUT_S = 10.0


def connect() -> None:
    """Connect this process to the running cluster; a job finds its own, a shell's is in `RAY_ADDRESS`.

    What workers print stays in Ray's log files, so that a job's log can be read; `RAY_DS_WORKER_LOGS=1` shows it.

    Raises:
        ClusterError: there is none, or it refuses the token.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "auto")
    show_workers = os.environ.get("RAY_DS_WORKER_LOGS") == "1"
    try:
        _check_listening(address)
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=show_workers, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:
        allowed = f"must be a running Ray cluster ({error})"
        raise ClusterError("RAY_ADDRESS", address, allowed, "start one with `make up`") from error


def _check_listening(address: str) -> None:
    """Raise OSError where nothing listens at `host:port`; Ray itself would wait for minutes."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def wait_for_nodes(count: int, timeout_s: float) -> bool:
    """Wait until the cluster has `count` living nodes; tell whether it came to that in time."""
    deadline = time.monotonic() + timeout_s
    connect()
    while True:
        if sum(node["Alive"] for node in ray.nodes()) >= count:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Wait until the cluster of RAY_ADDRESS has its nodes.")
    parser.add_argument("--wait-for-nodes", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, default=60.0)
    options = parser.parse_args()
    sys.exit(0 if wait_for_nodes(options.wait_for_nodes, options.timeout_s) else 1)
