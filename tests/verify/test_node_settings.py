"""How Ray was started is compared with what the files in cluster/ do."""

from pathlib import Path

from ray_ds.verify.context import ClusterNode
from ray_ds.verify.node_settings import (
    HEALTH_DEFAULTS,
    HEALTH_GOOD,
    cut_off_s,
    dead_s,
    health_settings,
    judge_access,
    judge_health,
    judge_stop,
)

PROJECT = Path(__file__).parent.parent.parent
NODES = (ClusterNode(node_id="a" * 56, address="10.0.0.7"), ClusterNode(node_id="b" * 56, address="127.0.0.1"))


def test_the_clusters_that_the_project_starts_get_no_advice() -> None:
    lines = (PROJECT / "cluster/settings.env").read_text().splitlines()
    environment = dict(line.split("=", 1) for line in lines if line.startswith("RAY_"))
    assert judge_health(health_settings({}, environment)) == []
    assert judge_stop(float(environment["RAY_JOB_STOP_WAIT_TIME_S"])) == []
    assert judge_access(environment["RAY_AUTH_MODE"], NODES) == []


def test_settings_of_the_start_go_before_the_environment_and_that_before_rays_own() -> None:
    environment = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "700"}
    health = health_settings({"health_check_period_ms": 100}, environment)
    assert (health["health_check_period_ms"], health["health_check_timeout_ms"]) == (100, 700)
    assert health["health_check_failure_threshold"] == HEALTH_DEFAULTS["health_check_failure_threshold"]


def test_rays_own_settings_find_a_dead_node_late() -> None:
    assert (dead_s(HEALTH_DEFAULTS), cut_off_s(HEALTH_DEFAULTS)) == (15.0, 65.0)
    (advice,) = judge_health(HEALTH_DEFAULTS)
    assert "a dead node is found after 15 s" in advice and "RAY_health_check_period_ms=500" in advice
    assert judge_health(HEALTH_GOOD) == []


def test_a_short_grace_is_advised_against() -> None:
    assert judge_stop(60) == []
    assert "kills after 3 s" in judge_stop(3)[0] and "RAY_JOB_STOP_WAIT_TIME_S=60" in judge_stop(3)[0]


def test_a_cluster_that_anyone_may_use_is_a_problem() -> None:
    (problem,) = judge_access("disabled", NODES)
    assert "10.0.0.7" in problem.wrong and "127.0.0.1" not in problem.wrong and "RAY_AUTH_MODE=token" in problem.action
    assert judge_access("token", NODES) == [] and judge_access("disabled", NODES[1:]) == []
