"""The run directory: every node writes there, reads at once what another wrote, and is fast enough."""

import hashlib
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from ray_ds import storage
from ray_ds.verify.context import ClusterNode, Context
from ray_ds.verify.finding import Finding, Problem, judged
from ray_ds.verify.on_nodes import ask_nodes

NAME = "storage"
FILE_BYTES = 16 << 20
NOTE_TRIES = 5
"""Small files that are written and read to measure latency."""
SEEN_WITHIN_S = 20.0
"""Longest that a node waits to see what another wrote."""
GOOD_LAG_S = 1.0
LEAST_FREE_BYTES = 1 << 30
GOOD_MB_S = 20.0
POLL_S = 0.05
SHARED = "use a folder that every node mounts, or an object store (s3://, gs://)"


def check_storage(context: Context) -> Finding:
    """Write on each node, read on another, and replace a file under the eyes of all."""
    folder = context.work(NAME)
    written = ask_nodes(context.nodes, write_from_here, lambda node: (folder, node.node_id))
    problems = written.problems("that it can write in the run directory")
    problems += judge_writes({node.name: facts for node, facts in written.values.items()}, context.run_dir)
    writers = [node for node, facts in written.values.items() if facts["error"] is None]
    if not writers:
        return judged(NAME, {"nodes": len(context.nodes)}, problems)
    sha256 = {node.node_id: written.values[node]["sha256"] for node in writers}
    others = _neighbours(context.nodes, writers)
    read = ask_nodes(
        context.nodes, read_from_here, lambda node: (folder, others[node], sha256[others[node]], sorted(sha256))
    )
    problems += read.problems("what it reads in the run directory")
    problems += judge_reads({node.name: facts for node, facts in read.values.items()}, context.run_dir)
    replaced = _replace(context, folder)
    problems += judge_replaced(replaced, context.run_dir)
    lags = [facts["lag_s"] for facts in read.values.values() if facts["lag_s"] is not None]
    lags += [lag for lag in replaced.values() if lag is not None]
    figures: dict[str, JsonValue] = {
        "nodes": len(context.nodes),
        "slowest_write_mb_s": min((written.values[node]["mb_s"] for node in writers), default=0.0),
        "slowest_read_mb_s": min((facts["mb_s"] for facts in read.values.values() if facts["mb_s"]), default=0.0),
        "slowest_small_file_s": max((written.values[node]["small_s"] for node in writers), default=0.0),
        "longest_lag_s": max(lags, default=0.0),
        "free_bytes": min((written.values[node]["free_bytes"] or 0 for node in writers), default=0) or None,
        "by_node": {node.name: _speeds(written.values[node]) for node in writers},
    }
    return judged(NAME, figures, problems, judge_speed(figures))


def _speeds(facts: Mapping[str, Any]) -> dict[str, JsonValue]:
    return {name: facts[name] for name in ("mb_s", "small_s")}


def _neighbours(nodes: Sequence[ClusterNode], writers: Sequence[ClusterNode]) -> dict[ClusterNode, str]:
    """Return whose file each node reads: that of another node, where there is one."""
    ids = [node.node_id for node in writers]
    return {
        node: next((one for one in ids[i:] + ids[:i] if one != node.node_id), ids[0]) for i, node in enumerate(nodes)
    }


def write_from_here(folder: str, name: str) -> dict[str, Any]:
    """Write a large file and a few small ones; return how that went."""
    data = os.urandom(FILE_BYTES)
    try:
        started = time.monotonic()
        storage.write_bytes(storage.join(folder, f"{name}.bin"), data)
        large_s = time.monotonic() - started
        small = []
        for number in range(NOTE_TRIES):
            started = time.monotonic()
            uri = storage.join(folder, "small", f"{name}-{number}.txt")
            storage.write_bytes(uri, b"small")
            storage.read_bytes(uri)
            small.append(time.monotonic() - started)
        free = _free_bytes(folder)
    except OSError as error:
        return {"error": " ".join(str(error).split())[:300]}
    return {
        "error": None,
        "sha256": hashlib.sha256(data).hexdigest(),
        "mb_s": FILE_BYTES / 1e6 / large_s,
        "small_s": statistics.median(small),
        "free_bytes": free,
    }


def _free_bytes(folder: str) -> int | None:
    """Return the space that is left for a local folder; None on an object store."""
    if storage.is_remote(folder):
        return None
    stat = os.statvfs(storage.local_path(folder))
    return stat.f_bavail * stat.f_frsize


def read_from_here(folder: str, name: str, sha256: str, names: Sequence[str]) -> dict[str, Any]:
    """Read another node's file and wait for all files to be listed; return how that went."""
    started = time.monotonic()
    try:
        data = storage.read_bytes(storage.join(folder, f"{name}.bin"))
    except OSError as error:
        return {"error": " ".join(str(error).split())[:300], "of": name, "mb_s": None, "lag_s": None, "is_same": False}
    seconds = time.monotonic() - started
    wanted = {f"{one}.bin" for one in names}
    started = time.monotonic()
    lag_s: float | None = 0.0
    while not wanted <= {entry.path for entry in storage.list_files(folder)}:
        lag_s = time.monotonic() - started
        if lag_s > SEEN_WITHIN_S:
            lag_s = None
            break
        time.sleep(POLL_S)
    is_same = hashlib.sha256(data).hexdigest() == sha256
    return {"error": None, "of": name, "mb_s": len(data) / 1e6 / seconds, "lag_s": lag_s, "is_same": is_same}


def _replace(context: Context, folder: str) -> dict[str, float | None]:
    """Replace a file that every node has read; return how long each of them saw the old one, None for too long."""
    uri = storage.join(folder, "replaced.txt")
    storage.write_bytes(uri, b"old")
    ask_nodes(context.nodes, storage.read_bytes, lambda node: (uri,))
    storage.write_bytes(uri, b"new")
    answers = ask_nodes(context.nodes, wait_for_content, lambda node: (uri, b"new"))
    return {node.name: lag for node, lag in answers.values.items()}


def wait_for_content(uri: str, wanted: bytes) -> float | None:
    """Return how long a file kept another content; None for longer than is sensible."""
    started = time.monotonic()
    while True:
        lag_s = time.monotonic() - started
        try:
            if storage.read_bytes(uri) == wanted:
                return lag_s
        except OSError:  # NFS may say so while a file is replaced
            pass
        if lag_s > SEEN_WITHIN_S:
            return None
        time.sleep(POLL_S)


def judge_writes(nodes: Mapping[str, Mapping[str, Any]], run_dir: str) -> list[Problem]:
    """Return the nodes that cannot write, and those without space."""
    problems = []
    for name, facts in nodes.items():
        if facts["error"] is not None:
            wrong = f"node {name} cannot write in run_dir ({run_dir}): {facts['error']}"
            remote = "give that node credentials and the way to the store (environment or instance role)"
            action = remote if storage.is_remote(run_dir) else f"mount it writable there for Ray's user; or {SHARED}"
            problems.append(Problem(wrong=wrong, action=action))
        elif facts["free_bytes"] is not None and facts["free_bytes"] < LEAST_FREE_BYTES:
            wrong = f"run_dir ({run_dir}) has {facts['free_bytes'] / 2**20:.0f} MiB left as node {name} sees it"
            problems.append(Problem(wrong=wrong, action="make room there, or choose another run_dir"))
    return problems


def judge_reads(nodes: Mapping[str, Mapping[str, Any]], run_dir: str) -> list[Problem]:
    """Return the nodes that do not see what others wrote."""
    problems = []
    for name, facts in nodes.items():
        if facts["error"] is not None:
            wrong = (
                f"node {name} does not see in run_dir ({run_dir}) what node {facts['of'][:8]} wrote: {facts['error']}"
            )
            problems.append(Problem(wrong=wrong, action=SHARED))
        elif not facts["is_same"]:
            wrong = f"node {name} read other bytes than node {facts['of'][:8]} wrote"
            problems.append(Problem(wrong=wrong, action="do not train there: see the storage's own checks and logs"))
        elif facts["lag_s"] is None:
            wrong = f"node {name} does not list, after {SEEN_WITHIN_S:g} s, what others wrote in run_dir ({run_dir})"
            problems.append(Problem(wrong=wrong, action="mount with a shorter attribute cache (NFS: actimeo=1)"))
    return problems


def judge_replaced(lags: Mapping[str, float | None], run_dir: str) -> list[Problem]:
    """Return the nodes that go on seeing a file that was replaced."""
    return [
        Problem(
            wrong=f"node {name} still reads the old content of a file replaced {SEEN_WITHIN_S:g} s ago in {run_dir}",
            action="mount with a shorter attribute cache (NFS: actimeo=1), or use an object store",
        )
        for name, lag in lags.items()
        if lag is None
    ]


def judge_speed(figures: Mapping[str, Any]) -> list[str]:
    """Return what is slow enough to be felt."""
    advice = []
    for kind in ("write", "read"):
        speed = figures[f"slowest_{kind}_mb_s"]
        if speed < GOOD_MB_S:
            advice.append(f"a node {kind}s {speed:.1f} MB/s; checkpoints take bytes / speed, so expect long ones")
    if figures["longest_lag_s"] > GOOD_LAG_S:
        advice.append(f"a node saw another's file {figures['longest_lag_s']:.1f} s late; NFS: mount with actimeo=1")
    return advice
