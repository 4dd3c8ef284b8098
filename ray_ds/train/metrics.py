"""What is measured each step: kept as JSON lines, drawn as a curve."""

import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import torch

Record = Mapping[str, float | int | bool]
"""A step's figures: `step` (from 1), `tokens`, `loss`, `lr` (of the first group), `grad_norm`, `seconds`,
`tokens_per_s`; where they apply `mfu`, `max_violation`, `loss_scale`, `is_skipped`, `validation_loss`."""

PEAK_FLOPS: Mapping[str, float] = {"H100": 989.4e12, "H200": 989.4e12, "GH200": 989.4e12, "A100": 312e12}
"""Dense bf16 and fp16 peak by a word in the GPU's name, of the SXM forms, from NVIDIA's data sheets."""


class MetricsLog:
    """The records of a run from its first step on, also while training resumed in between.

    They are held in memory and go into every checkpoint; a local file, where there is one, shows them as they come.
    """

    def __init__(self, records: Sequence[Record], live_file: Path | None) -> None:
        """Start with the records of a checkpoint; the file's later ones, of steps that will run again, are cut off."""
        self.records: list[Record] = list(records)
        self._live: IO[str] | None = None
        if live_file is not None:
            live_file.parent.mkdir(parents=True, exist_ok=True)
            live_file.write_text(encode(self.records))
            self._live = live_file.open("a", buffering=1)

    def append(self, record: Record) -> None:
        """Add a step's record."""
        self.records.append(record)
        if self._live is not None:
            self._live.write(encode([record]))

    def close(self) -> None:
        """Close the local file."""
        if self._live is not None:
            self._live.close()


def encode(records: Sequence[Record]) -> str:
    """Return records as JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def decode(text: str) -> list[Record]:
    """Return the records of JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return what one worker's device could do a second, or None where that is unknown.

    On a GPU it is a data sheet's value, on a CPU what a matrix product reaches.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peak for word, peak in PEAK_FLOPS.items() if word in name.replace("-", " ").split()]
        return known[0] if known and dtype != torch.float32 else None
    return _measured_peak(dtype)


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
    """Return a PNG of loss and learning rate over tokens."""
    from matplotlib.figure import Figure  # slow to import, and only the end of a run needs it

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    tokens = [record["tokens"] for record in records]
    upper.plot(tokens, [record["loss"] for record in records], linewidth=1, label="training")
    looks = [record for record in records if "validation_loss" in record]
    if looks:
        x, y = [look["tokens"] for look in looks], [look["validation_loss"] for look in looks]
        upper.plot(x, y, marker="o", markersize=3, label="validation")
    upper.set_ylabel("loss, nats a token")
    upper.legend()
    upper.grid(alpha=0.3)
    lower.plot(tokens, [record["lr"] for record in records], linewidth=1)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("tokens")
    lower.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
