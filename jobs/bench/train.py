"""Measure training as the train stage runs it, beside bare scripts that leave out more and more of it.

    python -m jobs.bench.train --model dense_350m --zero-stages 1 2 --compile
    python -m jobs.bench.train --model demo --batch-rows 16 --micro-batch 16 --seq-len 256 --vocab-size 4096

Four rows for each precision and ZeRO stage, all in one run, all of the same model with the same numerics; the peers'
rows lie ready on the device (`jobs/bench/train_peers.py`):

    ours              the stage's worker under Ray Train: our loop, reading shards, logging, checkpoints, snapshots
    bare engine       our engine, DeepSpeed with a quicker look at the gradient: what Ray Train and our loop cost
    stock deepspeed   DeepSpeed as it is, with the same configuration and optimizer
    bare loop         no DeepSpeed either: bf16 weights, fp32 masters, torch's fused AdamW (bf16 only)

It starts a Ray of its own with one worker: NCCL refuses two on one GPU. The text is made up (tokens by Zipf's law),
which costs the same as real text in a dense model; the loss goes down to the entropy of single tokens.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; this Ray listens on loopback only

import numpy as np
import ray
import torch

from jobs.bench.train_peers import PEERS, WARM_UP, peers_of, run_peer
from ray_ds.config.model_size import num_parameters
from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.data.shard_file import token_dtype, write_shard
from ray_ds.on_ray.trainer import train_on_ray
from ray_ds.train.metrics import decode
from ray_ds.train.task import TrainTask


def main() -> None:
    """Run all cases, print a table and, as the last line, the figures as JSON."""
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["DS_ACCELERATOR"] = device
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ray_ds-bench-") as folder:
        write_synthetic_shards(Path(folder) / "shards", options)
        for precision, stage in itertools.product(options.precisions, options.zero_stages):
            settings = make_settings(options, precision, stage, device)
            row = {"precision": precision, "zero_stage": stage, **run_ours(Path(folder), settings, options)}
            print(format_row(row), flush=True)
            for peer in () if options.no_peers else peers_of(precision):
                row |= run_peer(peer, settings, options)
                print(format_peer(row, peer.__name__), flush=True)
            rows.append(row)
    settings = make_settings(options, "bf16", 1, device)
    config = settings.model.resolve(options.vocab_size, options.seq_len)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {options.threads} threads"
    inputs = {**vars(options), "device": name, "torch": torch.__version__, "parameters": num_parameters(config)}
    names = [f"{peer.__name__}_tokens_per_s" for peer in PEERS]
    peers = [{key: row[key] for key in names if key in row} for row in rows]
    print(json.dumps({"name": "train", "inputs": inputs, "figures": rows, "peers": peers}))


def parse_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dense_350m", help="preset")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--zero-stages", nargs="+", type=int, default=[1, 2, 3], choices=[0, 1, 2, 3])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--snapshot-every", type=int, default=0, help="steps; default: none, as the peers")
    parser.add_argument("--checkpoint-every", type=int, help="steps; default: only at the end")
    parser.add_argument("--no-peers", action="store_true", help="leave the bare scripts out")
    parser.add_argument("--profile", metavar="FOLDER", help="keep a profile of two steps there")
    parser.add_argument("--verbose", action="store_true", help="show the worker's output")
    return parser.parse_args()


def make_settings(options: argparse.Namespace, precision: str, stage: int, device: str) -> TrainSettings:
    """Return the settings of a case."""
    raw = {
        "model": {"preset": options.model},
        "seq_len": options.seq_len,
        "batch_tokens": options.batch_rows * options.seq_len,
        "micro_batch": options.micro_batch,
        "steps": options.steps,
        "precision": precision,
        "zero_stage": stage,
        "optimizer": {"kind": "adamw", "lr": options.lr},
        "schedule": {"warmup_steps": options.steps // 4},
        "checkpoint_every": options.checkpoint_every or options.steps,
        "compile": options.compile,
        "device": device,
        "threads_per_worker": options.threads,
        "max_failures": 0,
        "snapshot_every": options.snapshot_every,
    }
    if options.profile:
        raw["profile_steps"] = [options.steps - 3, options.steps - 2]
    return decode_settings(TrainSettings, raw, where="bench")


def write_synthetic_shards(folder: Path, options: argparse.Namespace) -> None:
    """Write as many tokens as a case reads, at most 64 M, and a tokenizer file that nobody reads."""
    num_tokens = min((options.steps + 1) * options.batch_rows * options.seq_len, 1 << 26)
    tokens = np.random.default_rng(0).zipf(1.2, num_tokens) % options.vocab_size
    (folder / "train").mkdir(parents=True)
    dtype = token_dtype(options.vocab_size)
    write_shard(str(folder / "train" / "0.arrow"), [tokens.astype(dtype)], ["synthetic"], dtype)
    (folder / "tokenizer.json").write_text("{}")


def run_ours(folder: Path, settings: TrainSettings, options: argparse.Namespace) -> dict[str, Any]:
    """Train once, through Ray Train and our loop, with a checkpoint and an export at the end."""
    is_cuda = settings.device == "cuda"
    ray.init("local", num_gpus=int(is_cuda), include_dashboard=False, log_to_driver=options.verbose)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as run:
            task = TrainTask(
                settings=settings,
                config=settings.model.resolve(options.vocab_size, options.seq_len),
                shards=str(folder / "shards"),
                checkpoints=f"{run}/work/checkpoints",
                output=run,
                bos_token_id=0,
                eos_token_id=1,
                device=settings.device,
            )
            started = time.monotonic()
            train_on_ray(task, work=f"{run}/work", on_report=lambda _: None)
            seconds = time.monotonic() - started
            records = decode((Path(run) / "metrics.jsonl").read_text())
            if options.profile:
                shutil.copytree(Path(run) / "profile", options.profile, dirs_exist_ok=True)
    finally:
        ray.shutdown()
    return {**summarize(records), "seconds": seconds}


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of a run's later steps, and what its loss scale did over all of them."""
    steady = records[int(len(records) * WARM_UP) :]
    step_s = statistics.median(record["seconds"] for record in steady)
    figures = {
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in steady),
        "step_s": step_s,
        "mfu": statistics.median(record["mfu"] for record in steady) if "mfu" in steady[-1] else None,
        "first_loss": records[0]["loss"],
        "final_loss": statistics.fmean(record["loss"] for record in records[-10:]),
        "memory_bytes": max(record["memory_bytes"] for record in records),
        "skipped_steps": sum(bool(record.get("is_skipped")) for record in records),
        "final_loss_scale": records[-1].get("loss_scale"),
    }
    for name in ("checkpoint_s", "snapshot_s"):
        stalls = [record[name] for record in steady if record.get(name)]
        if stalls:
            figures[name] = statistics.median(stalls)
            figures[name.replace("_s", "_stall_of_a_step")] = statistics.median(stalls) / step_s
    return figures


def format_row(row: Mapping[str, Any]) -> str:
    """Return a line of the table."""
    mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:5.1f} % MFU"
    scale = f"{row['skipped_steps']} skipped, scale {row['final_loss_scale']:.0f}" if row["final_loss_scale"] else ""
    losses = f"loss {row['first_loss']:.3f} -> {row['final_loss']:.3f}"
    line = (
        f"{row['precision']}  ZeRO {row['zero_stage']}  {row['tokens_per_s']:10,.0f} tokens/s  {mfu}  {losses}  {scale}"
    )
    stalls = [f"{key} {row[key]:.1%}" for key in row if key.endswith("_of_a_step")]
    return "\n    ".join([line, *stalls])


def format_peer(row: Mapping[str, Any], name: str) -> str:
    """Return a line of the table."""
    peer = row[f"{name}_tokens_per_s"]
    return f"    {name.replace('_', ' '):16} {peer:10,.0f} tokens/s  ours is {row['tokens_per_s'] / peer:.1%}"


if __name__ == "__main__":
    main()
