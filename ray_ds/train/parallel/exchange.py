"""Exchanges within a group that gradients pass through, the other way round."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ray_ds.train.parallel.mesh import Mesh

Sizes = Sequence[int] | None
"""Rows by process; None = equally many."""


class _Spread(torch.autograd.Function):
    """Hands the same tensor to what differs by process; the gradient is the sum of what comes back."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, mesh: Mesh) -> Tensor:
        """Return `x`."""
        ctx.mesh = mesh  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        """Return the sum of the group's gradients."""
        return summed(grad, ctx.mesh), None  # type: ignore[attr-defined]


class _Collect(torch.autograd.Function):
    """Sums what differs by process into what is the same for all; the gradient goes to each as it is."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, mesh: Mesh) -> Tensor:
        """Return the sum over the group."""
        return summed(x, mesh)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient."""
        return grad, None


class _AllToAll(torch.autograd.Function):
    """Sends slices of the first dimension to the group's processes, and gradients back."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, received: Sizes, sent: Sizes, mesh: Mesh) -> Tensor:
        """Return what arrives, in the order of the processes it comes from."""
        ctx.back = sent, received, mesh  # type: ignore[attr-defined]
        return exchanged(x, received, sent, mesh)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Return each slice's gradient."""
        return exchanged(grad, *ctx.back), None, None, None  # type: ignore[attr-defined]


def spread(x: Tensor, mesh: Mesh) -> Tensor:
    """Return `x`, the same on all processes of the group, for what differs by process (Megatron's f)."""
    out: Tensor = _Spread.apply(x, mesh)  # type: ignore[no-untyped-call]
    return out


def collect(x: Tensor, mesh: Mesh) -> Tensor:
    """Return the sum of `x` over the group, for what is the same on all of its processes (Megatron's g)."""
    out: Tensor = _Collect.apply(x, mesh)  # type: ignore[no-untyped-call]
    return out


def all_to_all(x: Tensor, mesh: Mesh, *, received: Sizes = None, sent: Sizes = None) -> Tensor:
    """Return rows from each process of the group, in its order, for those of `x` that go to each.

    Args:
        received, sent: rows by process; None = the first dimension is divided evenly.
    """
    out: Tensor = _AllToAll.apply(x, received, sent, mesh)  # type: ignore[no-untyped-call]
    return out


def summed(x: Tensor, mesh: Mesh) -> Tensor:
    """Return the sum over the group, without a gradient."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=mesh.group)
    return total


def exchanged(x: Tensor, received: Sizes, sent: Sizes, mesh: Mesh) -> Tensor:
    """Do what `all_to_all` does, without a gradient."""
    length = len(x) if received is None else sum(received)
    out = x.new_empty(length, *x.shape[1:])
    arrives, leaves = (None if sizes is None else list(sizes) for sizes in (received, sent))
    dist.all_to_all_single(out, x.contiguous(), arrives, leaves, group=mesh.group)
    return out
