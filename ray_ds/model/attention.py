"""Softmax attention in its plain and its fast forms, for heads of any width."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ray_ds.config.model import Kernels
from ray_ds.model.kernels import is_fast

Mask = Tensor | BlockMask | None
"""What a query may look at: (B, 1, T, S), True where it may; the same for FlexAttention; None = all up to itself."""

Attend = Callable[[Tensor, Tensor, Tensor, float, Mask, Kernels], Tensor]
"""What `attend` is, or does it together with other processes."""

MAX_PLAIN_TOKENS = 512
"""Row length up to which three plain steps beat the fused kernel on a CPU: 2 x faster with 256 tokens, forward and
backward, equal at 1,024; above, the T x T scores would also take too much memory."""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Mask = None, kernels: Kernels = "auto") -> Tensor:
    """Return what each of T positions gathers from those it may look at, (B, H, T, v_head_dim).

    Args:
        q: (B, H, T, qk_head_dim).
        k: (B, G, S, qk_head_dim), where G divides H: neighbouring query heads share keys and values.
        v: (B, G, S, v_head_dim).
    """
    if isinstance(mask, BlockMask):
        shares = q.shape[1] != k.shape[1]
        has_kernel = q.is_cuda and not torch.compiler.is_compiling()
        flex: Any = _compiled_flex() if has_kernel else flex_attention
        out: Tensor = flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=shares)
        return out
    k, v = _share_heads(k, q.shape[1]), _share_heads(v, q.shape[1])
    is_short = q.shape[-2] == k.shape[-2] <= MAX_PLAIN_TOKENS
    if is_fast(kernels, q, on_cpu=not is_short):
        return _attend_fused(q, k, v, scale, mask)
    return _attend_plainly(q, k, v, scale, mask)


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attend in the steps of the definition."""
    scores = (q * scale) @ k.transpose(-1, -2)  # (B, H, T, S)
    if mask is None:
        scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    else:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attend in torch's fused kernels.

    They want values as wide as keys; zeros in keys add nothing to scores, those in values are cut off.
    """
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    value_dim = v.shape[-1]
    width = max(q.shape[-1], value_dim)
    q, k, v = (F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in (q, k, v))  # (B, H, T, width)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :value_dim]


def _share_heads(x: Tensor, num_heads: int) -> Tensor:
    """Return keys or values (B, G, S, D) for each of the query heads, (B, H, S, D)."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    """Return FlexAttention as a kernel: without compilation it writes out all scores."""
    return torch.compile(flex_attention)
