"""Versions: every node runs the same Python, packages and ray_ds as this driver, and its GPUs fit its torch."""

import os
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

import ray
import torch
from pydantic import JsonValue

from ray_ds.verify import node_probe
from ray_ds.verify.context import ClusterNode, Context
from ray_ds.verify.finding import Finding, Problem, judged
from ray_ds.verify.on_nodes import Answers, ask_nodes

NAME = "versions"
SHIPPED = "/runtime_resources/"
"""In the path of what Ray unpacks of a job's working directory."""


def check_versions(context: Context) -> Finding:
    """Compare what is installed on each node with this driver."""
    answers = ask_probes(context.nodes)
    here = node_probe.probe_node()
    problems = answers.problems("what is installed there")
    problems += judge_versions(here, {node.name: facts for node, facts in answers.values.items()})
    ops = ask_nodes(tuple(answers.values), has_built_op)
    gpus = ask_nodes([node for node in answers.values if node.gpus] if context.gpus else [], probe_gpu, num_gpus=1)
    problems += gpus.problems("what its GPU is (are all of them in use?)")
    problems += judge_gpus({node.name: facts for node, facts in gpus.values.items()})
    advice = judge_ops({node.name: is_built for node, is_built in ops.values.items()}) if not context.gpus else []
    advice += judge_arch_lists({node.name: facts["arch_list"] for node, facts in answers.values.items()})
    figures: dict[str, JsonValue] = {
        "nodes": len(answers.values),
        "python": here["python"],
        **here["packages"],
        "ray_ds": here["ray_ds"]["version"],
        "ray_ds_source": here["ray_ds"]["sha256"],
        "gpus": {node.name: facts for node, facts in gpus.values.items()},
    }
    return judged(NAME, figures, problems, advice)


def ask_probes(nodes: Iterable[ClusterNode]) -> Answers[dict[str, Any]]:
    """Return what each node says about itself, whether or not ray_ds is there."""
    ray.cloudpickle.register_pickle_by_value(node_probe)  # it travels as code instead of as a name
    return ask_nodes(list(nodes), node_probe.probe_node)


def judge_versions(here: Mapping[str, Any], nodes: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Return what differs from the driver, a problem a package and node."""
    problems = []
    for name, facts in nodes.items():
        rows = [("python", facts["python"], here["python"])]
        rows += [(package, facts["packages"][package], here["packages"][package]) for package in node_probe.PACKAGES]
        rows.append(("ray_ds", facts["ray_ds"]["version"], here["ray_ds"]["version"]))
        for package, found, wanted in rows:
            if found != wanted:
                wrong = f"{package} on node {name} is {found}, and {wanted} where the job's driver runs"
                problems.append(Problem(wrong=wrong, action=f"install {package} {wanted} on every node, or one image"))
        problems += _judge_package(name, facts["ray_ds"], here["ray_ds"])
    return problems


def _judge_package(name: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> list[Problem]:
    """Return what is wrong with a node's ray_ds beside its version."""
    if SHIPPED in found["folder"]:
        wrong = f"ray_ds on node {name} is that of the job's working directory ({found['folder']}), which goes with it"
        return [Problem(wrong=wrong, action="install the package on every node; ship only jobs/ (see .rayignore)")]
    if found["version"] == wanted["version"] and found["sha256"] != wanted["sha256"]:
        wrong = f"ray_ds on node {name} has the driver's version and other source files ({found['folder']})"
        return [Problem(wrong=wrong, action="install the same wheel on every node")]
    return []


def has_built_op() -> bool:
    """Tell whether DeepSpeed's CPU communication op was built in this node's environment."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ray_ds.train.zero.build import op_file  # brings DeepSpeed

    return op_file().exists()


def judge_ops(nodes: Mapping[str, bool]) -> list[str]:
    """Return advice on nodes without the built op."""
    absent = [name for name, is_built in nodes.items() if not is_built]
    if not absent:
        return []
    command = "DS_ACCELERATOR=cpu python -m ray_ds.train.zero.build"
    return [f"DeepSpeed's CPU op is not built on {', '.join(absent)}; training runs without it; to build it: {command}"]


def judge_arch_lists(nodes: Mapping[str, str]) -> list[str]:
    """Return advice on nodes whose TORCH_CUDA_ARCH_LIST DeepSpeed's builder cannot read."""
    return [
        f"TORCH_CUDA_ARCH_LIST ({value}) on node {name} breaks DeepSpeed's builder; write 9.0 instead of 9.0a"
        for name, value in nodes.items()
        if any(not part.replace(".", "").isdigit() for part in value.replace("+PTX", "").replace(";", " ").split())
    ]


def probe_gpu() -> dict[str, JsonValue]:
    """Return what this task's GPU is and whether torch reaches it."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        lines = done.stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    driver, _, kind = (lines[0] if lines else "unknown, unknown").partition(", ")
    return {
        "driver": driver,
        "kind": kind,
        "torch_cuda": torch.version.cuda,
        "reaches_gpu": torch.cuda.is_available(),
        "nccl": bool(torch.distributed.is_nccl_available()),
    }


def judge_gpus(nodes: Mapping[str, Mapping[str, JsonValue]]) -> list[Problem]:
    """Return what keeps torch from the GPUs."""
    problems = []
    for name, facts in nodes.items():
        built = f"torch built for CUDA {facts['torch_cuda']}, driver {facts['driver']}"
        if not facts["reaches_gpu"]:
            wrong = f"torch on node {name} reaches no GPU, though Ray counts one ({built})"
            action = "install a torch whose CUDA the driver supports, or a newer driver; see nvidia-smi there"
            problems.append(Problem(wrong=wrong, action=action))
        elif not facts["nccl"]:
            problems.append(Problem(wrong=f"torch on node {name} has no NCCL ({built})", action="install one that has"))
    for fact in ("driver", "torch_cuda"):
        values = {str(facts[fact]) for facts in nodes.values()}
        if len(values) > 1:
            wrong = f"nodes differ in {fact}: {', '.join(sorted(values))}"
            problems.append(Problem(wrong=wrong, action="bring GPU nodes to one driver and one torch"))
    return problems
