"""Collectives: each node reaches each other one, and a process group over all of them adds up right."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray
from pydantic import JsonValue
from ray.exceptions import RayError

from ray_ds.verify.context import ClusterNode, Context
from ray_ds.verify.finding import Finding, Problem, judged
from ray_ds.verify.group_member import GROUP_TIMEOUT_S, GroupMember
from ray_ds.verify.on_nodes import headline, place_on

NAME = "collectives"
PORTS = 3
"""Ports that each node listens on; a firewall may let some through."""
START_TIMEOUT_S = 60.0
GOOD_MB_S = {"gloo": 50.0, "nccl": 1000.0}
"""Below it a step's gradients take longer than they should; 1 Gbit/s is 125 MB/s."""
Pairs = Mapping[str, Mapping[str, Mapping[str, Any]]]


def check_collectives(context: Context) -> Finding:
    """Try gloo over all nodes, and NCCL over all GPUs where there are any."""
    nodes = [node for node in context.nodes if node.cpus or node.gpus] or list(context.nodes)
    problems, figures, advice = _try_group(context, nodes, "gloo", num_gpus=0)
    if context.gpus:
        ranks = [node for node in nodes for _ in range(int(node.gpus))][: context.gpus]
        more, nccl, slow = _try_group(context, ranks, "nccl", num_gpus=1)
        problems, figures, advice = [*problems, *more], {**figures, **nccl}, [*advice, *slow]
    return judged(NAME, figures, problems, advice)


def _try_group(
    context: Context, ranks: Sequence[ClusterNode], backend: str, *, num_gpus: int
) -> tuple[list[Problem], dict[str, JsonValue], list[str]]:
    """Start a process a rank, let them reach each other and add up; return problems, figures and advice."""
    actor = ray.remote(num_cpus=0, num_gpus=num_gpus, max_restarts=0)(GroupMember)
    members = [actor.options(scheduling_strategy=place_on(node)).remote(backend) for node in ranks]
    for member in members:
        context.clean_up.add(partial(ray.kill, member))
    names = [f"{node.name} rank {rank}" if num_gpus else node.name for rank, node in enumerate(ranks)]
    try:
        places = ray.get([member.listen.remote(PORTS) for member in members], timeout=START_TIMEOUT_S)
    except RayError as error:
        action = "free the GPUs, or see what keeps actors from starting there" if num_gpus else "see `ray status`"
        wrong = f"a process on each of {', '.join(names)} did not start: {headline(error)}"
        return [Problem(wrong=wrong, action=action)], {}, []
    peers = dict(zip(names, places, strict=True))
    reached = ray.get([member.reach.remote(peers) for member in members], timeout=START_TIMEOUT_S)
    pairs = dict(zip(names, reached, strict=True))
    problems = judge_pairs(pairs)
    if problems:
        return problems, {f"{backend}_pairs": len(names) ** 2}, []
    slowest = max(answer["seconds"] for answers in pairs.values() for answer in answers.values())
    figures: dict[str, JsonValue] = {f"{backend}_ranks": len(members), "slowest_connect_s": slowest}
    return _add_up(members, ranks, backend, figures)


def _add_up(
    members: Sequence[Any], ranks: Sequence[ClusterNode], backend: str, figures: dict[str, JsonValue]
) -> tuple[list[Problem], dict[str, JsonValue], list[str]]:
    """Form the group and add up; return problems, figures and advice."""
    address, port = ray.get(members[0].free_port.remote(), timeout=START_TIMEOUT_S)
    joins = [member.join.remote(address, port, rank, len(members)) for rank, member in enumerate(members)]
    try:
        ray.get(joins, timeout=GROUP_TIMEOUT_S + 15)
        answers = ray.get([member.add_up.remote() for member in members], timeout=GROUP_TIMEOUT_S + 15)
    except RayError as error:
        return [no_group(backend, headline(error))], figures, []
    names = [f"{node.name} rank {rank}" for rank, node in enumerate(ranks)]
    results = dict(zip(names, answers, strict=True))
    speed = min((facts["bus_mb_s"] for facts in results.values()), default=0.0)
    advice = []
    if len(members) > 1:
        figures = {**figures, f"{backend}_bus_mb_s": speed}
        if speed < GOOD_MB_S[backend]:
            advice.append(f"{backend} moves {speed:.0f} MB/s; see which network interface it takes (NCCL_DEBUG=INFO)")
    return judge_sums(backend, results), figures, advice


def judge_pairs(pairs: Pairs) -> list[Problem]:
    """Return the pairs that do not reach each other."""
    problems = []
    for source, answers in pairs.items():
        for target, answer in answers.items():
            if answer["error"] is not None:
                wrong = f"{source} does not reach {target}: {answer['error']}"
                action = (
                    "open all TCP ports between the nodes (firewall, security group, network policy), at least those of"
                    " /proc/sys/net/ipv4/ip_local_port_range"
                )
                problems.append(Problem(wrong=wrong, action=action))
    return problems


def judge_sums(backend: str, ranks: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Return the ranks whose sums are wrong."""
    problems = []
    for name, facts in ranks.items():
        wrong = [f"{count:.0f} elements of {size / 4:.0f}" for size, count in facts["wrong_elements"] if count]
        if wrong:
            text = f"{backend} added up wrong on {name}: {', '.join(wrong)}"
            problems.append(Problem(wrong=text, action="take the node out; test its memory, GPU and network card"))
    return problems


def no_group(backend: str, reason: str) -> Problem:
    """Return the problem that no group came about though the nodes reach each other."""
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    action = (
        f"set {variable} on every node to the interface of its address (such as eth0) before `ray start`;"
        " see that its host name resolves to that address"
    )
    return Problem(wrong=f"no {backend} group over nodes that reach each other by TCP: {reason}", action=action)
