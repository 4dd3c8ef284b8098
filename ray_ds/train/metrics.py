"""What is measured each step: kept as JSON lines, summed up and drawn at the end."""

import io
import json
import resource
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ray_ds.logs import log_event
from ray_ds.model.balance import max_violation

Record = Mapping[str, float | int | bool]
"""A step's figures, by the names in `FIELDS`."""

FIELDS: Mapping[str, str] = {
    "step": "Optimizer steps done",
    "tokens": "Tokens trained on",
    "loss": "Training loss of the step; with next_token nats a target",
    "validation_loss": "The same loss on the validation split",
    "terms": "What the loss is a mean over: targets of chat rows, or pairs of answers",
    "reward_margin": "DPO: how much higher the better answer's reward is, on average",
    "reward_accuracy": "DPO: share of the pairs whose better answer has the higher reward",
    "reward_chosen": "DPO: mean reward of the better answers",
    "reward_rejected": "DPO: mean reward of the worse answers",
    "kl": "Distillation: KL(teacher || student) at the temperature, nats a target",
    "cross_entropy": "Distillation: cross-entropy of the next token, nats a target",
    "prediction_loss": "Loss of multi-token prediction, nats a token, the mean of its modules; not part of `loss`",
    "balance_loss": "Sequence-wise imbalance of the experts, summed over layers, each at 1 where even",
    "lr": "Learning rate of the first group",
    "grad_norm": "Norm of the gradient before clipping",
    "seconds": "Duration of the step",
    "tokens_per_s": "Tokens a second in the step, of all workers together",
    "mfu": "Part of the devices' peak that the model's own work was; a log line says where that is unknown",
    "goodput": "Part of the run's time spent on steps that count",
    "elapsed_s": "Seconds since the first step began, but for those without a job",
    "lost_s": "Seconds lost to restarts: waiting, starting, steps that run again",
    "restarts": "Times that the group of workers was started anew",
    "world_size": "Workers that train",
    "max_violation": "How far the busiest expert of the worst layer lies above the mean, as a part of the mean",
    "max_load": "Tokens of the busiest expert of any layer, as a multiple of the layer's mean",
    "min_load": "Tokens of the idlest expert of any layer, as a multiple of the layer's mean",
    "memory_bytes": "Peak memory of the worker with the most: the GPU's that torch took, or resident memory on a CPU",
    "checkpoint_s": "Seconds that training stood still for the last checkpoint",
    "snapshot_s": "Seconds that training stood still for the last snapshot",
    "loss_scale": "What fp16 multiplies the loss by",
    "is_skipped": "Whether the step left the weights as they were",
    "time": "When the step ended, Unix seconds",
}
"""What the figures are. Every record has those that apply: `mfu` where the peak is known, `max_violation`, `max_load`
and `min_load` with experts, `loss_scale` with fp16, the rest where the thing happened in or since the step before."""

SHOWN = (
    "loss",
    "validation_loss",
    "tokens_per_s",
    "mfu",
    "goodput",
    "world_size",
    "restarts",
    "lr",
    "grad_norm",
    "max_violation",
    "loss_scale",
)
"""Figures of a progress line, what matters most first."""
LOSS_STEPS = 50
"""Steps whose mean is called the training loss at the end."""

PEAK_TFLOPS: Mapping[str, float] = {
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "GB200": 2500.0,
    "A100": 312.0,
    "A10": 125.0,
    "L4": 121.0,
    "L40": 181.05,
    "L40S": 362.05,
    "RTX 4090": 165.2,
}
"""Dense bf16 and fp16 products with fp32 sums by words of the GPU's name, from NVIDIA's data sheets, which give twice
that where they count sparsity; of several names that fit the first counts. H100, H200, B200 alone are the SXM forms."""
OTHER_FORMS = frozenset({"D", "Laptop", "MIG"})
"""Words that make of a GPU's name one that does less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a step computes, and on what: the same at every step of an attempt."""

    batch_tokens: int
    flops_per_token: float
    world_size: int
    peak_flops: float | None
    """Of one worker's device; None where it is unknown."""

    def figures(self, step: int, seconds: float) -> dict[str, float | int]:
        """Return what follows from a step (from 1) having taken so long."""
        rate = self.batch_tokens / seconds
        figures = {
            "step": step,
            "tokens": step * self.batch_tokens,
            "seconds": seconds,
            "tokens_per_s": rate,
            "world_size": self.world_size,
        }
        if self.peak_flops is not None:
            figures["mfu"] = rate * self.flops_per_token / (self.peak_flops * self.world_size)
        return figures


class MetricsLog:
    """The records of a run from its first step on, also while training resumed in between.

    They are held in memory and go into every checkpoint; a local file, where there is one, shows them as they come.
    """

    def __init__(self, records: Sequence[Record], live_file: Path | None) -> None:
        """Start with the records of a checkpoint; the file's later ones, of steps that will run again, are cut off."""
        self.records: list[Record] = list(records)
        self.last_sign: float | None = None
        """`time` of the file's last record as it was found: when an earlier process was seen last."""
        self._live: IO[str] | None = None
        if live_file is not None:
            self.last_sign = _last_time(live_file)
            with self._storage_may_fail():
                live_file.parent.mkdir(parents=True, exist_ok=True)
                self._live = live_file.open("w+", buffering=1)
                self._live.write(encode(self.records))

    def append(self, record: Record) -> None:
        """Add a step's record."""
        self.records.append(record)
        with self._storage_may_fail():
            if self._live is not None:
                self._live.write(encode([record]))

    def go_back(self, step: int) -> None:
        """Drop the records of steps after `step`, which will run again."""
        del self.records[step:]
        with self._storage_may_fail():
            if self._live is not None:
                self._live.seek(0)
                self._live.truncate()
                self._live.write(encode(self.records))

    def close(self) -> None:
        """Close the local file."""
        live, self._live = self._live, None
        if live is not None:
            with suppress(OSError):  # what it could not write before it tries once more
                live.close()

    @contextmanager
    def _storage_may_fail(self) -> Iterator[None]:
        """Let go of the local file where it cannot be written: it shows the records, and the checkpoints keep them."""
        try:
            yield
        except OSError as error:
            log_event("metrics_not_shown", reason=str(error))
            self.close()


def _last_time(file: Path) -> float | None:
    """Return `time` of the last whole record in a file, whose last line may be torn."""
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    for line in reversed(lines[-2:]):
        try:
            return float(json.loads(line)["time"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def encode(records: Sequence[Record]) -> str:
    """Return records as JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def decode(text: str) -> list[Record]:
    """Return the records of JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


def load_figures(load: Tensor) -> dict[str, float]:
    """Return `max_violation`, `max_load` and `min_load` of one step's tokens by expert, (MoE layers, E)."""
    if not load.numel():
        return {}
    relative = load.double() / load.double().mean(dim=-1, keepdim=True)
    return {
        "max_violation": float(max_violation(load).max()),
        "max_load": float(relative.max()),
        "min_load": float(relative.min()),
    }


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has had: tensors on a GPU, or resident memory where a CPU computes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def summarise(records: Sequence[Record], *, model_step: int) -> dict[str, Any]:
    """Return what a run comes to: means and medians of its steps, its last look at validation, its whole account.

    Args:
        model_step: the step whose model the run leaves; later looks at validation were at other ones.
    """
    last = records[-1]
    looks = [record["validation_loss"] for record in records[:model_step] if "validation_loss" in record]
    has_mfu = "mfu" in last
    return {
        "step": int(last["step"]),
        "model_step": model_step,
        "tokens": int(last["tokens"]),
        "train_loss": statistics.fmean(record["loss"] for record in records[-LOSS_STEPS:]),
        "validation_loss": looks[-1] if looks else None,
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in records),
        "mfu": statistics.median(record["mfu"] for record in records if "mfu" in record) if has_mfu else None,
        "goodput": last["goodput"],
        "lost_s": last["lost_s"],
        "restarts": int(last["restarts"]),
    }


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return what one worker's device could do a second, or None where that is unknown, which is logged.

    On a GPU it is a data sheet's value, on a CPU what a matrix product reaches.
    """
    if device.type != "cuda":
        return _measured_peak(dtype)
    name = torch.cuda.get_device_name(device)
    peak = _published_peak(name) if dtype != torch.float32 else None
    if peak is None:
        log_event("peak_unknown", device=name, dtype=str(dtype).removeprefix("torch."), reason="so there is no mfu")
    return peak


def _published_peak(name: str) -> float | None:
    """Return the peak of a GPU by the name that its driver gives, such as `NVIDIA A100-SXM4-80GB`."""
    words = set(name.replace("-", " ").split())
    if words & OTHER_FORMS:
        return None
    return next((tflops * 1e12 for kind, tflops in PEAK_TFLOPS.items() if words.issuperset(kind.split())), None)


def _measured_peak(dtype: torch.dtype, size: int = 768, repeats: int = 5) -> float:
    """Return the best of some matrix products, with the threads that training has."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def draw_curve(records: Sequence[Record]) -> bytes:
    """Return a PNG of loss and learning rate over tokens; thin lines are restarts, stairs the number of workers."""
    from matplotlib.figure import Figure  # slow to import, and only the end of a run needs it

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    has_workers = any("world_size" in record for record in records)
    heights = (6, 2, 1.5) if has_workers else (6, 2)
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    upper, middle, lowest = axes[0], axes[1], axes[-1]
    tokens = [record["tokens"] for record in records]
    upper.plot(tokens, [record["loss"] for record in records], linewidth=1, label="training")
    looks = [record for record in records if "validation_loss" in record]
    if looks:
        x, y = [look["tokens"] for look in looks], [look["validation_loss"] for look in looks]
        upper.plot(x, y, marker="o", markersize=3, label="validation")
    _draw_restarts(upper, records)
    upper.set_ylabel("loss, nats a token")
    upper.legend()
    middle.plot(tokens, [record["lr"] for record in records], linewidth=1)
    middle.set_ylabel("learning rate")
    if has_workers:
        workers = [record.get("world_size", float("nan")) for record in records]
        lowest.step(tokens, workers, where="pre", linewidth=1)
        lowest.set_ylabel("workers")
        lowest.set_ylim(0, max(workers) + 1)
        lowest.yaxis.get_major_locator().set_params(integer=True)
    lowest.set_xlabel("tokens")
    for part in axes:
        part.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def restart_tokens(records: Sequence[Record]) -> list[float]:
    """Return the tokens trained on at each restart after which the run went on from a kept step."""
    return [a["tokens"] for a, b in pairwise(records) if b.get("restarts", 0) > a.get("restarts", 0)]


def _draw_restarts(axes: Any, records: Sequence[Record]) -> None:
    for number, tokens in enumerate(restart_tokens(records)):
        axes.axvline(tokens, color="grey", linewidth=0.5, label=None if number else "restart")
