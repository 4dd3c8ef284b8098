"""Time an INT8 layer beside the fp32 and bf16 layers it replaces, weights cache-warm.

ray job submit --working-dir . -- python -m jobs.bench.quantize --device cpu --threads 1
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ray_ds.quantize import Int8Linear, self_test
from ray_ds.quantize.kernels import Road
from ray_ds.quantize.scheme import quantize_weight

SHAPES = ((256, 1024), (2048, 5632))
"""(inputs, outputs) of a small and a large layer."""
TOKENS = (1, 4, 16, 64)
ROUNDS = 5
ROUND_S = 0.1


def microseconds(call: Callable[[], Tensor], device: str) -> float:
    """Return the best mean time of a call over some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        count = 0
        _wait(device)
        start = time.perf_counter()
        while time.perf_counter() - start < ROUND_S:
            for _ in range(10):
                call()
            count += 10
            _wait(device)
        best = min(best, (time.perf_counter() - start) / count)
    return best * 1e6


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Print a table in Markdown, in microseconds a call."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = self_test(options.device)
    roads: list[Road] = [found.road] if options.device == "cuda" else sorted({found.road, "onednn_two_pass"})
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads; self-test: {found.road}")
    print(
        " | ".join(["| layer | tokens | fp32 | bf16", *(f"{road}, fp32 in | {road}, bf16 in" for road in roads)]), "|"
    )
    print("|---" * (4 + 2 * len(roads)) + "|")
    with torch.inference_mode():
        for inputs, outputs in SHAPES:
            layer = nn.Linear(inputs, outputs, bias=False, device=options.device)
            weight = quantize_weight(layer.weight)
            wide, narrow = layer, nn.Linear(inputs, outputs, bias=False, device=options.device, dtype=torch.bfloat16)
            quantized = [Int8Linear(weight, road) for road in roads]
            for tokens in TOKENS:
                x = torch.randn(tokens, inputs, device=options.device)
                pairs = [(wide, x), (narrow, x.bfloat16())]
                pairs += [(module, value) for module in quantized for value in (x, x.bfloat16())]
                times = [microseconds(lambda m=module, v=value: m(v), options.device) for module, value in pairs]  # type: ignore[misc]
                print(f"| {inputs} -> {outputs} | {tokens} |", " | ".join(f"{t:.0f}" for t in times), "|", flush=True)


if __name__ == "__main__":
    main()
