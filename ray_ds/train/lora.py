"""Low-rank adapters (arXiv 2106.09685) on a decoder's linear layers and routed experts."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_ds.config.objective import Lora
from ray_ds.errors import ConfigError
from ray_ds.model.decoder import Decoder
from ray_ds.model.experts import Experts
from ray_ds.train.lora_experts import LoraExperts

LORA_A = "lora_A"
LORA_B = "lora_B"


class LoraLinear(nn.Linear):
    """A linear layer that is left as it is, and two factors beside it that are trained; its own names do not change."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        """Take over the weight of `base`; the factors' product is 0 at first."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale = scale
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias + scale * x A^T B^T."""
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


def add_adapters(decoder: Decoder, lora: Lora, seed: int) -> None:
    """Freeze all weights and put adapters beside the linear layers that the patterns name, and beside routed experts.

    A starts uniform as a linear layer does in torch, in the order of the modules' names, experts last; B starts at 0.

    Raises:
        ConfigError: a pattern names no linear layer.
    """
    names = linear_names(decoder)
    for pattern in lora.modules:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise ConfigError("lora.modules", pattern, f"must name linear layers of the model: {known}", "correct it")
    decoder.requires_grad_(False)
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in lora.modules)]
    if lora.routed_experts:
        chosen += [name for name, module in decoder.named_modules() if isinstance(module, Experts)]
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        parent, _, last = name.rpartition(".")
        adapted = _adapt(decoder.get_submodule(name), lora)
        for own_name, parameter in adapted.named_parameters():
            if own_name.endswith(LORA_A):
                bound = 1 / math.sqrt(parameter.shape[-1])
                first = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                with torch.no_grad():
                    parameter.copy_(first)
        setattr(decoder.get_submodule(parent), last, adapted)


def _adapt(module: nn.Module, lora: Lora) -> nn.Module:
    """Return a linear layer, or a layer's experts, with adapters."""
    scale = lora.alpha / lora.rank
    if isinstance(module, Experts):
        return LoraExperts(module, lora.rank, scale)
    assert isinstance(module, nn.Linear)
    return LoraLinear(module, lora.rank, scale)


def linear_names(decoder: Decoder) -> list[str]:
    """Return the names of a decoder's linear layers in order, but for the output projection."""
    names = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in names if name != "lm_head"]  # it computes the loss, not only logits


def adapted_weights(adapters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B by the name of the weight that they stand beside.

    A linear layer's `x.weight` has `x.lora_A`; experts' stacked `x` has `x_lora_A`.
    """
    found = {}
    for name, down in adapters.items():
        if name.endswith(LORA_A):
            stem = name.removesuffix(LORA_A)
            weight = f"{stem}weight" if stem.endswith(".") else stem.removesuffix("_")
            found[weight] = (down, adapters[stem + LORA_B])
    return found


def merge_adapters(state: Mapping[str, Tensor], lora: Lora) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return plain weights, each product added in fp32 and rounded once, and the adapters' factors by name."""
    adapters = {name: tensor for name, tensor in state.items() if name.endswith((LORA_A, LORA_B))}
    merged = {name: tensor for name, tensor in state.items() if name not in adapters}
    for name, (down, up) in adapted_weights(adapters).items():
        product = up.float() @ down.float() * (lora.alpha / lora.rank)
        merged[name] = (merged[name].float() + product).to(merged[name].dtype)
    return merged, adapters
