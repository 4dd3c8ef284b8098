"""The settings that all flavours share: their names are Ray's, and no flavour says otherwise."""

import importlib
import inspect
import os
import re
import subprocess
import sys

import pytest

from ray_ds.verify.node_settings import HEALTH_GOOD, cut_off_s, dead_s, judge_health
from tests.cluster.cluster_files import CLUSTER, instructions, pod_templates, resources, shared_settings

HEALTH = {name: value for name, value in shared_settings().items() if name.startswith("RAY_health_check_")}


def test_ray_reads_the_health_checks_under_these_names() -> None:
    names = [name.removeprefix("RAY_") for name in HEALTH]
    code = f"import ray; print([getattr(ray._config, name)() for name in {names}])"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **HEALTH}, capture_output=True, text=True, check=True
    )
    assert len(HEALTH) == 4
    assert result.stdout.strip() == str([int(value) for value in HEALTH.values()])


def test_the_local_cluster_and_the_verification_go_by_the_same_health_checks() -> None:
    shared = {name.removeprefix("RAY_"): int(value) for name, value in HEALTH.items()}
    text = (CLUSTER / "local/nodes.sh").read_text()
    local = {name: int(value) for name, value in re.findall(r"RAY_(health_check_\w+):-(\d+)", text)}
    assert shared == local == HEALTH_GOOD
    assert judge_health(shared) == []


def test_a_dead_node_is_found_in_seconds_and_a_stalled_one_is_spared() -> None:
    shared = {name.removeprefix("RAY_"): int(value) for name, value in HEALTH.items()}
    assert (dead_s(shared), cut_off_s(shared)) == (2.0, 14.0)
    patience_s = (shared["health_check_failure_threshold"] - 1) * shared["health_check_timeout_ms"] / 1000
    assert patience_s >= 3 * 3, "a stall of three seconds spoils one question, or two"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("ray.dashboard.modules.job.job_supervisor", "RAY_JOB_STOP_WAIT_TIME_S"),
        ("ray._private.ray_constants", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"),
        ("ray._common.usage.usage_constants", "RAY_USAGE_STATS_ENABLED"),
        ("ray._private.authentication.authentication_token_setup", "RAY_AUTH_MODE"),
    ],
)
def test_ray_reads_the_other_settings_under_these_names(module: str, name: str) -> None:
    assert name in shared_settings()
    assert f'"{name}"' in inspect.getsource(importlib.import_module(module))


def test_the_image_has_them() -> None:
    environment = " ".join(rest for word, rest in instructions() if word == "ENV").split()
    found = dict(pair.split("=", 1) for pair in environment)
    assert shared_settings().items() <= found.items()


@pytest.mark.parametrize("flavour", ["aws", "gcp", "on_premises"])
def test_ray_up_has_them(flavour: str) -> None:
    (config,) = resources(CLUSTER / "ray_up" / f"{flavour}.yaml")
    options = [option.removeprefix("--env=") for option in config["docker"]["run_options"] if "--env=" in option]
    assert dict(option.split("=", 1) for option in options) == shared_settings()


@pytest.mark.parametrize("kind", ["raycluster", "rayjob", "rayservice"])
def test_every_pod_has_them(kind: str) -> None:
    (resource,) = resources(CLUSTER / "kuberay" / f"{kind}.yaml")
    cluster, templates = pod_templates(resource)
    wanted = shared_settings()
    assert cluster["authOptions"] == {"mode": wanted.pop("RAY_AUTH_MODE")}  # with it the operator sets the variable
    for template in templates:
        (container,) = template["spec"]["containers"]
        assert {variable["name"]: variable["value"] for variable in container["env"]} == wanted


def test_a_pod_lives_longer_than_its_node_drains() -> None:
    drain_s = float(shared_settings()["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    for kind in ("raycluster", "rayjob", "rayservice"):
        for template in pod_templates(resources(CLUSTER / "kuberay" / f"{kind}.yaml")[0])[1]:
            assert template["spec"]["terminationGracePeriodSeconds"] >= drain_s + 20
            assert "lifecycle" not in template["spec"]["containers"][0]
