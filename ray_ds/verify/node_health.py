"""The nodes' own state: stale build locks, limits, shared memory, disk space and clocks."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import JsonValue

from ray_ds.verify.context import ClusterNode, Context
from ray_ds.verify.finding import Finding, Problem, judged
from ray_ds.verify.on_nodes import Answers
from ray_ds.verify.versions import ask_probes

NAME = "nodes"
LOCK_AGE_S = 5.0
"""A lock that was made a moment ago may not be open yet."""
LEAST_OPEN_FILES = 4096
GOOD_OPEN_FILES = 65536
"""Ray's own advice."""
LEAST_SHM_BYTES = 1 << 30
"""torch and NCCL share memory between processes there; a container has 64 MB unless told otherwise."""
LEAST_TEMP_BYTES = 2 << 30
GOOD_TEMP_BYTES = 20 << 30
MOST_SKEW_S = 1.0
ASKED_AT_ONCE = 32


def check_nodes(context: Context) -> Finding:
    """Look at each node's limits and clock."""
    facts: dict[ClusterNode, dict[str, Any]] = {}
    skews: dict[ClusterNode, float] = {}
    problems: list[Problem] = []
    with ThreadPoolExecutor(max_workers=min(ASKED_AT_ONCE, max(1, len(context.nodes)))) as pool:
        for node, (answers, sent, received) in zip(context.nodes, pool.map(_ask, context.nodes), strict=True):
            problems += answers.problems("how it is")
            for found in answers.values.values():
                facts[node] = found
                skews[node] = skew_s(found["time"], sent, received)
    by_name = {node.name: found for node, found in facts.items()}
    problems += judge_locks(by_name)
    more, advice = judge_limits(by_name)
    problems += [*more, *judge_clocks({node.name: skew for node, skew in skews.items()})]
    figures: dict[str, JsonValue] = {
        "nodes": len(facts),
        "least_open_files": min((found["open_files"] for found in facts.values()), default=0),
        "least_shm_bytes": min((found["shm_bytes"] for found in facts.values()), default=0),
        "least_temp_free_bytes": min((found["temp_free_bytes"] for found in facts.values()), default=0),
        "largest_clock_skew_s": max((abs(skew) for skew in skews.values()), default=0.0),
        "build_locks": sum(len(found["locks"]) for found in facts.values()),
    }
    return judged(NAME, figures, problems, advice)


def _ask(node: ClusterNode) -> tuple[Answers[dict[str, Any]], float, float]:
    """Return what a node says, and when it was asked and had answered."""
    sent = time.time()
    answers = ask_probes([node])
    return answers, sent, time.time()


def skew_s(told: float, sent: float, received: float) -> float:
    """Return by how much a clock surely differs: what it told must lie between question and answer."""
    return told - sent if told < sent else max(0.0, told - received)


def judge_locks(nodes: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Return the locks that nobody holds any more, on any node: a home folder may be shared."""
    held = {(lock["path"], lock["file"]) for facts in nodes.values() for lock in facts["locks"] if lock["is_held"]}
    stale: dict[tuple[str, str], str] = {}
    for name, facts in nodes.items():
        for lock in facts["locks"]:
            key = (lock["path"], lock["file"])
            if key not in held and lock["age_s"] > LOCK_AGE_S:
                stale.setdefault(key, name)
    return [
        Problem(
            wrong=f"the build lock {path} on node {name} has no owner: it hangs every later worker that builds there",
            action=f"delete {path}",
        )
        for (path, _), name in stale.items()
    ]


def judge_limits(nodes: Mapping[str, Mapping[str, Any]]) -> tuple[list[Problem], list[str]]:
    """Return limits and space that are too small, and those that are scarce."""
    problems: list[Problem] = []
    advice: list[str] = []
    for name, facts in nodes.items():
        files, shm, free = facts["open_files"], facts["shm_bytes"], facts["temp_free_bytes"]
        if files < LEAST_OPEN_FILES:
            wrong = f"processes on node {name} may open {files} files, fewer than {LEAST_OPEN_FILES}"
            problems.append(Problem(wrong=wrong, action=f"start Ray there under `ulimit -n {GOOD_OPEN_FILES}`"))
        elif files < GOOD_OPEN_FILES:
            advice.append(f"node {name} may open {files} files; `ulimit -n {GOOD_OPEN_FILES}` before `ray start`")
        if shm < LEAST_SHM_BYTES:
            wrong = f"/dev/shm on node {name} holds {shm / 2**20:.0f} MiB, less than {LEAST_SHM_BYTES >> 20}"
            action = "start the container with --shm-size, or give the pod an emptyDir of medium Memory at /dev/shm"
            problems.append(Problem(wrong=wrong, action=action))
        if free < LEAST_TEMP_BYTES:
            wrong = (
                f"{facts['temp']} on node {name} has {free / 2**30:.1f} GiB left, less than {LEAST_TEMP_BYTES >> 30}"
            )
            problems.append(Problem(wrong=wrong, action="make room, or set TMPDIR and Ray's --temp-dir elsewhere"))
        elif free < GOOD_TEMP_BYTES:
            advice.append(f"{facts['temp']} on node {name} has {free / 2**30:.1f} GiB left; caches of shards lie there")
    return problems, _same_once(advice)


def _same_once(advice: Sequence[str], most: int = 8) -> list[str]:
    """Return advice, cut short where a large cluster says the same of each node."""
    rest = len(advice) - most
    return [*advice[:most], *([f"and {rest} more of the kind"] if rest > 0 else [])]


def judge_clocks(skews: Mapping[str, float]) -> list[Problem]:
    """Return the clocks that are off."""
    return [
        Problem(
            wrong=f"the clock of node {name} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'} of the driver's",
            action="run chrony or ntpd there; credentials of object stores and times in logs depend on it",
        )
        for name, skew in skews.items()
        if abs(skew) > MOST_SKEW_S
    ]
