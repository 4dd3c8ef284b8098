"""Each row's tokens divided over a group (Ulysses, arXiv 2309.14509): exchanged for heads where tokens meet."""

from typing import Any

import torch
from torch import Tensor, nn

from ray_ds.config.model import Kernels
from ray_ds.model.attention import Mask, attend
from ray_ds.model.block import Block
from ray_ds.model.decoder import Decoder
from ray_ds.model.experts import MoE
from ray_ds.model.router import sequence_balance
from ray_ds.train.parallel.exchange import all_to_all
from ray_ds.train.parallel.mesh import Mesh


def divide_sequence(decoder: Decoder, mesh: Mesh) -> None:
    """Make each process of the group compute its part of a row's tokens.

    The decoder still takes whole rows, so that targets further ahead, documents and positions are what they are for one
    process; its loss is over this process's part of the targets.
    """
    part = _Part(mesh)
    decoder.model.embed_tokens.register_forward_pre_hook(part.of_first)
    decoder.lm_head.register_forward_pre_hook(part.of_targets)
    for module in decoder.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(part.of_rotary)
            module.self_attn.attend = _SwappedAttend(mesh)
        if isinstance(module, MoE):
            module.balance_of = _WholeBalance(mesh)


class _Part:
    """Cuts a process's part of the tokens out of the arguments of a module."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def of(self, x: Tensor) -> Tensor:
        """Return the part of `x`, (B, T, ...), as (B, T / group size, ...)."""
        return torch.chunk(x, self._mesh.size, dim=1)[self._mesh.place]

    def of_first(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Cut the embedding's tokens."""
        return (self.of(args[0]), *args[1:])

    def of_targets(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Cut the targets, the output projection's second argument."""
        hidden, *targets = args
        return (hidden, *(self.of(each) for each in targets))

    def of_rotary(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Cut the positions, a layer's second argument."""
        x, rotary, *others = args
        return (x, tuple(self.of(table) for table in rotary), *others)


class _SwappedAttend:
    """Attention over whole rows by some of the heads: in place of some tokens by all heads."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Mask = None, kernels: Kernels = "auto"
    ) -> Tensor:
        """Return what `attend` does, for and from a part of the tokens."""
        q, k, v = (self._to_heads(tensor) for tensor in (q, k, v))
        return self._to_tokens(attend(q, k, v, scale, mask, kernels))

    def _to_heads(self, x: Tensor) -> Tensor:
        """Return all tokens of some heads, (B, H / P, T, D), for some tokens of all heads, (B, H, T / P, D)."""
        by_process = torch.unflatten(x, 1, (self._mesh.size, -1)).transpose(0, 1)  # (P, B, H / P, T / P, D)
        arrived = all_to_all(by_process, self._mesh)
        return arrived.permute(1, 2, 0, 3, 4).flatten(2, 3)  # (B, H / P, T, D)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """Return the reverse."""
        by_process = torch.unflatten(x, 2, (self._mesh.size, -1)).permute(2, 0, 1, 3, 4)  # (P, B, H / P, T / P, D)
        return all_to_all(by_process, self._mesh).transpose(0, 1).flatten(1, 2)  # (B, H, T / P, D)


class _WholeBalance:
    """The balance of whole rows, shared out evenly: the group's sum is what one process has."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def __call__(self, scores: Tensor, picked: Tensor) -> Tensor:
        """Return this process's share of `sequence_balance`, (B,)."""
        return sequence_balance(self._whole(scores), self._whole(picked)) / self._mesh.size

    def _whole(self, x: Tensor) -> Tensor:
        """Return all tokens, (B, T, ...), for a part of them."""
        arrived = all_to_all(x.expand(self._mesh.size, *x.shape), self._mesh)  # (P, B, T / P, ...)
        return arrived.transpose(0, 1).flatten(1, 2)
