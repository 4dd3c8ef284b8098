"""Hold `ray-ds plan` to what the train stage does: peak memory and tokens/s, planned and measured, side by side.

    python -m jobs.bench.plan                       # on one GPU, in less than four minutes
    python -m jobs.bench.plan --cases gpu_more --seconds 600
    python -m jobs.bench.plan --cases cpu           # on CPUs: speed only, for there memory is the whole process's

Each case trains some steps of made-up tokens as `jobs.bench.train` does. Memory is what torch counts of the GPU. The
peer is DeepSpeed's own estimate, of weights, gradients and optimizer state alone. Each case ends with a checkpoint in a
folder for temporary files: TMPDIR=/dev/shm saves time where the disk is slow.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; this Ray listens on loopback only

import ray
import torch

from jobs.bench.train import run_ours, write_synthetic_shards
from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.on_ray.devices import cluster_fleet
from ray_ds.plan.case import case_of
from ray_ds.plan.choose import plan_of
from ray_ds.plan.devices import Fleet, find_kind
from ray_ds.plan.matrices import largest_tensor

ROW_TOKENS = 2048
ADAMW = {"kind": "adamw", "lr": 6e-4}
DENSE = {"model": {"preset": "dense_350m"}, "micro_batch": 16, "rows": 16, "zero_stage": 1}
COMPILED = {**DENSE, "compile": True}
MIXTURE = {**DENSE, "model": {"preset": "moe_1b"}, "micro_batch": 8, "rows": 8}
SMALL = {"model": {"preset": "demo"}, "seq_len": 256}
CASES: Mapping[str, list[dict[str, Any]]] = {
    "gpu": [
        DENSE,
        {**DENSE, "zero_stage": 2},
        {**DENSE, "zero_stage": 3},
        {**DENSE, "recompute_activations": True},
        MIXTURE,
        {**DENSE, "offload": "optimizer"},
        COMPILED,
    ],
    "gpu_more": [
        {**COMPILED, "rows": 128},
        {**COMPILED, "micro_batch": 4, "rows": 4},
        {**COMPILED, "optimizer": {"kind": "muon"}, "gradient_clipping": 0.0},
        {**COMPILED, "model": {"preset": "llama_1b"}, "zero_stage": 2},
        {**COMPILED, "model": {"preset": "moe_1b"}},
        {**DENSE, "zero_stage": 0},
        {**DENSE, "precision": "fp16"},
        {**DENSE, "recompute_activations": True, "micro_batch": 32, "rows": 32},
        {**DENSE, "offload": "all", "zero_stage": 3},
        {**DENSE, "offload": "optimizer", "zero_stage": 2, "rows": 32},
    ],
    "cpu": [
        {**SMALL, "micro_batch": 8, "rows": 16, "zero_stage": 1},
        {**SMALL, "model": {"preset": "demo_dense"}, "micro_batch": 16, "rows": 16, "zero_stage": 2},
        {**SMALL, "model": {"preset": "demo_dense"}, "micro_batch": 4, "rows": 8, "precision": "fp32"},
        {**SMALL, "micro_batch": 8, "rows": 8, "zero_stage": 3, "recompute_activations": True},
        {**SMALL, "micro_batch": 8, "rows": 8, "zero_stage": 1, "offload": "optimizer"},
    ],
}
"""In the order of what they tell: those that the time does not suffice for are left out from the end."""


def main() -> None:
    """Run the cases, print a line each and, as the last one, the figures as JSON."""
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["DS_ACCELERATOR"] = device
    cases = CASES[options.cases or ("gpu" if device == "cuda" else "cpu")]
    fleet = fleet_here(case_settings(cases[0], device, options))
    started, rows = time.monotonic(), []
    for number, changes in enumerate(cases):
        if rows and time.monotonic() - started + max(row["seconds"] for row in rows) > options.seconds:
            break
        row = run_case(changes, fleet, device, options)
        rows.append(row)
        print(format_row(number, row), flush=True)
    inputs = {**vars(options), "device": device_name(device), "torch": torch.__version__}
    worst = {
        name: max((abs(row[name]) for row in rows if row[name] is not None), default=None)
        for name in ("memory_error", "speed_error")
    }
    figures = {**worst, "cases": rows, "left_out": cases[len(rows) :]}
    peers = [deepspeed_estimate(row) for row in rows if row["case"].get("zero_stage", 1) >= 2]
    print(json.dumps({"name": "plan", "inputs": inputs, "figures": figures, "peers": peers}))


def parse_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=list(CASES), help="default: what this machine has")
    parser.add_argument("--steps", type=int, default=16)
    text = "no case is begun that would not end within so many seconds, by the longest before (default %(default)g)"
    parser.add_argument("--seconds", type=float, default=230.0, help=text)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="show the worker's output")
    return parser.parse_args()


def device_name(device: str) -> str:
    """Return what computes."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def case_settings(changes: Mapping[str, Any], device: str, options: argparse.Namespace) -> TrainSettings:
    """Return the settings of a case."""
    raw = {
        "seq_len": ROW_TOKENS,
        "batch_tokens": changes["rows"] * changes.get("seq_len", ROW_TOKENS),
        "steps": options.steps,
        "optimizer": ADAMW,
        "schedule": {"warmup_steps": options.steps // 4},
        "checkpoint_every": options.steps,
        "snapshot_every": 0,
        "max_failures": 0,
        "device": device,
        "threads_per_worker": options.threads,
        **{name: value for name, value in changes.items() if name != "rows"},
    }
    return decode_settings(TrainSettings, raw, where="bench")


def run_case(changes: Mapping[str, Any], fleet: Fleet, device: str, options: argparse.Namespace) -> dict[str, Any]:
    """Plan a case and train it; return both outcomes and the plan's errors, as parts of what was measured."""
    started, is_cuda = time.monotonic(), device == "cuda"
    settings = case_settings(changes, device, options)
    vocab_size = 32768 if is_cuda else 4096
    given = argparse.Namespace(
        vocab_size=vocab_size,
        seq_len=settings.seq_len,
        batch_rows=settings.batch_rows,
        steps=options.steps,
        verbose=options.verbose,
        profile=None,
    )
    case = case_of(settings, settings.model.resolve(vocab_size, settings.seq_len), 1)
    plan = plan_of(case, fleet)
    with tempfile.TemporaryDirectory(prefix="ray_ds-bench-") as folder:
        write_synthetic_shards(Path(folder) / "shards", given)
        measured = run_ours(Path(folder), settings, given)
    memory = measured["memory_bytes"] if is_cuda else None
    return {
        "case": changes,
        "seconds": time.monotonic() - started,
        "num_parameters": case.num_parameters,
        "largest_tensor": largest_tensor(case),
        "planned_memory_bytes": plan.memory.peak,
        "memory_bytes": memory,
        "memory_error": plan.memory.peak / memory - 1 if memory else None,
        "fullest_moment": plan.memory.peak_moment,
        "planned_tokens_per_s": plan.speed.tokens_per_s,
        "tokens_per_s": measured["tokens_per_s"],
        "speed_error": plan.speed.tokens_per_s / measured["tokens_per_s"] - 1,
    }


def deepspeed_estimate(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what DeepSpeed's own functions say that a case of ZeRO 2 or 3 takes on one GPU, and their error."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    is_offloaded = row["case"].get("offload", "none") != "none"
    if row["case"]["zero_stage"] == 2:
        _, estimate = estimate_zero2_model_states_mem_needs(row["num_parameters"], 1, 1, is_offloaded, 1.5)
    else:
        _, estimate, _ = estimate_zero3_model_states_mem_needs(
            row["num_parameters"],
            row["largest_tensor"],
            num_gpus_per_node=1,
            num_nodes=1,
            cpu_offload=is_offloaded,
            cpu_offload_params=row["case"].get("offload") == "all",
        )
    error = estimate / row["memory_bytes"] - 1 if row["memory_bytes"] else None
    return {"name": "DeepSpeed's estimate", "case": row["case"], "memory_bytes": estimate, "memory_error": error}


def fleet_here(settings: TrainSettings) -> Fleet:
    """Return this machine: its GPU by its name, its CPU by measuring it."""
    if settings.device == "cuda":
        return Fleet(kind=find_kind(torch.cuda.get_device_name()), num_devices=1)
    ray.init("local", include_dashboard=False, log_to_driver=False)
    try:
        return cluster_fleet(settings)
    finally:
        ray.shutdown()


def format_row(number: int, row: Mapping[str, Any]) -> str:
    """Return a line of the table."""
    speed = f"{row['planned_tokens_per_s']:10,.0f} planned, {row['tokens_per_s']:10,.0f} tokens/s"
    speed += f" ({row['speed_error']:+.1%})"
    planned = row["planned_memory_bytes"] / 2**30
    memory = f"{planned:6.1f} GiB planned"
    if row["memory_bytes"] is not None:
        memory += f", {row['memory_bytes'] / 2**30:6.1f} measured ({row['memory_error']:+.1%}, {row['fullest_moment']})"
    return f"{number:2}  {speed}  {memory}  {json.dumps(row['case'])}"


if __name__ == "__main__":
    main()
