"""Measure how long training on a GPU stands still when its node is killed, and where the time goes.

    python -m jobs.bench.gpu_restart
    python -m jobs.bench.gpu_restart --preset tiny --device cpu     # a try without a GPU

It starts raylets of its own on this host: a head and two nodes with a GPU each, which is the same one: training has one
worker, the second node is what takes over. The first group compiles with an empty cache, which is the cold start; the
group after the kill finds it warm. Each ends with its first step.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; this Ray listens on loopback only

import numpy as np
import ray
import torch

from jobs.bench.elastic_nodes import start_nodes, wait_for
from jobs.bench.train import write_synthetic_shards
from ray_ds.config.model_size import num_parameters
from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.on_ray.trainer import TrainingStopped, train_on_ray
from ray_ds.train.host import Host
from ray_ds.train.task import Stopped, TrainResult, TrainTask

STORE_BYTES = 2_000_000_000
EPOCH_STEPS = 128
"""Steps that there is text for before it comes again."""
BEATS = "beats.jsonl"
STAGES = ("building the model", "loading the state", "micro-batch 1", "gradients")
"""Places that a worker says on its way to its first step, in their order."""


def main() -> None:
    """Train, kill the node, and print what each part of both starts took."""
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="ray_ds-bench-") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
        task = make_task(Path(folder), options)
        figures = measure(task, Path(folder), options)
    for name, value in figures.items():
        print(f"{name:32}{value:10.2f}")
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    inputs = {**vars(options), "device": device, "torch": torch.__version__, "parameters": num_parameters(task.config)}
    print(json.dumps({"name": "gpu_restart", "inputs": inputs, "figures": figures, "peers": {}}))


def parse_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_369m")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16, help="of a step, which is one micro-batch")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--kill-at", type=int, default=60, help="step after which the node is killed")
    parser.add_argument("--checkpoint-every", type=int, default=25)
    return parser.parse_args()


def make_task(folder: Path, options: argparse.Namespace) -> TrainTask:
    """Return a run that does not end by itself, with made-up shards."""
    sizes = argparse.Namespace(**vars(options), steps=EPOCH_STEPS, batch_rows=options.rows)
    write_synthetic_shards(folder / "shards", sizes)
    raw = {
        "model": {"preset": options.preset},
        "seq_len": options.seq_len,
        "batch_tokens": options.rows * options.seq_len,
        "micro_batch": options.rows,
        "steps": 1_000_000,
        "precision": "bf16",
        "zero_stage": options.zero_stage,
        "compile": options.compile,
        "checkpoint_every": options.checkpoint_every,
        "log_every": 1,
        "num_workers": 1,
        "max_failures": 3,
        "device": options.device,
    }
    settings = decode_settings(TrainSettings, raw, where="bench")
    return TrainTask(
        settings=settings,
        config=settings.model.resolve(options.vocab_size, options.seq_len),
        shards=str(folder / "shards"),
        checkpoints=str(folder / "run" / "work" / "checkpoints"),
        output=str(folder / "run"),
        bos_token_id=0,
        eos_token_id=1,
        device=options.device,
        job_started=time.time(),
    )


class Telling:
    """A host that also writes down when the loop was where."""

    def __init__(self, host: Host, file: Path) -> None:
        self._host, self._file = host, file
        self._last = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def beat(self, place: str) -> None:
        """Pass the word on; write down the first of each kind."""
        self._host.beat(place)
        stage = next((stage for stage in STAGES if place.endswith(stage)), None)
        if stage is not None and stage != self._last and self._last != STAGES[-1]:
            self._last = stage
            with self._file.open("a") as file:
                file.write(json.dumps({"stage": stage, "time": time.time()}) + "\n")


def train_telling(task: TrainTask, host: Host) -> TrainResult | Stopped:
    """Train as usual, telling the times."""
    started = time.time()
    from ray_ds.train.loop import train

    file = Path(task.output) / BEATS
    with file.open("a") as lines:
        node = ray.get_runtime_context().get_node_id()
        lines.write(json.dumps({"stage": "importing", "time": started, "node": node}) + "\n")
    return train(task, Telling(host, file))  # type: ignore[arg-type]


def measure(task: TrainTask, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of both starts, whole and by their parts, and the steps that ran again."""
    (folder / "run").mkdir()
    records: list[Mapping[str, float]] = []
    stop = threading.Event()
    with start_nodes(2, num_gpus=int(options.device == "cuda"), store_bytes=STORE_BYTES) as nodes:
        began = time.time()

        def run() -> None:
            try:
                train_on_ray(
                    task,
                    work=str(folder / "run" / "work"),
                    on_report=records.append,
                    stop=stop,
                    loop=train_telling,
                )
            except TrainingStopped:
                return

        thread = threading.Thread(target=run)
        thread.start()

        def has_done(step: int) -> bool:
            if not thread.is_alive():
                raise RuntimeError("training ended; its error is above")
            return bool(records) and records[-1]["step"] >= step

        try:
            wait_for(lambda: has_done(options.kill_at), f"step {options.kill_at} was not reached", timeout_s=400)
            victim = str(read_beats(folder)[0]["node"])
            killed = time.time()
            nodes.kill(victim)
            wait_for(lambda: has_done(1) and records[-1]["restarts"] > 0, "no step after the kill", timeout_s=300)
        finally:
            stop.set()
            thread.join()
    beats = read_beats(folder)
    first, second = (beats[i : i + 1 + len(STAGES)] for i in (0, 1 + len(STAGES)))
    before, after = ([r for r in records if (r["restarts"] > 0) is is_after] for is_after in (False, True))
    done, again = max(record["step"] for record in before), after[0]
    steps = [record["seconds"] for record in before[10:]]
    return {
        "cold_start_to_step_s": records[0]["time"] - began,
        **parts("cold", began, first, records[0]["time"]),
        "kill_to_step_s": again["time"] - killed,
        **parts("warm", killed, second, again["time"]),
        "steps_lost_kill": done + 1 - again["step"],
        "step_s": float(np.median(steps)),
    }


def read_beats(folder: Path) -> list[dict[str, Any]]:
    """Return what the workers have written down."""
    return [json.loads(line) for line in (folder / "run" / BEATS).read_text().splitlines()]


def parts(kind: str, begin: float, beats: Sequence[Mapping[str, Any]], end: float) -> dict[str, float]:
    """Return the seconds before each stage's end, by what took them."""
    names = ("finding_out_and_process", "imports", "model_and_engine", "state", "first_pass", "first_step")
    times = [begin, *(beat["time"] for beat in beats), end]
    spans = (later - earlier for earlier, later in pairwise(times))
    return {f"{kind}_{name}_s": seconds for name, seconds in zip(names, spans, strict=True)}


if __name__ == "__main__":
    main()
