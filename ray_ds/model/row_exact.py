"""Attention in which a row's bits depend on that row alone: not on how many rows there are, nor on padding.

A float product may add in another order when the number of its rows changes, and a softmax when its keys are padded
further. Here every float product is of one fixed size, whatever the batch, and sums over keys go tile by tile in the
order of positions: a tile that a row does not look at adds exact zeros. `row_tiles.py` does the same for layers. Sums
of integers need no such care (`quantize.scheme`), and what else a decoder does is done to each row by itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 8
"""Rows of a float product: enough for a fast kernel, few enough for a batch of one."""
KEY_TILE = 64
"""Keys whose scores are summed at once."""


def multiply_heads(x: Tensor, weight: Tensor) -> Tensor:
    """Return each head's vectors (B, T, H, N) times its own matrix, from (H, N, M): (B, T, H, M)."""
    flat = x.flatten(0, 1)  # (B * T, H, N)
    padded = F.pad(flat, (0, 0, 0, 0, 0, -len(flat) % ROWS))
    parts = [torch.bmm(tile.transpose(0, 1), weight).transpose(0, 1) for tile in torch.split(padded, ROWS)]
    return torch.cat(parts)[: len(flat)].view(*x.shape[:-1], -1)


def attend_by_tiles(q: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Return what each query gathers, (B, T, G, M, V): softmax attention with a fixed order of sums.

    Args:
        q: (B, T, G, M, W), M queries that share keys; B or T is 1.
        keys: (B, G, S, W), S a multiple of `KEY_TILE`.
        values: (B, G, S, V).
        mask: (B, 1, T, S), True where a token may look.
    """
    rows, length, groups = q.shape[:3]
    assert 1 in (rows, length), "several tokens of several sequences"
    items = rows * length
    q = (q * scale).flatten(0, 1)  # (I, G, M, W)
    own_mask = mask[:, 0].flatten(0, 1)[:, None]  # (I, 1, S)
    outs = [
        _attend(q[:, g], keys[:, g].expand(items, -1, -1), values[:, g].expand(items, -1, -1), own_mask)
        for g in range(groups)
    ]
    return torch.stack(outs, dim=1).view(rows, length, groups, *outs[0].shape[1:])


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return what the queries (I, M, W) gather from keys (I, S, W) and values (I, S, V): (I, M, V).

    All products are of (M, W) with (W, tile) and of (M, tile) with (tile, V). Sums run over a tile, then over tiles
    from the first position on.
    """
    scores = torch.cat([torch.bmm(q, tile.mT) for tile in torch.split(keys, KEY_TILE, dim=1)], dim=-1).float()
    scores.masked_fill_(~mask, float("-inf"))  # (I, M, S)
    weights = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
    # A cumulative sum adds one number after the other, however many follow.
    totals = torch.unflatten(weights, -1, (-1, KEY_TILE)).sum(dim=-1).cumsum(dim=-1)[..., -1:]  # (I, M, 1)
    parts = torch.split(weights.to(q.dtype), KEY_TILE, dim=-1)
    tiles = torch.split(values, KEY_TILE, dim=1)
    out = torch.bmm(parts[0], tiles[0])
    for part, tile in zip(parts[1:], tiles[1:], strict=True):
        out = torch.baddbmm(out, part, tile)
    return (out / totals).to(q.dtype)
