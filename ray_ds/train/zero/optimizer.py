"""Which parameter is trained how."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from torch import nn

from ray_ds.config.optimizer import AdamW, Muon, Optimizer

NOT_MUON = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")
"""Matrices whose rows stand for themselves (a token, an expert): AdamW trains these in every optimizer."""


def uses_muon(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether Muon trains a parameter: the layers' matrices, and stacks of them, which it takes one by one."""
    return parameter.dim() >= 2 and not name.endswith(NOT_MUON)


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer, *, is_cuda: bool
) -> torch.optim.Optimizer:
    """Return an optimizer whose groups hold their peak rates; norms and biases (one dimension) are not decayed.

    DeepSpeed's own Adam is a kernel compiled at first use; torch's fused one is as fast on a GPU and needs no compiler.
    """
    named = list(named_parameters)
    if isinstance(optimizer, AdamW):
        matrices = [p for _, p in named if p.dim() >= 2]
        vectors = [p for _, p in named if p.dim() < 2]
        rates = {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps}
        groups = _groups((matrices, {**rates, "weight_decay": optimizer.weight_decay}), (vectors, {**rates}))
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=is_cuda)
    return _make_muon(named, optimizer, is_cuda=is_cuda)


def _make_muon(named: Sequence[tuple[str, nn.Parameter]], optimizer: Muon, *, is_cuda: bool) -> torch.optim.Optimizer:
    """Return DeepSpeed's Muon with torch's AdamW for the rest.

    DeepSpeed reads `use_muon` from each parameter, where its ZeRO stages orthogonalize gradients, and from each group.
    """
    for name, parameter in named:
        parameter.use_muon = uses_muon(name, parameter)  # type: ignore[attr-defined]
    layers = [p for name, p in named if uses_muon(name, p)]
    tables = [p for name, p in named if not uses_muon(name, p) and p.dim() >= 2]
    vectors = [p for _, p in named if p.dim() < 2]
    decay = {"weight_decay": optimizer.weight_decay}
    adam = {"use_muon": False, "lr": optimizer.adam_lr, "betas": optimizer.adam_betas, "eps": optimizer.adam_eps}
    muon = {"use_muon": True, "lr": optimizer.lr, "momentum": optimizer.momentum}
    groups = _groups((layers, {**muon, **decay}), (tables, {**adam, **decay}), (vectors, {**adam, "weight_decay": 0.0}))
    made: torch.optim.Optimizer = MuonWithAuxAdam(
        groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": is_cuda}
    )
    return made


def _groups(*groups: tuple[list[nn.Parameter], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups without the empty ones."""
    return [{"params": parameters, **options} for parameters, options in groups if parameters]
