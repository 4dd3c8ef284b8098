"""What differs between nodes is named with the node, what it has and what it should have."""

import copy
from typing import Any

import pytest

from ray_ds.verify.node_probe import describe_package, package_version, probe_node
from ray_ds.verify.versions import judge_arch_lists, judge_gpus, judge_ops, judge_versions

GPU = {"driver": "570.1", "kind": "H200", "torch_cuda": "12.8", "reaches_gpu": True, "nccl": True}


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return probe_node()


def test_nodes_with_the_same_packages_are_right(here: dict[str, Any]) -> None:
    assert here["packages"]["ray"] == package_version("ray") != "missing"
    assert judge_versions(here, {"a": here, "b": copy.deepcopy(here)}) == []


@pytest.mark.parametrize("package", ["ray", "torch", "deepspeed", "pyarrow"])
def test_another_version_on_one_node_is_named(here: dict[str, Any], package: str) -> None:
    other = copy.deepcopy(here)
    other["packages"][package] = "0.0.1"
    (problem,) = judge_versions(here, {"a": here, "b": other})
    wanted = here["packages"][package]
    assert problem.wrong == f"{package} on node b is 0.0.1, and {wanted} where the job's driver runs"
    assert problem.action == f"install {package} {wanted} on every node, or one image"


def test_another_python_is_named(here: dict[str, Any]) -> None:
    (problem,) = judge_versions(here, {"b": {**here, "python": "3.9.1"}})
    assert problem.wrong.startswith("python on node b is 3.9.1")


def test_a_node_without_ray_ds_is_named(here: dict[str, Any]) -> None:
    (problem,) = judge_versions(here, {"b": {**here, "ray_ds": describe_package("no_such_package")}})
    assert problem.wrong.startswith("ray_ds on node b is missing")


def test_the_same_version_with_other_source_is_named(here: dict[str, Any]) -> None:
    other = {**here, "ray_ds": {**here["ray_ds"], "sha256": "0" * 16, "folder": "/opt/ray_ds"}}
    (problem,) = judge_versions(here, {"b": other})
    assert (
        "other source files (/opt/ray_ds)" in problem.wrong and problem.action == "install the same wheel on every node"
    )


def test_a_package_that_came_with_the_job_is_named(here: dict[str, Any]) -> None:
    folder = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/ray_ds"
    (problem,) = judge_versions(here, {"b": {**here, "ray_ds": {**here["ray_ds"], "folder": folder}}})
    assert "that of the job's working directory" in problem.wrong and ".rayignore" in problem.action


def test_gpus_that_torch_does_not_reach_are_named() -> None:
    assert judge_gpus({"a": GPU, "b": GPU}) == []
    (unreached,) = judge_gpus({"b": {**GPU, "reaches_gpu": False}})
    assert "reaches no GPU" in unreached.wrong and "CUDA 12.8, driver 570.1" in unreached.wrong
    (no_nccl,) = judge_gpus({"b": {**GPU, "nccl": False}})
    assert "has no NCCL" in no_nccl.wrong
    (differing,) = judge_gpus({"a": GPU, "b": {**GPU, "driver": "535.1"}})
    assert differing.wrong == "nodes differ in driver: 535.1, 570.1"


def test_what_only_could_be_better_is_advice() -> None:
    assert judge_ops({"a": True}) == []
    (advice,) = judge_ops({"a": True, "b": False})
    assert "not built on b;" in advice and "python -m ray_ds.train.zero.build" in advice
    assert judge_arch_lists({"a": "", "b": "8.0;9.0+PTX"}) == []
    assert "TORCH_CUDA_ARCH_LIST (9.0a) on node b" in judge_arch_lists({"b": "9.0a"})[0]
