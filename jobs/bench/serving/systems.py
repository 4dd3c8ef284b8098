"""The measured systems, each run as a program of its own so that none leaves threads or memory to the next."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jobs.bench.serving.models import ModelFolders
from jobs.bench.serving.work import RESULT, Work
from ray_ds.config.model import ModelConfig

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 4 * 3600
VLLM_CACHE_GIB = 2
"""Taken at its start and so a part of what it holds; room for 20,000 tokens of the dense model."""
ERROR_LINES = 12
"""Of a peer's output, where it gives no figures."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A program that answers prompts."""

    name: str
    module: str
    """In this package."""
    weights: str
    """Type of its matrices."""
    folder: Literal["floats", "int8"] = "floats"
    """The one it is given."""
    files: str = "*.safetensors"
    """What it loads of the folder."""
    python: str | None = sys.executable
    """Its interpreter; None where none was given."""
    option: str = ""
    """The option that gives the interpreter."""
    package: str = ""
    """What this interpreter must have, where it is a package that is not always there."""
    exactness: str | None = None
    """Of our engine; None for peers."""
    is_dense_only: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


def all_systems(pythons: Mapping[str, str | None]) -> list[System]:
    """Return ours, in each exactness, and the peers.

    Args:
        pythons: the interpreters of `llama_cpp` and `vllm`.
    """
    ours = [
        System(name="ours", module="in_our_engine", weights="int8", folder="int8", exactness=exactness)
        for exactness in ("none", "batch", "schedule")
    ]
    peers = [
        System(name="transformers", module="in_transformers", weights="bf16"),
        System(
            name="llama_cpp",
            module="in_llama_cpp",
            weights="q8_0",
            files="*.gguf",
            python=pythons["llama_cpp"],
            option="--llama-cpp-python",
            is_dense_only=True,
            devices=("cpu",),
        ),
        System(
            name="vllm",
            module="in_vllm",
            weights="bf16",
            python=pythons["vllm"],
            option="--vllm-python",
            devices=("cpu",),
        ),
        System(name="graph_loop", module="in_graph_loop", weights="int8", package="torchao", devices=("cuda",)),
    ]
    return [*ours, *peers]


def reason_not_to_run(system: System, config: ModelConfig, device: str) -> str | None:
    """Return why a system is left out of a case; None where it is not."""
    if device not in system.devices:
        return f"runs with --device {system.devices[0]}"
    if system.python is None:
        return f"no {system.option} was given"
    if system.is_dense_only and config.n_routed_experts:
        return "its file is written for dense models"
    if system.package and importlib.util.find_spec(system.package) is None:
        return f"{system.package} is not installed"
    return None


def run_system(system: System, folders: ModelFolders, work: Work, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Return a system's figures, or as `failed` the end of its output where it gave none."""
    work = replace(work, folder=str(getattr(folders, system.folder)), exactness=system.exactness or work.exactness)
    program = [str(system.python), "-m", f"jobs.bench.serving.{system.module}", work.to_json()]
    environment = _environment(system, work)
    try:
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"failed": f"no figures within {timeout_s:g} s"}
    results = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not results:
        output = (done.stdout + done.stderr).splitlines()
        return {"failed": "\n".join([f"exit {done.returncode}", *output[-ERROR_LINES:]])}
    figures: dict[str, Any] = json.loads(results[-1].removeprefix(RESULT))
    return {**figures, "weights_bytes": sum(file.stat().st_size for file in Path(work.folder).glob(system.files))}


def _environment(system: System, work: Work) -> dict[str, str]:
    """Return what makes every library compute with the same threads, and no interpreter read another one's packages."""
    cpus = sorted(os.sched_getaffinity(0))[: work.threads]
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT) if system.option else os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(work.threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_CACHE_GIB),
    }
