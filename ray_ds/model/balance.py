"""Keeping routed experts equally busy by moving the router's bias (arXiv 2408.15664)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ray_ds.model.decoder import Decoder
from ray_ds.model.router import Gate


def _gates(decoder: Decoder) -> Iterator[Gate]:
    """Yield the routers, first layer first."""
    return (module for module in decoder.modules() if isinstance(module, Gate))


def expert_load(decoder: Decoder) -> Tensor:
    """Return how many tokens chose each expert in training mode since the last reset: (MoE layers, E), int64.

    Whole numbers: sums over processes do not depend on their order. Empty for a dense model.
    """
    loads = [gate.expert_load for gate in _gates(decoder)]
    return torch.stack(loads) if loads else torch.zeros(0, 0, dtype=torch.int64)


def reset_expert_load(decoder: Decoder) -> None:
    """Start counting anew."""
    for gate in _gates(decoder):
        gate.expert_load.zero_()


@contextlib.contextmanager
def uncounted(decoder: Decoder) -> Iterator[None]:
    """Leave the tokens that pass the decoder in this context out of the load."""
    before = [gate.expert_load.clone() for gate in _gates(decoder)]
    yield
    for gate, load in zip(_gates(decoder), before, strict=True):
        gate.expert_load.copy_(load)


@torch.no_grad()
def update_router_bias(decoder: Decoder, load: Tensor, speed: float) -> None:
    """Make busy experts less and idle ones more likely to be chosen, by `speed` each.

    Args:
        load: (MoE layers, E), of all processes' tokens of one step.
        speed: 0.001 in DeepSeek-V3.
    """
    for gate, counts in zip(_gates(decoder), load, strict=True):
        assert gate.e_score_correction_bias is not None, "only the routers of topk_method noaux_tc have a bias"
        wide = counts.to(gate.e_score_correction_bias)
        gate.e_score_correction_bias += speed * (wide.mean() - wide).sign()


def max_violation(load: Tensor) -> Tensor:
    """Return MaxVio, (MoE layers,): how far the busiest expert lies above the mean, as a part of the mean.

    Source: arXiv 2408.15664, section 4.1.
    """
    wide = load.double()
    return wide.amax(dim=-1) / wide.mean(dim=-1) - 1
