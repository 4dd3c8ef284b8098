"""A decoder's float layers on tiles of rows, so that a row's bits do not depend on how many rows there are."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_ds.model.decoder import Decoder
from ray_ds.model.experts import Elsewhere, Experts
from ray_ds.model.router import Gate
from ray_ds.model.row_exact import ROWS

GATE_ROWS = 32
"""Rows the router is called with. A multiple of 32, so that no number is left over for the scalar end of a vector
loop, whose exponential differs in the last bit."""


def use_row_tiles(decoder: Decoder) -> None:
    """Have a decoder's routers, float layers and float experts work on tiles of rows from now on; for inference."""
    for module in decoder.modules():
        if isinstance(module, Gate):
            module.forward = in_tiles(module.forward, GATE_ROWS)  # type: ignore[method-assign, assignment]
        elif isinstance(module, nn.Linear):
            module.forward = in_tiles(module.forward, ROWS)  # type: ignore[method-assign, assignment]
        elif isinstance(module, Experts):
            module.elsewhere = _tiled_experts(module)


def in_tiles(run: Callable[[Tensor], Any], rows: int) -> Callable[[Tensor], Any]:
    """Return `run`, which maps (N, K) to a tensor or a tuple of them, so that it always sees `rows` rows at once."""

    def run_in_tiles(x: Tensor) -> Any:
        flat = x.reshape(-1, x.shape[-1])  # (N, K)
        padded = F.pad(flat, (0, 0, 0, -len(flat) % rows))
        parts = [run(tile) for tile in torch.split(padded, rows)]
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(column)[: len(flat)] for column in zip(*parts, strict=True))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out[: len(flat)].view(*x.shape[:-1], -1)

    return run_in_tiles


def _tiled_experts(experts: Experts) -> Elsewhere:
    """Return what computes float experts tile by tile, as `Experts.elsewhere`."""

    def run(_: Callable[[Tensor, Tensor], Tensor], rows: Tensor, ends: Tensor) -> Tensor:
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        weights = zip(torch.split(rows, sizes), experts.gate_up_proj, experts.down_proj, strict=True)
        return torch.cat([in_tiles(_gated_mlp(*own), ROWS)(part) for part, *own in weights if len(part)])

    return run


def _gated_mlp(w_in: Tensor, w_out: Tensor) -> Callable[[Tensor], Tensor]:
    """Return an expert, which maps (M, D) to (M, D)."""

    def run(x: Tensor) -> Tensor:
        gate, up = F.linear(x, w_in).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, w_out)

    return run
