"""INT8 products on CUDA in Triton: for few rows, and for experts, whose rows differ in number from step to step.

One kernel does both: a tile of rows belongs to one weight of a stack, and a plain layer is a stack of one. The sums are
exact integers, rounded to fp32 once and scaled in the order of `scheme.py`, so the bits are those of the reference.
The table of tiles is made on the device and has one size for a number of rows: nothing waits for the host, and a CUDA
graph can hold it all. Imported only where there is a GPU: PyTorch for CPUs comes without Triton.
"""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ray_ds.quantize.scheme import INT8_MAX, ROUNDER, SMALLEST_MAXIMUM

triton: Any = import_module("triton")
tl: Any = import_module("triton.language")

FEW_ROWS = 16
"""Rows of a tile where a weight has about as many or fewer; the tensor cores' least."""
MANY_ROWS = 64
BLOCK_OUTPUTS = 32
BLOCK_INPUTS = 128


class Tiles(NamedTuple):
    """For every tile: its weight, and the rows that it has, from `start` to before `stop`; (tiles,) int64 each.

    Those left over are empty: `stop` is at most `start`.
    """

    weight: Tensor
    start: Tensor
    stop: Tensor


def plan_tiles(ends: Tensor, num_rows: int, block_rows: int) -> Tiles:
    """Return tiles of `block_rows` rows at most that cover all rows of all weights.

    Args:
        ends: (E,) int64, where each weight's rows end; they lie behind each other.
    """
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    counts = (ends - starts + block_rows - 1) // block_rows  # (E,)
    last = counts.cumsum(0)
    numbers = torch.arange(-(-num_rows // block_rows) + len(ends), device=ends.device)
    weight = torch.searchsorted(last, numbers, right=True).clamp_(max=len(ends) - 1)
    start = starts[weight] + (numbers - (last - counts)[weight]) * block_rows
    return Tiles(weight=weight, start=start, stop=torch.minimum(start + block_rows, ends[weight]))


def multiply_stack(x: Tensor, token_scale: Tensor, weights: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
    """Return the product of each weight of a stack with its rows: fp32 (M, N).

    Args:
        x: int8 (M, K), the rows of each weight behind each other.
        token_scale: fp32 (M, 1).
        weights: int8 (E, N, K).
        scales: fp32 (E, N).
        ends: (E,) int64, where each weight's rows end.
    """
    num_rows, num_inputs = x.shape
    num_weights, num_outputs, _ = weights.shape
    out = torch.empty((num_rows, num_outputs), dtype=torch.float32, device=x.device)
    if num_rows:
        block_rows = FEW_ROWS if num_rows <= FEW_ROWS * num_weights else MANY_ROWS
        tiles = plan_tiles(ends, num_rows, block_rows)
        grid = (len(tiles.weight), -(-num_outputs // BLOCK_OUTPUTS))
        _multiply_kernel[grid](
            x.contiguous(),
            token_scale.contiguous(),
            weights,
            scales,
            out,
            *tiles,
            num_outputs,
            num_inputs,
            BLOCK_M=block_rows,
            BLOCK_N=BLOCK_OUTPUTS,
            BLOCK_K=BLOCK_INPUTS,
        )
    return out


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `scheme.quantize_tokens` does, bit for bit, in one kernel: int8 (M, K), fp32 (M, 1)."""
    num_rows, width = x.shape
    values = torch.empty((num_rows, width), dtype=torch.int8, device=x.device)
    scale = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(width)
        _quantize_kernel[(num_rows,)](
            x.contiguous(),
            values,
            scale,
            width,
            SMALLEST=SMALLEST_MAXIMUM,
            INVERSE=1 / INT8_MAX,
            ROUND=ROUNDER,
            BLOCK=block,
        )
    return values, scale


def _multiply(
    x_ptr: Any,
    token_scale_ptr: Any,
    weight_ptr: Any,
    scale_ptr: Any,
    out_ptr: Any,
    tile_weight_ptr: Any,
    tile_start_ptr: Any,
    tile_stop_ptr: Any,
    num_outputs: Any,
    num_inputs: Any,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Fill one tile of rows and outputs."""
    tile = tl.program_id(0)
    weight = tl.load(tile_weight_ptr + tile)
    start = tl.load(tile_start_ptr + tile)
    stop = tl.load(tile_stop_ptr + tile)
    if start < stop:
        rows = start + tl.arange(0, BLOCK_M)
        outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inputs = tl.arange(0, BLOCK_K)
        has_row = rows < stop
        has_output = outputs < num_outputs
        weight_rows = weight * num_outputs + outputs  # int64, as tiles are
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for first in range(0, num_inputs, BLOCK_K):
            k = first + inputs
            has_input = k < num_inputs
            x_at = x_ptr + rows[:, None] * num_inputs + k[None, :]
            x = tl.load(x_at, mask=has_row[:, None] & has_input[None, :], other=0)
            w_at = weight_ptr + weight_rows[None, :] * num_inputs + k[:, None]
            w = tl.load(w_at, mask=has_output[None, :] & has_input[:, None], other=0)
            sums = tl.dot(x, w, acc=sums, out_dtype=tl.int32)
        scales = tl.load(scale_ptr + weight_rows, mask=has_output, other=0.0)
        token_scales = tl.load(token_scale_ptr + rows, mask=has_row, other=0.0)
        product = sums.to(tl.float32) * scales[None, :] * token_scales[:, None]
        out_at = out_ptr + rows[:, None] * num_outputs + outputs[None, :]
        tl.store(out_at, product, mask=has_row[:, None] & has_output[None, :])


def _quantize(
    x_ptr: Any,
    values_ptr: Any,
    scale_ptr: Any,
    width: Any,
    SMALLEST: tl.constexpr,
    INVERSE: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Quantize one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), SMALLEST) * INVERSE
    has_nan = tl.max((x != x).to(tl.int32), axis=0) > 0  # a maximum may leave them out
    scale = tl.where(has_nan, float("nan"), scale)
    rounded = tl.div_rn(x, tl.broadcast_to(scale, (BLOCK,))) + ROUND
    tl.store(values_ptr + row * width + columns, rounded.to(tl.int32, bitcast=True).to(tl.int8), mask=is_inside)
    tl.store(scale_ptr + row, scale)


_multiply_kernel = triton.jit(_multiply)
_quantize_kernel = triton.jit(_quantize)
