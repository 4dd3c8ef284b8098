"""Time a quantized layer beside the fp32 and bf16 layers it replaces, weights cache-warm, and the parts it consists of.

ray job submit --working-dir . -- python -m jobs.bench.quantize --device cpu --threads 1
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ray_ds.quantize import QuantizedLinear, self_test
from ray_ds.quantize.kernels import Road
from ray_ds.quantize.scheme import quantize_weight

SHAPES = ((256, 1024), (2048, 5632))
"""(inputs, outputs) of a small and a large layer."""
TOKENS = (1, 4, 16, 64)
ROUNDS = 5
ROUND_S = 0.1


def microseconds(module: Callable[[Tensor], object], x: Tensor) -> float:
    """Return the best mean time of a call over some rounds: of processors' time on a CPU, of the clock on a GPU."""
    clock = time.perf_counter if x.is_cuda else time.process_time
    best = float("inf")
    for _ in range(ROUNDS):
        count = 0
        start = clock()
        while clock() - start < ROUND_S:
            for _ in range(10):
                module(x)
            count += 10
            if x.is_cuda:
                torch.cuda.synchronize()
        best = min(best, (clock() - start) / count)
    return best * 1e6


def time_layer(inputs: int, outputs: int, roads: list[Road], device: str) -> list[dict[str, float]]:
    """Return a row of microseconds by kind and part of layer for each number of tokens."""
    wide = nn.Linear(inputs, outputs, bias=False, device=device)
    narrow = nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16)
    quantized = {road: QuantizedLinear(quantize_weight(wide.weight), road) for road in roads}
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, inputs, device=device)
        row = {"inputs": inputs, "outputs": outputs, "tokens": tokens}
        times = {"fp32": microseconds(wide, x), "bf16": microseconds(narrow, x.bfloat16())}
        for road, module in quantized.items():
            values, scale = module.packed.quantize(x)
            times[road] = microseconds(module, x)
            times[f"{road}, bf16 in"] = microseconds(module, x.bfloat16())
            times[f"{road}, tokens to integers"] = microseconds(module.packed.quantize, x)
            times[f"{road}, product"] = microseconds(partial(module.packed.multiply, token_scale=scale), values)
        rows.append({**row, **{name: round(value, 1) for name, value in times.items()}})
    return rows


def main() -> None:
    """Print a table in Markdown, in microseconds a call, and the same as JSON."""
    parser = argparse.ArgumentParser(description="Time INT8 layers.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    road = self_test(options.device).road
    roads: list[Road] = [road] if options.device == "cuda" else list(dict.fromkeys((road, "onednn_two_pass")))
    with torch.inference_mode():
        rows = [row for shape in SHAPES for row in time_layer(*shape, roads, options.device)]
    print(f"| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
    for row in rows:
        print(f"| {' | '.join(f'{value:g}' for value in row.values())} |")
    print(json.dumps({"torch": torch.__version__, "road": road, "threads": options.threads, "microseconds": rows}))


if __name__ == "__main__":
    main()
