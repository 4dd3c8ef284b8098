"""The files for `ray up` against Ray's own schema, prepared as `ray up` prepares them, without a cloud."""

import re
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.cluster_files import CLUSTER, resources

FLAVOURS = ["aws", "gcp", "on_premises"]
CLOUDS = ["aws", "gcp"]


def load(flavour: str) -> dict[str, Any]:
    """Return a flavour's file."""
    (config,) = resources(CLUSTER / "ray_up" / f"{flavour}.yaml")
    return config


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_files_fit_ray_s_schema(flavour: str) -> None:
    prepared = prepare_config(load(flavour))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("idle_timeout", 5, "'idle_timeout' was unexpected"),
        ("upscaling_speed", "fast", "'fast' is not of type 'number'"),
        ("docker", {"container_name": "a", "image": "b", "run_option": []}, "'run_option' was unexpected"),
        ("max_workers", 0, "max_workers` is smaller than the sum"),
        ("head_node_type", "haed", "must be one of `available_node_types`"),
    ],
)
def test_a_mistake_is_found(key: str, value: object, complaint: str) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError), match=complaint):
        validate_config(prepare_config({**load("aws"), key: value}))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_nothing_is_installed_from_elsewhere(flavour: str) -> None:
    prepared = prepare_config(load(flavour))
    assert prepared["setup_commands"] == []  # Ray's own default would install a nightly build
    for command in prepared["head_setup_commands"] + prepared["worker_setup_commands"]:
        assert re.fullmatch(r"pip install --user --quiet [a-z0-9-]+==[0-9.]+", command)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_head_scales_the_cluster_and_all_know_the_token(flavour: str) -> None:
    prepared = prepare_config(load(flavour))
    (head,) = [command for command in prepared["head_start_ray_commands"] if "--head" in command]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head and "--dashboard-host=127.0.0.1" in head
    assert any("--address=$RAY_HEAD_IP:6379" in command for command in prepared["worker_start_ray_commands"])
    assert prepared["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


@pytest.mark.parametrize("flavour", CLOUDS)
def test_workers_are_spot_and_drain_when_the_cloud_says_so(flavour: str) -> None:
    config = load(flavour)
    types = config["available_node_types"]
    assert set(types) == {"head", "cpu", "gpu"} and types["head"]["max_workers"] == 0
    assert "spot" not in str(types["head"]).lower()
    for name in ("cpu", "gpu"):
        assert "spot" in str(types[name]["node_config"]).lower()
        assert types[name]["min_workers"] < types[name]["max_workers"]
    assert "GPU" in types["gpu"]["resources"] and types["gpu"]["docker"]["worker_image"].endswith("-cuda")
    assert any(f"ray-ds-drain-on-notice {flavour} " in command for command in config["worker_start_ray_commands"])


@pytest.mark.parametrize("flavour", CLOUDS)
def test_nodes_reach_the_bucket_by_a_role_not_by_keys(flavour: str) -> None:
    for node in load(flavour)["available_node_types"].values():
        assert "IamInstanceProfile" in node["node_config"] or "serviceAccounts" in node["node_config"]
    text = (CLUSTER / "ray_up" / f"{flavour}.yaml").read_text()
    assert "AWS_SECRET_ACCESS_KEY" not in text and "private_key" not in text
