"""The training loss: summed cross-entropy in fp32, from logits or, in its fast form, without ever holding them all."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from ray_ds.config.model import Kernels
from ray_ds.model.kernels import is_fast

IGNORED_TARGET = -100
"""A target that is not predicted."""

CPU_CHUNK = 1 << 20
"""Logits worked on at once: 4 MB in fp32, about what stays in a core's cache."""
GPU_CHUNK = 1 << 28
"""The same on a GPU, where a chunk need only be small beside the memory: 1 GiB in fp32."""
LINEAR_CPU_ROWS = 256
"""Rows whose logits are made at once where they are not kept: fewer would add up the weight's gradient too often."""
LINEAR_GPU_CHUNK = 1 << 27
"""Logits made at once on a GPU: 512 MB in fp32, 4,096 rows of a vocabulary of 32,768, which fill it."""


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy in nats, summed over the targets that are not `IGNORED_TARGET`, as an fp32 scalar.

    Args:
        logits: (N, V) of any float type.
        targets: (N,) int64.
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


def chunk_rows(logits: Tensor) -> int:
    """Return how many rows of `logits` are worked on at once."""
    return max(1, (GPU_CHUNK if logits.is_cuda else CPU_CHUNK) // logits.shape[1])


class _SummedCrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came and each row's log-sum-exp; the gradient, softmax - one_hot, follows from them.

    The stock function keeps an fp32 copy of the logits and makes two more on the way back: a fifth of the time of a
    small model on a CPU, 4 GB each for 16 x 2048 tokens and a vocabulary of 32,768.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the sum."""
        rows = chunk_rows(logits)
        log_sums = torch.cat([chunk.float().logsumexp(dim=-1) for chunk in torch.split(logits, rows)])  # (N,)
        is_counted = targets != IGNORED_TARGET
        at_target = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float()  # (N,)
        ctx.save_for_backward(logits, targets, log_sums)
        return torch.where(is_counted, log_sums - at_target, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the logits, in their type."""
        logits, targets, log_sums = ctx.saved_tensors  # type: ignore[attr-defined]
        rows = chunk_rows(logits)
        weights = (targets != IGNORED_TARGET).float() * grad  # (N,)
        out = torch.empty_like(logits)
        columns = (targets.clamp(min=0)[:, None], log_sums[:, None], weights[:, None])  # (N, 1) each
        pieces = (torch.split(tensor, rows) for tensor in (logits, out, *columns))
        for chunk, piece, target, log_sum, weight in zip(*pieces, strict=True):
            wide = (chunk.float() - log_sum).exp_().mul_(weight)
            piece.copy_(wide.scatter_add_(1, target, -weight))
        return out, None


class OutputHead(nn.Linear):
    """The projection to logits, and the loss over them."""

    def __init__(self, hidden_size: int, vocab_size: int, kernels: Kernels = "auto") -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.kernels = kernels

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits (..., V) for `hidden` (..., D); with `targets` (...) their summed cross-entropy in nats."""
        if targets is None:
            return super().forward(hidden)
        # fp16 holds the small numbers of the logits' gradient only once the loss was scaled, so not on the way forth.
        if hidden.dtype != torch.float16 and is_fast(self.kernels, hidden, on_cpu=True):
            return linear_cross_entropy(hidden.flatten(0, -2), self.weight, targets.flatten())
        logits = super().forward(hidden).flatten(0, -2)  # (N, V)
        if self.kernels == "plain":
            return F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
        return summed_cross_entropy(logits, targets.flatten())


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return `summed_cross_entropy(hidden @ weight.T, targets)`, the logits made and used a chunk of rows at a time.

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,) int64.
    """
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, wants_gradient)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients on the way forth, where a chunk's logits are at hand, so that none are kept or made again.

    Source: Liger kernels, arXiv 2410.10989, section 3.2.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
        """Return the sum."""
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if wants_gradient else None  # (N, D)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_gradient else None  # (V, D)
        rows = max(1, LINEAR_GPU_CHUNK // len(weight)) if hidden.is_cuda else LINEAR_CPU_ROWS
        for start in range(0, len(hidden), rows):
            chunk, target = hidden[start : start + rows], targets[start : start + rows, None]
            wide = (chunk @ weight.T).float()  # (rows, V)
            is_counted = target != IGNORED_TARGET  # (rows, 1)
            place = target.clamp(min=0)
            log_sum = wide.logsumexp(dim=-1, keepdim=True)  # (rows, 1)
            loss = loss + torch.where(is_counted, log_sum - wide.gather(1, place), 0.0).sum()
            if hidden_grad is not None and weight_grad is not None:
                counted = is_counted.float()
                wide = wide.sub_(log_sum).exp_().mul_(counted).scatter_add_(1, place, -counted)  # softmax - one_hot
                logits_grad = wide.to(hidden.dtype)
                hidden_grad[start : start + rows] = logits_grad @ weight
                if hidden.dtype == torch.float32:
                    weight_grad.addmm_(logits_grad.T, chunk)
                else:
                    weight_grad += logits_grad.T @ chunk
        if hidden_grad is not None and weight_grad is not None:
            ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of `hidden` and `weight`."""
        hidden_grad, weight_grad = ctx.saved_tensors  # type: ignore[attr-defined]
        return (hidden_grad * grad).to(hidden_grad.dtype), (weight_grad * grad).to(weight_grad.dtype), None, None
