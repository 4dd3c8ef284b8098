"""Low-rank adapters on routed experts: factors of its own for each expert, in grouped products like the weights'."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_ds.model.experts import Experts

GroupedLinear = Callable[[Tensor, Tensor], Tensor]
"""From rows (M, in), which lie by expert, and weights (E, out, in) to (M, out)."""


class LoraExperts(Experts):
    """Experts whose weights are left as they are, and two factors beside each that are trained."""

    def __init__(self, base: Experts, rank: int, scale: float) -> None:
        """Take over the weights of `base`; the factors' products are 0 at first."""
        nn.Module.__init__(self)
        self.kernels, self.num_experts, self.elsewhere = base.kernels, base.num_experts, base.elsewhere
        self.scale = scale
        self.gate_up_proj, self.down_proj = base.gate_up_proj, base.down_proj
        for name, weight in list(base.named_parameters()):
            num_experts, out_features, in_features = weight.shape
            self.register_parameter(f"{name}_lora_A", nn.Parameter(weight.new_empty(num_experts, rank, in_features)))
            self.register_parameter(f"{name}_lora_B", nn.Parameter(weight.new_zeros(num_experts, out_features, rank)))

    def _run(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return each expert's output for its slice of `rows` (N * K, D), one expert after the other."""
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()

        def linear(x: Tensor, weights: Tensor) -> Tensor:
            parts = zip(torch.split(x, sizes), weights.unbind(), strict=True)
            return torch.cat([F.linear(part, weight) for part, weight in parts])

        return self._mlp(rows, linear)

    def _run_grouped(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return the same in a few kernels and without waiting for the sizes."""
        offsets = ends.int()
        return self._mlp(rows, lambda x, weights: F.grouped_mm(x, weights.transpose(1, 2), offs=offsets))

    def _mlp(self, rows: Tensor, linear: GroupedLinear) -> Tensor:
        """Return the gated MLPs' outputs, (N * K, D)."""
        gate, up = self._adapted(rows, "gate_up_proj", linear).chunk(2, dim=-1)
        return self._adapted(F.silu(gate) * up, "down_proj", linear)

    def _adapted(self, x: Tensor, name: str, linear: GroupedLinear) -> Tensor:
        """Return x W^T + scale * x A^T B^T, each row by its expert's W, A and B."""
        weight, down, up = (getattr(self, f"{name}{kind}") for kind in ("", "_lora_A", "_lora_B"))
        return linear(x, weight) + linear(linear(x, down), up) * self.scale
