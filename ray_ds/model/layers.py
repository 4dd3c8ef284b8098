"""The small layers that everything else is built from."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_ds.config.model import Kernels
from ray_ds.model.kernels import is_fast


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in fp32 whatever the type of its input."""

    def __init__(self, width: int, eps: float = 1e-6, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (..., width) with a root mean square of 1, times the weight."""
        if is_fast(self.kernels, x):  # on a CPU the stock function is made of the steps below too and takes longer
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Embedding(nn.Embedding):
    """A vector for each token, drawn at random only where there is memory for it.

    On the device `meta` drawing from a normal distribution imports PyTorch's compiler: a second, in which a replica
    could have answered.
    """

    def reset_parameters(self) -> None:
        """Draw the vectors anew."""
        if not self.weight.is_meta:
            super().reset_parameters()


def give_memory(module: nn.Module, device: torch.device | str) -> None:
    """Give a module made on the device `meta` memory for its tensors, uninitialised.

    As `nn.Module.to_empty`, which on `meta` tensors imports sympy first: a third of a second.
    """
    module._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    )


class MLP(nn.Module):
    """Gated MLP (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for each vector of `x` (..., D)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
