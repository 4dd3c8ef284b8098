"""Where experts' products in FP8 become faster than in bf16; `ray_ds.model.fp8.experts` says what to expect."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.bench.evidence.case import Finding, Setting
from ray_ds.model.fp8.experts import MIN_WIDTH, grouped_product

SHAPES = ((1024, 512), (2048, 1408), (4096, 1536), (7168, 2048))
"""Widths of a model and of its experts, up to DeepSeek-V3's."""
ROWS, NUM_EXPERTS = 1 << 17, 16
ROUNDS = 20
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(setting: Setting) -> Finding:
    """Time the smaller of an expert's two products with both gradients, compiled, by each shape."""
    figures, claims = {}, {}
    for width, inner in ((64, 32),) if setting.is_small else SHAPES:
        rows = 256 if setting.is_small else ROWS
        x = torch.randn(rows, inner, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(NUM_EXPERTS, width, inner, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
        ends = torch.arange(1, NUM_EXPERTS + 1, device=setting.device, dtype=torch.int32) * (rows // NUM_EXPERTS)
        bf16, fp8 = (milliseconds(product, x, weight, ends) for product in (plain_product, grouped_product))
        measure = width * inner / (width + inner)
        print(f"expert_products {width} x {inner}: {bf16:.3f} ms in bf16, {fp8:.3f} ms in FP8", flush=True)
        figures[f"{width}x{inner}"] = {"bf16_ms": bf16, "fp8_ms": fp8, "width": measure}
        claims[f"{width} x {inner}: FP8 is the faster one where MIN_WIDTH says so"] = (fp8 < bf16) is (
            measure >= MIN_WIDTH
        )
    return Finding(figures={**figures, "min_width": MIN_WIDTH}, claims=claims)


def plain_product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return what `grouped_product` does, in bf16."""
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)


def milliseconds(product: Product, rows: Tensor, weights: Tensor, ends: Tensor) -> float:
    """Return the median time of a product with both gradients."""
    run = torch.compile(product) if rows.is_cuda else product
    grad = torch.randn_like(product(rows, weights, ends).detach())
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        torch.autograd.grad(run(rows, weights, ends), (rows, weights), grad)
        if rows.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[ROUNDS // 4 :])
