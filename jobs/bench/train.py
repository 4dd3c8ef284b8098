"""Measure training as the train stage runs it, in each precision and ZeRO stage, beside a bare loop of the same model.

    python -m jobs.bench.train --model dense_350m --zero-stages 1 2 --compile
    python -m jobs.bench.train --model demo --batch-rows 16 --micro-batch 16 --seq-len 256 --vocab-size 4096

It starts a Ray of its own with one worker: NCCL refuses two on one GPU. The text is made up (tokens by Zipf's law),
which costs the same as real text in a dense model; the loss goes down to the entropy of single tokens.
"""

import argparse
import json
import os
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

from ray_ds.config.model_size import flops_per_token, num_parameters
from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.data.shards import token_dtype, write_shard
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.on_ray.trainer import train_on_ray
from ray_ds.train.metrics import decode, peak_flops
from ray_ds.train.task import TrainTask

WARM_UP = 0.4
"""Part of the steps that is left out of the figures: compilation, and fp16 finding its loss scale."""


def main() -> None:
    """Run all cases, print a table and, as the last line, the figures as JSON."""
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ray.init("local", num_gpus=int(device == "cuda"), include_dashboard=False, log_to_driver=options.verbose)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ray_ds-bench-") as folder:
        write_synthetic_shards(Path(folder) / "shards", options)
        for precision in options.precisions:
            for stage in options.zero_stages:
                rows.append(run_case(Path(folder), make_settings(options, precision, stage, device), options))
                print(format_row(rows[-1]), flush=True)
    ray.shutdown()
    task = make_settings(options, "bf16", 1, device)
    peers = {"bare_loop_bf16_tokens_per_s": bare_loop(task, options, torch.device(device))}
    config = task.model.resolve(options.vocab_size, options.seq_len)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {options.threads} threads"
    inputs = {**vars(options), "device": name, "torch": torch.__version__, "parameters": num_parameters(config)}
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
        "checkpoint_every": options.steps,
        "compile": options.compile,
        "device": device,
        "threads_per_worker": options.threads,
        "max_failures": 0,
    }
    return decode_settings(TrainSettings, raw, where="bench")


def write_synthetic_shards(folder: Path, options: argparse.Namespace) -> None:
    """Write as many tokens as a case reads, and a tokenizer file that nobody reads."""
    num_tokens = (options.steps + 1) * options.batch_rows * options.seq_len
    tokens = np.random.default_rng(0).zipf(1.2, num_tokens) % options.vocab_size
    (folder / "train").mkdir(parents=True)
    dtype = token_dtype(options.vocab_size)
    write_shard(str(folder / "train" / "0.arrow"), [tokens.astype(dtype)], ["synthetic"], dtype)
    (folder / "tokenizer.json").write_text("{}")


def run_case(folder: Path, settings: TrainSettings, options: argparse.Namespace) -> dict[str, Any]:
    """Train once, through Ray Train and DeepSpeed, with a checkpoint and an export at the end."""
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
        train_on_ray(task, work=f"{run}/work/ray_train", on_report=lambda _: None)
        seconds = time.monotonic() - started
        records = decode((Path(run) / "metrics.jsonl").read_text())
    return {
        **summarize(records),
        "precision": settings.precision,
        "zero_stage": settings.zero_stage,
        "seconds": seconds,
    }


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of a run's later steps, and what its loss scale did over all of them."""
    steady = records[int(len(records) * WARM_UP) :]
    return {
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in steady),
        "mfu": statistics.median(record["mfu"] for record in steady) if "mfu" in steady[-1] else None,
        "first_loss": records[0]["loss"],
        "final_loss": statistics.fmean(record["loss"] for record in records[-10:]),
        "skipped_steps": sum(bool(record.get("is_skipped")) for record in records),
        "final_loss_scale": records[-1].get("loss_scale"),
    }


def format_row(row: Mapping[str, Any]) -> str:
    """Return a line of the table."""
    mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:5.1f} % MFU"
    scale = f"{row['skipped_steps']} skipped, scale {row['final_loss_scale']:.0f}" if row["final_loss_scale"] else ""
    losses = f"loss {row['first_loss']:.3f} -> {row['final_loss']:.3f}"
    return (
        f"{row['precision']}  ZeRO {row['zero_stage']}  {row['tokens_per_s']:10,.0f} tokens/s  {mfu}  {losses}  {scale}"
    )


def bare_loop(settings: TrainSettings, options: argparse.Namespace, device: torch.device) -> float:
    """Return tokens/s of the same model in bf16 with torch's AdamW: no Ray, no DeepSpeed, no fp32 masters."""
    config = settings.model.resolve(options.vocab_size, options.seq_len)
    torch.set_num_threads(options.threads)
    decoder = Decoder(config)
    init_weights(decoder, 0)
    decoder = decoder.to(device, torch.bfloat16)
    forward = torch.compile(decoder) if options.compile else decoder
    is_cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=options.lr, fused=is_cuda)
    rows = torch.randint(options.vocab_size, (options.micro_batch, options.seq_len + 1), device=device)
    seconds = []
    for _ in range(max(10, options.steps // 3)):
        started = time.perf_counter()
        for _ in range(settings.num_micro_batches):
            (forward(rows[:, :-1], rows[:, 1:]) / settings.batch_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    tokens_per_s = settings.batch_tokens / statistics.median(seconds[len(seconds) // 2 :])
    peak = peak_flops(device, torch.bfloat16)
    mfu = f"{100 * tokens_per_s * flops_per_token(config, options.seq_len) / peak:5.1f} % MFU" if peak else ""
    print(f"bare bf16 loop{tokens_per_s:12,.0f} tokens/s  {mfu}")
    return tokens_per_s


if __name__ == "__main__":
    main()
