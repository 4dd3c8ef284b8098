"""A process of a process group over the cluster: it reaches its peers by TCP, then adds up numbers with them."""

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist

CONNECT_TIMEOUT_S = 5.0
GROUP_TIMEOUT_S = 45.0
SIZES_BYTES = (1 << 12, 1 << 22, 1 << 25)
"""Messages that are added up; the last one shows the bandwidth."""
REPEATS = 3
GREETING = b"ray_ds verify"


class GroupMember:
    """One process. As an actor it ends with the job, or by `ray.kill`."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._listeners: list[socket.socket] = []

    def listen(self, count: int) -> tuple[str, list[int]]:
        """Listen on ports that the system chooses, at the address that Ray knows; return both."""
        address = ray.util.get_node_ip_address()
        for _ in range(count):
            listener = socket.create_server((address, 0), family=_family(address))
            self._listeners.append(listener)
            threading.Thread(target=_greet, args=(listener,), daemon=True).start()
        return address, [listener.getsockname()[1] for listener in self._listeners]

    def reach(self, peers: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, dict[str, Any]]:
        """Return for each peer the time until it greeted, or why it could not be reached."""
        answers: dict[str, dict[str, Any]] = {}

        def ask(name: str, address: str, ports: Sequence[int]) -> None:
            answers[name] = _reach(address, ports)

        threads = [threading.Thread(target=ask, args=(name, *place), daemon=True) for name, place in peers.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def free_port(self) -> tuple[str, int]:
        """Return an address of this process at which a group can meet."""
        for listener in self._listeners:
            listener.close()
        address = ray.util.get_node_ip_address()
        with socket.create_server((address, 0), family=_family(address)) as listener:
            return address, int(listener.getsockname()[1])

    def join(self, address: str, port: int, rank: int, world_size: int) -> None:
        """Form the group."""
        host = f"[{address}]" if ":" in address else address
        if self._backend == "nccl":
            torch.cuda.set_device(0)  # Ray shows this process its own GPU alone
        dist.init_process_group(
            self._backend,
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )

    def add_up(self) -> dict[str, Any]:
        """Add up known numbers over the group; return what came out and how fast."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        device = torch.device("cuda", 0) if self._backend == "nccl" else torch.device("cpu")
        sums: list[list[float]] = []
        seconds = float("inf")
        for size in SIZES_BYTES:
            for _ in range(REPEATS):
                values = torch.arange(size // 4, dtype=torch.float32, device=device).remainder_(1024) + rank
                _wait(device)
                started = time.monotonic()
                dist.all_reduce(values)
                _wait(device)
                took_s = time.monotonic() - started
                seconds = took_s if size != SIZES_BYTES[-1] else min(seconds, took_s)
            wanted = torch.arange(size // 4, dtype=torch.float32, device=device).remainder_(1024) * world_size
            wrong = values != wanted + world_size * (world_size - 1) / 2
            sums.append([size, float(wrong.sum())])
        moved = 2 * (world_size - 1) / world_size * SIZES_BYTES[-1]
        return {"wrong_elements": sums, "bus_mb_s": moved / 1e6 / seconds, "seconds": seconds}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _greet(listener: socket.socket) -> None:
    """Greet whoever connects, until the listener is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.sendall(GREETING)


def _reach(address: str, ports: Sequence[int]) -> dict[str, Any]:
    """Connect to each port; return the longest time until the greeting, or the first error."""
    longest = 0.0
    for port in ports:
        started = time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S) as connection:
                connection.settimeout(CONNECT_TIMEOUT_S)
                greeting = connection.recv(len(GREETING))
        except OSError as error:
            return {"seconds": None, "error": f"port {port}: {error}"}
        if greeting != GREETING:
            return {"seconds": None, "error": f"port {port}: another program answers"}
        longest = max(longest, time.monotonic() - started)
    return {"seconds": longest, "error": None}
