"""Quantized twins of the decoder's layers, called like the layers they stand in for; for inference only."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_ds.model.experts import lay_out
from ray_ds.quantize.kernels import Road, pack_stack, pack_weight

QuantizedWeight = tuple[Tensor, Tensor]
"""A weight's values (N, K), int8 or E4M3, and their fp32 scales (N, 1)."""


class QuantizedLinear(nn.Module):
    """A linear layer, for inputs of any float type; a bias stays a float."""

    def __init__(self, weight: QuantizedWeight, road: Road, bias: Tensor | None = None) -> None:
        super().__init__()
        self.road = road
        self.packed = pack_weight(*weight, road)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., N) for each vector of `x` (..., K), in the type of `x`."""
        values, scale = self.packed.quantize(x.reshape(-1, self.packed.in_features))
        out = self.packed.multiply(values, scale)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.packed.out_features)


class QuantizedMLP(nn.Module):
    """A gated MLP whose first two products are one, over inputs quantized once."""

    def __init__(self, gate: QuantizedWeight, up: QuantizedWeight, down: QuantizedWeight, road: Road) -> None:
        super().__init__()
        self.road = road
        self.gate_up = pack_weight(*_stack(gate, up), road)
        self.down = pack_weight(*down, road)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., D) for each vector of `x` (..., D), in the type of `x`."""
        values, scale = self.gate_up.quantize(x.reshape(-1, self.gate_up.in_features))
        inner = _swiglu(self.gate_up.multiply(values, scale))  # (M, I)
        return self.down.multiply(*self.down.quantize(inner)).to(x.dtype).view(x.shape)


class QuantizedExperts(nn.Module):
    """The routed experts of a layer; every token is quantized once, whatever experts it goes to."""

    def __init__(self, experts: Sequence[tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]], road: Road) -> None:
        """Take each expert's weights `gate`, `up` and `down`."""
        super().__init__()
        self.road = road
        self.num_experts = len(experts)
        self.gate_up = pack_stack([_stack(gate, up) for gate, up, _ in experts], road)
        self.down = pack_stack([down for _, _, down in experts], road)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, (N, D), in the type of `x`.

        Args:
            x: (N, D).
            weights: (N, K), any float type.
            chosen: (N, K), numbers of experts.
        """
        layout = lay_out(chosen, self.num_experts)
        tokens = layout.order // chosen.shape[1]  # (N * K,)
        values, scale = self.gate_up.quantize(x)
        inner = _swiglu(self.gate_up.multiply(values[tokens], scale[tokens], layout.ends))  # (N * K, I)
        rows = self.down.multiply(*self.down.quantize(inner), layout.ends)  # (N * K, D)
        parts = torch.unflatten(rows[layout.inverse], 0, chosen.shape)  # (N, K, D)
        return (parts * weights[..., None]).sum(dim=1).to(x.dtype)  # (N, D)


def _stack(first: QuantizedWeight, second: QuantizedWeight) -> QuantizedWeight:
    """Return two weights over the same inputs as one."""
    return torch.cat((first[0], second[0])), torch.cat((first[1], second[1]))


def _swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, (M, I), of (M, 2 * I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
