"""DeepSeekMoE (arXiv 2401.06066): routed experts for some tokens beside shared experts for all."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from ray_ds.config.model import Kernels, ModelConfig
from ray_ds.model.kernels import is_fast
from ray_ds.model.layers import MLP
from ray_ds.model.router import Gate, sequence_balance


class _Permute(torch.autograd.Function):
    """Takes rows in another order, each row `copies` times.

    Written out because the gradient of plain indexing adds rows one by one, which is slow on a CPU and comes in no
    fixed order on a GPU; here it is a gather and a sum.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        """Return (len(order), D): row i is a copy of `x[order[i] // copies]`."""
        ctx.save_for_backward(inverse)
        ctx.copies = copies  # type: ignore[attr-defined]
        return x[order // copies]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the sum of each row's copies' gradients."""
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        copies = torch.unflatten(grad[inverse], 0, (-1, ctx.copies))  # type: ignore[attr-defined]
        return copies.sum(dim=1), None, None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
    """Return what `_Permute` does."""
    rows: Tensor = _Permute.apply(x, order, inverse, copies)  # type: ignore[no-untyped-call]
    return rows


class Layout(NamedTuple):
    """Where the rows of a layer's M choices lie: those of an expert behind each other, expert 0's first."""

    order: Tensor
    """(M,): which of the N * K choices each row is for."""
    inverse: Tensor
    """(N * K,): the row of each choice."""
    ends: Tensor
    """(E,): where each expert's rows end."""


def lay_out(chosen: Tensor, num_experts: int) -> Layout:
    """Return where the rows of tokens lie that chose experts (N, K)."""
    by_expert, order = chosen.flatten().sort(stable=True)  # (N * K,) each
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    numbers = torch.arange(num_experts, device=chosen.device)
    return Layout(order=order, inverse=inverse, ends=torch.searchsorted(by_expert, numbers, right=True))


Elsewhere = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]
"""What has rows computed where their experts are, given how they are computed here, the rows and their ends."""


class Experts(nn.Module):
    """The routed experts of a layer: gated MLPs, stacked, so that one that gets no token still gets a gradient."""

    def __init__(self, config: ModelConfig, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.kernels = kernels
        self.num_experts = config.n_routed_experts
        self.elsewhere: Elsewhere | None = None
        num_experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, (N, D).

        Args:
            x: (N, D).
            weights: (N, K), any float type.
            chosen: (N, K), numbers of experts.
        """
        layout = lay_out(chosen, self.num_experts)
        rows = permute(x, layout.order, layout.inverse, chosen.shape[1])  # (N * K, D)
        # The grouped product takes other types than bf16 too, but waits for the device then.
        has_kernel = self.kernels == "fast" or rows.dtype == torch.bfloat16
        run = self._run_grouped if has_kernel and is_fast(self.kernels, rows) else self._run
        made = run(rows, layout.ends) if self.elsewhere is None else self.elsewhere(run, rows, layout.ends)
        return self.combine(made, weights, layout).to(x.dtype)

    def combine(self, rows: Tensor, weights: Tensor, layout: Layout) -> Tensor:
        """Return the weighted sum of each token's rows, (N, D), from all rows as they are laid out."""
        parts = permute(rows, layout.inverse, layout.order, 1)  # (N * K, D)
        weighted: Tensor = torch.unflatten(parts, 0, weights.shape) * weights[..., None]  # (N, K, D)
        return weighted.sum(dim=1)  # (N, D)

    def _run(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return each expert's output for its slice of `rows` (N * K, D), one expert after the other."""
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        outs = []
        parts = torch.split(rows, sizes)
        for part, w_in, w_out in zip(parts, self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True):
            if len(part) or not len(rows):  # without any row, the weights still get a gradient
                gate, up = F.linear(part, w_in).chunk(2, dim=-1)
                outs.append(F.linear(F.silu(gate) * up, w_out))
        return torch.cat(outs)

    def _run_grouped(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return the same in two kernels and without waiting for the sizes."""
        offsets = ends.int()
        gate, up = F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=offsets)


class MoE(nn.Module):
    """Routed experts and shared ones."""

    def __init__(self, config: ModelConfig, kernels: Kernels = "auto", *, measures_balance: bool = False) -> None:
        super().__init__()
        self.measures_balance = measures_balance
        self.balance_of: Callable[[Tensor, Tensor], Tensor] = sequence_balance
        self.gate = Gate(config)
        self.experts = Experts(config, kernels)
        shared_size = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared_size) if shared_size else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the output for each vector of `x` (B, T, D), tokens by expert, (E,) int64, and rows' balance, (B,)."""
        tokens = x.flatten(0, 1)  # (B * T, D)
        weights, chosen, scores = self.gate(tokens)
        out = self.experts(tokens, weights, chosen).view_as(x)  # (B, T, D)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        # Made anew and not from the gate's counter, which changes before a compiled layer may be run again.
        load = chosen.new_zeros(len(self.gate.weight))
        load.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        return out, load, self._balance(scores, chosen, len(x)) if self.measures_balance and self.training else None

    def _balance(self, scores: Tensor, chosen: Tensor, rows: int) -> Tensor:
        """Return each row's `sequence_balance`; V3 counts what the scores alone would pick, V2 what was chosen."""
        has_bias = self.gate.e_score_correction_bias is not None
        picked = scores.topk(chosen.shape[1], dim=-1, sorted=False).indices if has_bias else chosen  # (B * T, K)
        return self.balance_of(*(torch.unflatten(tensor, 0, (rows, -1)) for tensor in (scores, picked)))
