"""How Ray was started: how soon it finds a dead node, what time a stopped job has, who may use it, who adds nodes."""

import ipaddress
import os
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.state import state as ray_state

from ray_ds.on_ray.autoscaler import autoscaler_status, find_autoscaler
from ray_ds.verify.context import ClusterNode, Context
from ray_ds.verify.finding import Finding, Problem, judged
from ray_ds.verify.on_nodes import ask_nodes

NAME = "settings"
HEALTH_DEFAULTS = {
    "health_check_initial_delay_ms": 5000,
    "health_check_period_ms": 3000,
    "health_check_timeout_ms": 10000,
    "health_check_failure_threshold": 5,
}
"""Ray 2.60's own (ray_config_def.h)."""
HEALTH_GOOD = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 4,
}
"""What the files in cluster/ set."""
MOST_DEAD_S = 5.0
"""Longest until the head knows that a node's processes are gone; a run waits for it before it goes on."""
MOST_CUT_OFF_S = 30.0
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_DEFAULT_S = 3
STOP_WAIT_GOOD_S = 60


def check_settings(context: Context) -> Finding:
    """Compare how Ray was started with what the files in cluster/ do."""
    head = [node for node in context.nodes if node.is_head] or context.nodes[:1]
    answers = ask_nodes(head, read_environment)
    environment = next(iter(answers.values.values()), {})
    health = health_settings(ray_state.get_system_config(), environment)
    stop_wait_s = float(os.environ.get(STOP_WAIT, STOP_WAIT_DEFAULT_S))
    mode = "token" if is_token_auth_enabled() else "disabled"
    autoscaler = find_autoscaler(autoscaler_status())
    figures: dict[str, JsonValue] = {
        "dead_node_found_s": dead_s(health),
        "cut_off_node_found_s": cut_off_s(health),
        "job_stop_wait_s": stop_wait_s,
        "authentication": mode,
        "node_autoscaler": autoscaler,
        "health": dict(health),
    }
    problems = [*answers.problems("how Ray was started"), *judge_access(mode, context.nodes)]
    advice = [*judge_health(health), *judge_stop(stop_wait_s)]
    if autoscaler == "none":
        advice.append("no node autoscaler: nodes join only when you start them; elastic training takes those that join")
    return judged(NAME, figures, problems, advice)


def read_environment() -> dict[str, str]:
    """Return Ray's variables as this node's processes have them."""
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_health_check_")}


def health_settings(system_config: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, int]:
    """Return the head's health checks: given at its start, in its environment, or Ray's own."""
    return {
        name: int(system_config.get(name, environment.get(f"RAY_{name}", default)))
        for name, default in HEALTH_DEFAULTS.items()
    }


def dead_s(health: Mapping[str, int]) -> float:
    """Return the seconds until a node whose processes are gone counts as dead: it refuses each question at once."""
    return health["health_check_period_ms"] * health["health_check_failure_threshold"] / 1000


def cut_off_s(health: Mapping[str, int]) -> float:
    """Return the same for a node that answers no more: each question runs out."""
    each_ms = health["health_check_period_ms"] + health["health_check_timeout_ms"]
    return each_ms * health["health_check_failure_threshold"] / 1000


def judge_health(health: Mapping[str, int]) -> list[str]:
    """Return advice where a dead node is found late."""
    if dead_s(health) <= MOST_DEAD_S and cut_off_s(health) <= MOST_CUT_OFF_S:
        return []
    wanted = " ".join(f"RAY_{name}={value}" for name, value in HEALTH_GOOD.items())
    found = f"a dead node is found after {dead_s(health):g} s, one that is cut off after {cut_off_s(health):g} s"
    return [f"{found}; start the head with {wanted}"]


def judge_stop(stop_wait_s: float) -> list[str]:
    """Return advice where a stopped job has no time for a checkpoint."""
    if stop_wait_s >= STOP_WAIT_GOOD_S:
        return []
    return [f"`ray job stop` kills after {stop_wait_s:g} s, short for a checkpoint; start Ray with {STOP_WAIT}=60"]


def judge_access(mode: str, nodes: tuple[ClusterNode, ...]) -> list[Problem]:
    """Return the problem of a cluster that anyone may use who reaches it."""
    open_to_network = [node.address for node in nodes if not is_loopback(node.address)]
    if mode != "disabled" or not open_to_network:
        return []
    wrong = f"anyone who reaches {', '.join(open_to_network[:4])} may run programs there: Ray asks for no token"
    action = "start all nodes with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, or keep the network closed around them"
    return [Problem(wrong=wrong, action=action)]


def is_loopback(address: str) -> bool:
    """Tell whether an address can be reached from its own host alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
