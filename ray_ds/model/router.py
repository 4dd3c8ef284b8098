"""Which experts a token goes to: DeepSeek-V3's router (arXiv 2412.19437) and V2's (arXiv 2405.04434)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_ds.config.model import ModelConfig


class Gate(nn.Module):
    """Chooses each token's experts by scores, with `noaux_tc` plus a bias that is moved, not trained."""

    e_score_correction_bias: Tensor | None
    expert_load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.scoring_func = config.scoring_func
        self.n_group = config.n_group
        self.topk_group = config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.has_router_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        load = torch.zeros(config.n_routed_experts, dtype=torch.int64)
        self.register_buffer("expert_load", load, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights in fp32 and numbers of the chosen experts, (N, K) each, and all scores, (N, E).

        Args:
            x: tokens, (N, D).
        """
        logits = F.linear(x.float(), self.weight.float())  # (N, E)
        scores = logits.sigmoid() if self.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        chosen = self._choose(scores.detach())  # (N, K)
        weights = scores.gather(1, chosen)  # (N, K)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.routed_scaling_factor, chosen, scores

    def _choose(self, worth: Tensor) -> Tensor:
        """Return the K best experts (N, K) of the best groups, given what each is worth without its bias, (N, E)."""
        best_of_group = 1  # V2: a group is worth its best expert; V3: the sum of its best two, biases included
        if self.e_score_correction_bias is not None:
            worth = worth + self.e_score_correction_bias
            best_of_group = 2
        if self.n_group > 1:
            groups = torch.unflatten(worth, -1, (self.n_group, -1))  # (N, n_group, E / n_group)
            group_worth = groups.topk(best_of_group, dim=-1).values.sum(dim=-1)  # (N, n_group)
            best = group_worth.topk(self.topk_group, dim=-1, sorted=False).indices  # (N, topk_group)
            is_kept = torch.zeros_like(group_worth, dtype=torch.bool).scatter_(1, best, True)  # (N, n_group)
            worth = groups.masked_fill(~is_kept[..., None], float("-inf")).flatten(1)  # (N, E)
        return worth.topk(self.num_experts_per_tok, dim=-1, sorted=False).indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        """Move the module, but keep the bias in fp32: in bf16 its small steps would be lost."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self


def sequence_balance(scores: Tensor, picked: Tensor) -> Tensor:
    """Return how unevenly each sequence uses the experts, (B,): 1 where evenly, E / K where K experts get it all.

    The sum over experts of f * P: f counts how often the sequence picked an expert, as a multiple of the mean, and P
    is the expert's mean share of the scores. The gradient goes through P alone.

    Args:
        scores: (B, T, E), positive.
        picked: (B, T, K), numbers of experts.
    Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20, without the factor alpha.
    """
    rows, _, num_experts = scores.shape
    flat = picked.flatten(1)  # (B, T * K)
    counts = torch.zeros(rows, num_experts, device=scores.device).scatter_add_(1, flat, torch.ones_like(flat).float())
    frequency = counts * (num_experts / flat.shape[1])  # (B, E)
    share = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)  # (B, E)
    return (frequency * share).sum(dim=-1)
