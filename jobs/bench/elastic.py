"""Measure what a killed, a joining and a draining node cost training, ours beside Ray Train's own elastic scaling.

    python -m jobs.bench.elastic                                          # everything: more than an hour
    python -m jobs.bench.elastic --goodput-minutes 0 --stall-minutes 0    # the disturbances alone: some ten minutes

It starts raylets of its own on this host: a head, and two nodes for a worker each, with the health checks of
`cluster/settings.env`. Training is the train stage's, of a tiny model. Both sides have the same loop and checkpoints;
ours has its policies and its snapshots in memory, the peer is `scaling = "stock"` without snapshots. Times end with the
end of the first step of the new group. Goodput and false deaths are ours alone; both are counted while training runs.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; this Ray listens on loopback only

import numpy as np
import ray
import torch

from jobs.bench.elastic_nodes import Nodes, count_false_deaths, start_nodes, wait_for
from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.data.shard_file import write_shard
from ray_ds.on_ray.trainer import TrainingStopped, train_on_ray
from ray_ds.train.task import TrainTask

VOCAB_SIZE = 512
SEQ_LEN = 64
MICRO_BATCH = 8
BATCH_ROWS = 64
CHECKPOINT_EVERY = 200
DRAIN_S = 60
ENDLESS = 1_000_000
RESPAWN_S = 20.0
"""Time from a kill to the start of another node, while goodput is measured."""


def main() -> None:
    """Run all cases, print a table and, as the last line, the figures as JSON."""
    options = parse_options()
    sides = ["graceful"] if options.no_peers else ["graceful", "stock"]
    with tempfile.TemporaryDirectory(prefix="ray_ds-bench-") as folder:
        write_synthetic_shards(Path(folder) / "shards")
        results = {side: measure(Path(folder) / side, side, options) for side in sides}
        if options.goodput_minutes:
            results["graceful"]["goodput"] = measure_goodput(Path(folder) / "goodput", options)
        if options.stall_minutes:
            results["graceful"] |= measure_stalls(Path(folder) / "stalls", options)
    print_table(results)
    inputs = {**vars(options), "cpus": os.cpu_count(), "ray": ray.__version__, "torch": torch.__version__}
    peers = {f"stock_{name}": value for name, value in results.get("stock", {}).items()}
    print(json.dumps({"name": "elastic", "inputs": inputs, "figures": results["graceful"], "peers": peers}))


def parse_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-peers", action="store_true", help="leave Ray Train's own scaling out")
    parser.add_argument("--steady-s", type=float, default=30.0, help="undisturbed training before each disturbance")
    parser.add_argument(
        "--goodput-minutes", type=float, default=30.0, help="train so long with a kill now and then; 0: not"
    )
    parser.add_argument("--kill-every-s", type=float, default=600.0, help="time between those kills")
    parser.add_argument("--stall-minutes", type=float, default=30.0, help="look so long for false deaths; 0: not")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_synthetic_shards(folder: Path) -> None:
    """Write tokens for more than an epoch of an hour, and a tokenizer file that nobody reads."""
    tokens = np.random.default_rng(0).zipf(1.2, 2_000_000) % VOCAB_SIZE
    (folder / "train").mkdir(parents=True)
    write_shard(str(folder / "train" / "0.arrow"), [tokens.astype(np.uint16)], ["synthetic"], np.uint16)
    (folder / "tokenizer.json").write_text("{}")


def make_task(folder: Path, side: str) -> TrainTask:
    """Return a run that does not end by itself."""
    ours = {"grow_pause_s": 10.0} if side == "graceful" else {"snapshot_every": 0}
    raw = {
        "model": {"preset": "tiny"},
        "seq_len": SEQ_LEN,
        "batch_tokens": BATCH_ROWS * SEQ_LEN,
        "micro_batch": MICRO_BATCH,
        "steps": ENDLESS,
        "precision": "fp32",
        "checkpoint_every": CHECKPOINT_EVERY,
        "log_every": 1,
        "num_workers": [1, 2],
        "scaling": side,
        "max_failures": 10,
        "device": "cpu",
        **ours,
    }
    settings = decode_settings(TrainSettings, raw, where="bench")
    return TrainTask(
        settings=settings,
        config=settings.model.resolve(VOCAB_SIZE, SEQ_LEN),
        shards=str(folder.parent / "shards"),
        checkpoints=str(folder / "work" / "checkpoints"),
        output=str(folder),
        bos_token_id=0,
        eos_token_id=1,
        device="cpu",
        job_started=time.time(),
    )


class Training:
    """Training in a thread, with the records it has given so far."""

    def __init__(self, folder: Path, side: str) -> None:
        self.records: list[Mapping[str, float]] = []
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(make_task(folder, side), folder))
        self._thread.start()

    def _run(self, task: TrainTask, folder: Path) -> None:
        work = str(folder / "work")
        try:
            train_on_ray(task, work=work, on_report=self.records.append, stop=self._stop)
        except TrainingStopped:
            return
        except BaseException as error:
            self._error = error

    def wait_for_workers(self, count: int) -> None:
        """Wait until `count` workers train."""

        def holds() -> bool:
            if not self._thread.is_alive():
                raise RuntimeError("training ended") from self._error
            return bool(self.records) and self.records[-1]["world_size"] == count

        wait_for(holds, f"{count} workers did not come to train")

    def end(self) -> None:
        """Stop training and wait for its end."""
        self._stop.set()
        self._thread.join()

    def first(self, begin: int, workers: int) -> int:
        """Return the index of the first record from `begin` on that so many workers made."""
        return next(i for i in range(begin, len(self.records)) if self.records[i]["world_size"] == workers)


def measure(folder: Path, side: str, options: argparse.Namespace) -> dict[str, float]:
    """Kill a node, let one join and one drain; return what each cost."""
    with start_nodes(2) as nodes:
        training = Training(folder, side)
        try:
            training.wait_for_workers(2)
            time.sleep(options.steady_s)
            killed = disturb_by_kill(training, nodes)
            time.sleep(options.steady_s)
            joined = disturb_by_join(training, nodes)
            time.sleep(options.steady_s)
            drained = disturb_by_drain(training, nodes)
        finally:
            training.end()
    return {**killed, **joined, **drained}


def disturb_by_kill(training: Training, nodes: Nodes) -> dict[str, float]:
    """Kill one of two nodes; return the time to the next step and to the first step that is new."""
    begin, killed_at = len(training.records), time.time()
    nodes.kill(nodes.alive()[-1])
    training.wait_for_workers(1)
    first = training.first(max(begin - 1, 0), 1)
    done = max(record["step"] for record in training.records[:first])
    wait_for(lambda: training.records[-1]["step"] > done, "training did not come further")
    new = next(record for record in training.records[first:] if record["step"] > done)
    return {
        "kill_to_step_s": training.records[first]["time"] - killed_at,
        "seconds_lost_kill": new["time"] - killed_at,
        "steps_lost_kill": done + 1 - training.records[first]["step"],
    }


def disturb_by_join(training: Training, nodes: Nodes) -> dict[str, float]:
    """Add a node; return the time from its registration to its first step, and the steps that ran again."""
    begin = len(training.records)
    nodes.add()
    wait_for(lambda: len(nodes.alive()) == 2, "the node did not join")
    joined_at = time.time()
    training.wait_for_workers(2)
    first = training.first(begin, 2)
    return {
        "join_to_used_s": training.records[first]["time"] - joined_at,
        "steps_lost_join": training.records[first - 1]["step"] + 1 - training.records[first]["step"],
    }


def disturb_by_drain(training: Training, nodes: Nodes) -> dict[str, float]:
    """Drain a node and kill it at its deadline; return the time to the next step and the steps that ran again."""
    begin, drained_at = len(training.records), time.time()
    leaving = nodes.alive()[-1]
    nodes.drain(leaving, DRAIN_S)
    timer = threading.Timer(DRAIN_S, nodes.kill, [leaving])
    timer.start()
    try:
        training.wait_for_workers(1)
    finally:
        timer.cancel()
    first = training.first(begin, 1)
    return {
        "drain_to_step_s": training.records[first]["time"] - drained_at,
        "steps_lost_drain": training.records[first - 1]["step"] + 1 - training.records[first]["step"],
    }


def measure_goodput(folder: Path, options: argparse.Namespace) -> float:
    """Train for a while, kill a node now and then and start another; return the run's own figure."""
    rng = random.Random(options.seed)
    with start_nodes(2) as nodes:
        training = Training(folder, "graceful")
        try:
            training.wait_for_workers(2)
            deadline = time.monotonic() + options.goodput_minutes * 60
            while time.monotonic() + options.kill_every_s < deadline:
                time.sleep(options.kill_every_s - RESPAWN_S)
                nodes.kill(rng.choice(nodes.alive()))
                time.sleep(RESPAWN_S)
                nodes.add()
            time.sleep(max(0.0, deadline - time.monotonic()))
        finally:
            training.end()
    return float(training.records[-1]["goodput"])


def measure_stalls(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train while all CPUs are busy and daemons stall; return the nodes declared dead and the restarts of training."""
    with start_nodes(2) as nodes:
        training = Training(folder, "graceful")
        try:
            training.wait_for_workers(2)
            false_deaths = count_false_deaths(nodes, options.stall_minutes, options.seed)
        finally:
            training.end()
    return {"false_deaths": false_deaths, "false_restarts": training.records[-1]["restarts"]}


def print_table(results: Mapping[str, Mapping[str, float]]) -> None:
    """Print the figures of each side."""
    names: Sequence[str] = list(dict.fromkeys(name for figures in results.values() for name in figures))
    print(f"{'':20}" + "".join(f"{side:>12}" for side in results))
    for name in names:
        cells: list[Any] = [figures.get(name) for figures in results.values()]
        print(f"{name:20}" + "".join(f"{'' if cell is None else f'{cell:.2f}':>12}" for cell in cells))


if __name__ == "__main__":
    main()
