"""Distillation (arXiv 1503.02531): a model learns what a larger one says, not only what the text says."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ray_ds.config.objective import Distill
from ray_ds.model.decoder import Decoder
from ray_ds.model.loss import IGNORED_TARGET, chunk_rows, summed_cross_entropy
from ray_ds.train.objective import Objective, token_logits


class DistillObjective(Objective):
    """temperature^2 * KL(teacher || student) + weight * cross-entropy, summed over the targets.

    Both are softened by the temperature in the first term, whose gradient its square keeps at the size of the second's
    (arXiv 1503.02531, section 2). The teacher is whole on every process.
    """

    figures = ("kl", "cross_entropy")

    def __init__(self, decoder: Decoder, settings: Distill, teacher: Decoder) -> None:
        super().__init__(decoder)
        self._settings = settings
        self._asked = (teacher,)

    def forward(self, tokens: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        """Return loss, KL and cross-entropy, each summed over targets, (3,); KL at the temperature, in nats."""
        with torch.no_grad():
            teacher = token_logits(self._asked[0], tokens, segments)  # (B * T, V)
        student = token_logits(self.decoder, tokens, segments)  # (B * T, V)
        temperature = self._settings.temperature
        kl = summed_kl(student, teacher, targets.flatten(), temperature)
        cross_entropy = summed_cross_entropy(student, targets.flatten())
        loss = temperature**2 * kl + self._settings.cross_entropy_weight * cross_entropy
        return torch.stack([loss, kl.detach(), cross_entropy.detach()])


def summed_kl(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) in nats, summed over the targets that are not `IGNORED_TARGET`, fp32.

    Args:
        student, teacher: logits (N, V) of any float type; the student may have more columns than the teacher or
            fewer, as some pad their vocabulary: those that one of them lacks are left out.
        targets: (N,).
    """
    width = min(student.shape[1], teacher.shape[1])
    divergence: Tensor = _SummedKl.apply(student[:, :width], teacher[:, :width], targets, temperature)  # type: ignore[no-untyped-call]
    return divergence


class _SummedKl(torch.autograd.Function):
    """Keeps the logits as they came; softmaxes in fp32 exist for some rows at a time only, on both ways."""

    @staticmethod
    def forward(ctx: FunctionCtx, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the sum."""
        ctx.save_for_backward(student, teacher, targets)
        ctx.temperature = temperature  # type: ignore[attr-defined]
        total = torch.zeros((), device=student.device)
        for s, t, is_counted in _chunks(student, teacher, targets):
            log_p = (t.float() / temperature).log_softmax(dim=-1)
            log_q = (s.float() / temperature).log_softmax(dim=-1)
            total += torch.where(is_counted, (log_p.exp() * (log_p - log_q)).sum(dim=-1), 0.0).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the student's logits, (softmax of student - softmax of teacher) / temperature."""
        student, teacher, targets = ctx.saved_tensors  # type: ignore[attr-defined]
        temperature: float = ctx.temperature  # type: ignore[attr-defined]
        out = torch.empty_like(student)
        pieces = torch.split(out, chunk_rows(student))
        for piece, (s, t, is_counted) in zip(pieces, _chunks(student, teacher, targets), strict=True):
            p = (t.float() / temperature).softmax(dim=-1)
            q = (s.float() / temperature).softmax(dim=-1)
            piece.copy_((q - p) * (is_counted.float() * grad / temperature)[:, None])
        return out, None, None, None


def _chunks(student: Tensor, teacher: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return student, teacher and whether a row counts, some rows at a time."""
    rows = chunk_rows(student)
    parts = (torch.split(tensor, rows) for tensor in (student, teacher, targets != IGNORED_TARGET))
    return list(zip(*parts, strict=True))
