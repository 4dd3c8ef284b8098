"""Hold `ray-ds plan` to what the train stage does: peak memory and tokens/s, planned and measured, side by side.

    python -m jobs.bench.plan                       # on one GPU; a few minutes
    python -m jobs.bench.plan --cases cpu           # on CPUs: speed only, for there memory is the whole process's

Each case trains some steps of made-up tokens as `jobs.bench.train` does. Memory is what torch counts of the GPU.
"""

import argparse
import json
import os
import tempfile
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

ADAMW = {"kind": "adamw", "lr": 6e-4}
DENSE = {"model": {"preset": "dense_350m"}, "micro_batch": 16, "rows": 16, "zero_stage": 1, "compile": True}
CASES: Mapping[str, list[dict[str, Any]]] = {
    "gpu": [
        DENSE,
        {**DENSE, "rows": 128},
        {**DENSE, "compile": False},
        {**DENSE, "compile": False, "zero_stage": 0},
        {**DENSE, "compile": False, "zero_stage": 2},
        {**DENSE, "compile": False, "zero_stage": 3},
        {**DENSE, "compile": False, "precision": "fp16"},
        {**DENSE, "compile": False, "recompute_activations": True, "micro_batch": 32, "rows": 32},
        {**DENSE, "optimizer": {"kind": "muon"}, "gradient_clipping": 0.0},
        {**DENSE, "micro_batch": 4, "rows": 4},
        {**DENSE, "model": {"preset": "llama_1b"}, "zero_stage": 2},
        {**DENSE, "model": {"preset": "moe_1b"}},
        {**DENSE, "model": {"preset": "moe_1b"}, "micro_batch": 8, "rows": 8, "compile": False},
    ],
    "cpu": [
        {"model": {"preset": "demo"}, "micro_batch": 8, "rows": 16, "zero_stage": 1, "seq_len": 256},
        {"model": {"preset": "demo_dense"}, "micro_batch": 16, "rows": 16, "zero_stage": 2, "seq_len": 256},
        {"model": {"preset": "demo_dense"}, "micro_batch": 4, "rows": 8, "precision": "fp32", "seq_len": 256},
    ],
}


def main() -> None:
    """Run the cases, print a line each and, as the last one, the figures as JSON."""
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["DS_ACCELERATOR"] = device
    cases = CASES[options.cases or ("gpu" if device == "cuda" else "cpu")]
    rows = []
    for number, changes in enumerate(cases):
        row = run_case(dict(changes), device, options)
        rows.append(row)
        print(format_row(number, row), flush=True)
    inputs = {**vars(options), "device": device_name(device), "torch": torch.__version__}
    worst = {
        name: max((abs(row[name]) for row in rows if row[name] is not None), default=None)
        for name in ("memory_error", "speed_error")
    }
    print(json.dumps({"name": "plan", "inputs": inputs, "figures": {**worst, "cases": rows}, "peers": []}))


def parse_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=list(CASES), help="default: what this machine has")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="show the worker's output")
    return parser.parse_args()


def device_name(device: str) -> str:
    """Return what computes."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def run_case(changes: dict[str, Any], device: str, options: argparse.Namespace) -> dict[str, Any]:
    """Plan a case and train it; return both outcomes and the plan's errors, as parts of what was measured."""
    is_cuda = device == "cuda"
    seq_len, rows = changes.pop("seq_len", 2048), changes.pop("rows")
    raw = {
        "seq_len": seq_len,
        "batch_tokens": rows * seq_len,
        "steps": options.steps,
        "optimizer": ADAMW,
        "schedule": {"warmup_steps": options.steps // 4},
        "checkpoint_every": options.steps,
        "snapshot_every": 0,
        "max_failures": 0,
        "device": device,
        "threads_per_worker": options.threads,
        **changes,
    }
    settings = decode_settings(TrainSettings, raw, where="bench")
    vocab_size = 32768 if is_cuda else 4096
    given = argparse.Namespace(
        vocab_size=vocab_size,
        seq_len=seq_len,
        batch_rows=rows,
        steps=options.steps,
        verbose=options.verbose,
        profile=None,
    )
    case = case_of(settings, settings.model.resolve(vocab_size, seq_len), 1)
    plan = plan_of(case, fleet_here(settings, is_cuda=is_cuda))
    with tempfile.TemporaryDirectory(prefix="ray_ds-bench-") as folder:
        write_synthetic_shards(Path(folder) / "shards", given)
        measured = run_ours(Path(folder), settings, given)
    memory = measured["memory_bytes"] if is_cuda else None
    return {
        "case": {**changes, "rows": rows},
        "planned_memory_bytes": plan.memory.peak,
        "memory_bytes": memory,
        "memory_error": plan.memory.peak / memory - 1 if memory else None,
        "fullest_moment": plan.memory.peak_moment,
        "planned_tokens_per_s": plan.speed.tokens_per_s,
        "tokens_per_s": measured["tokens_per_s"],
        "speed_error": plan.speed.tokens_per_s / measured["tokens_per_s"] - 1,
    }


def fleet_here(settings: TrainSettings, *, is_cuda: bool) -> Fleet:
    """Return this machine: its GPU by its name, its CPU by measuring it."""
    if is_cuda:
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
