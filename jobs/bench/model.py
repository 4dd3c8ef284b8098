"""Measure how fast our decoders train on one GPU, beside Hugging Face's and a bare loop, all in one run.

    python -m jobs.bench.model --cases dense_350m moe --fp8

For each case, in bf16 with fp32 master weights, the optimizer included, real routing with balancing on:

    ours             the train stage under Ray Train and DeepSpeed: our decoder, loop, shards, checkpoints at the end
    hugging_face     transformers' model of the same sizes, compiled, in a bare loop with torch's fused AdamW
    bare_loop        our decoder compiled in that same bare loop, so that loop and decoder can be told apart

A step is one micro-batch of `--rows` rows. The median is over the later steps. Tokens are made up.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; this Ray listens on loopback only

import torch
from torch import Tensor, nn

from jobs.bench.train import run_ours, write_synthetic_shards
from jobs.bench.train_peers import bare_loop, run_peer, time_plain_loop
from ray_ds.config.model import ModelConfig
from ray_ds.config.model_size import flops_per_token, num_active_parameters, num_parameters
from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.model.hugging_face import to_hf_config


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it is trained."""

    preset: str
    rows: int
    zero_stage: int


CASES: Mapping[str, Case] = {
    "dense_350m": Case(preset="llama_369m", rows=16, zero_stage=1),
    "dense_1b": Case(preset="llama_1b", rows=16, zero_stage=2),
    "moe": Case(preset="moe_1b", rows=16, zero_stage=1),
}


def main() -> None:
    """Run the cases, print a table and, as the last line, the figures as JSON."""
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["DS_ACCELERATOR"] = device
    figures: dict[str, float] = {}
    peers: dict[str, float] = {}
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ray_ds-bench-") as folder:
        write_synthetic_shards(Path(folder) / "shards", options)
        for name in options.cases:
            settings = make_settings(CASES[name], options, device)
            config = settings.model.resolve(options.vocab_size, options.seq_len)
            models[name] = {"parameters": num_parameters(config), "active": num_active_parameters(config)}
            models[name] |= {"flops_per_token": flops_per_token(config, options.seq_len)}
            ours = run_ours(Path(folder), settings, options)
            figures |= {f"{name}_tokens_per_s": ours["tokens_per_s"], f"{name}_mfu": ours["mfu"]}
            print(
                f"{name:12} ours            {ours['tokens_per_s']:10,.0f} tokens/s  MFU {ours['mfu'] or 0:.1%}",
                flush=True,
            )
            for peer in () if options.no_peers else (hugging_face, bare_loop):
                found = run_peer(peer, settings, options)[f"{peer.__name__}_tokens_per_s"]
                peers[f"{name}_{peer.__name__}_tokens_per_s"] = found
                print(f"{name:12} {peer.__name__:15} {found:10,.0f} tokens/s", flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {options.threads} threads"
    inputs = {**vars(options), "models": models, "device": name, "torch": torch.__version__}
    print(json.dumps({"name": "model", "inputs": inputs, "figures": figures, "peers": peers}))


def parse_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--preset", help="use this model instead of the cases' own")
    parser.add_argument("--rows", type=int, help="of a step; default: the case's")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=170, help="the first 40 %% are left out of the figures")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--fp8", action="store_true", help="ours with FP8 products")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="show the worker's output")
    options = parser.parse_args()
    options.profile = None
    options.micro_batch = options.batch_rows = options.rows or max(CASES[name].rows for name in options.cases)
    return options


def make_settings(case: Case, options: argparse.Namespace, device: str) -> TrainSettings:
    """Return the settings of a case."""
    rows = options.rows or case.rows
    raw = {
        "model": {"preset": options.preset or case.preset},
        "seq_len": options.seq_len,
        "batch_tokens": rows * options.seq_len,
        "micro_batch": rows,
        "steps": options.steps,
        "zero_stage": case.zero_stage,
        "fp8": options.fp8,
        "optimizer": {"kind": "adamw", "lr": options.lr},
        "schedule": {"warmup_steps": options.steps // 4},
        "checkpoint_every": options.steps,
        "snapshot_every": 0,
        "compile": options.compile,
        "device": device,
        "threads_per_worker": options.threads,
        "max_failures": 0,
    }
    return decode_settings(TrainSettings, raw, where="bench")


def hugging_face(settings: TrainSettings, options: argparse.Namespace) -> float:
    """Return tokens/s of transformers' model of the same sizes: bf16, fp32 masters, fused AdamW, compiled."""
    model = build_hugging_face(settings.model.resolve(options.vocab_size, options.seq_len)).to(settings.device)

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    return time_plain_loop(model, loss_of, settings, options)


def build_hugging_face(config: ModelConfig) -> nn.Module:
    """Return transformers' model of a config, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = to_hf_config(config)
    model: nn.Module = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values), attn_implementation="sdpa"
    )
    return model.train()


if __name__ == "__main__":
    main()
