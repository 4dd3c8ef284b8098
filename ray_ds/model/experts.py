"""DeepSeekMoE (arXiv 2401.06066), its experts kept equally busy without an auxiliary loss (arXiv 2408.15664)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from ray_ds.config.model import ModelConfig
from ray_ds.model.layers import MLP


class Gate(nn.Module):
    """Chooses each token's experts by sigmoid scores plus a bias that is moved, not trained."""

    e_score_correction_bias: Tensor
    expert_load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.n_group = config.n_group
        self.topk_group = config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)
        load = torch.zeros(config.n_routed_experts, dtype=torch.int64)
        self.register_buffer("expert_load", load, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights in fp32 and numbers of the chosen experts, both (N, K), for tokens `x` (N, D)."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()  # (N, E)
        chosen = self._select(scores.detach() + self.e_score_correction_bias)  # (N, K)
        weights = scores.gather(1, chosen)  # (N, K)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.routed_scaling_factor, chosen

    def _select(self, biased: Tensor) -> Tensor:
        """Return the K best experts (N, K) of the best groups; a group is worth the sum of its best two."""
        if self.n_group > 1:
            groups = torch.unflatten(biased, -1, (self.n_group, -1))  # (N, n_group, E / n_group)
            worth = groups.topk(2, dim=-1).values.sum(dim=-1)  # (N, n_group)
            best = worth.topk(self.topk_group, dim=-1, sorted=False).indices  # (N, topk_group)
            is_kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, best, True)  # (N, n_group)
            biased = groups.masked_fill(~is_kept[..., None], float("-inf")).flatten(1)  # (N, E)
        return biased.topk(self.num_experts_per_tok, dim=-1, sorted=False).indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        """Move the module, but keep the bias in fp32: in bf16 its small steps would be lost."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self


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


def _permute(x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
    """Return what `_Permute` does."""
    rows: Tensor = _Permute.apply(x, order, inverse, copies)  # type: ignore[no-untyped-call]
    return rows


class Experts(nn.Module):
    """The routed experts of a layer: gated MLPs, stacked, so that one that gets no token still gets a gradient."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
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
        num_tokens, num_experts_per_tok = chosen.shape
        by_expert, order = chosen.flatten().sort(stable=True)  # (N * K,) each
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        numbers = torch.arange(len(self.down_proj), device=chosen.device)
        ends = torch.searchsorted(by_expert, numbers, right=True)  # (E,): where each expert's rows end
        rows = _permute(x, order, inverse, num_experts_per_tok)  # (N * K, D)
        rows = self._run_grouped(rows, ends) if rows.is_cuda and rows.dtype == torch.bfloat16 else self._run(rows, ends)
        parts = _permute(rows, inverse, order, 1).view(num_tokens, num_experts_per_tok, -1)  # (N, K, D)
        weighted: Tensor = parts * weights[..., None]
        return weighted.sum(dim=1).to(x.dtype)  # (N, D)

    def _run(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return each expert's output for its slice of `rows` (N * K, D), one expert after the other."""
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        outs = []
        parts = torch.split(rows, sizes)
        for part, w_in, w_out in zip(parts, self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True):
            if len(part):
                gate, up = F.linear(part, w_in).chunk(2, dim=-1)
                outs.append(F.linear(F.silu(gate) * up, w_out))
        return torch.cat(outs)

    def _run_grouped(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return the same in two kernels and without waiting for the sizes: for bf16 on a GPU."""
        offsets = ends.int()
        gate, up = F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=offsets)


class MoE(nn.Module):
    """Routed experts for some tokens beside shared experts for all."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output for each vector of `x` (B, T, D), and how many tokens chose each expert, (E,) int64."""
        tokens = x.flatten(0, 1)  # (B * T, D)
        weights, chosen = self.gate(tokens)
        routed = self.experts(tokens, weights, chosen).view_as(x)  # (B, T, D)
        load = torch.zeros_like(self.gate.expert_load)
        load.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        return routed + self.shared_experts(x), load
