"""Distillation (arXiv 1503.02531) from a teacher's k largest logits, which were stored before.

All other tokens count as one more outcome, with what probability the teacher left for them: the student learns how much
to leave, and is free in how it spreads it. Leaving that outcome out would teach it to leave nothing, since both
distributions would have to be scaled up to 1 (arXiv 2503.16870). The divergence so found is at most the whole one, and
is that one where k is the whole vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ray_ds.config.objective import Distill
from ray_ds.model.decoder import Decoder
from ray_ds.model.loss import IGNORED_TARGET, chunk_rows, summed_cross_entropy
from ray_ds.train.objective import Objective, token_logits


class TopLogits(NamedTuple):
    """The k largest logits of a teacher behind each token, and what is left for all others."""

    ids: Tensor
    """Whose logits they are, (..., k), int64."""
    logits: Tensor
    """Less the largest one, (..., k), any float type."""
    log_rest: Tensor
    """Log of the sum of exp((logit - largest) / temperature) over all others, (...), fp32."""


class StoredDistillObjective(Objective):
    """What `DistillObjective` minimises, without a teacher: the divergence is from what it once said to the same rows.

    Args:
        vocab_size: tokens that the stored logits are of; the student may know more.
    """

    figures = ("kl", "cross_entropy")

    def __init__(self, decoder: Decoder, settings: Distill, vocab_size: int) -> None:
        super().__init__(decoder)
        self._settings = settings
        self._vocab_size = vocab_size

    def forward(
        self, tokens: Tensor, targets: Tensor, segments: Tensor | None, ids: Tensor, logits: Tensor, log_rest: Tensor
    ) -> Tensor:
        """Return loss, KL and cross-entropy, each summed over targets, (3,); KL at the temperature, in nats."""
        student = token_logits(self.decoder, tokens, segments)  # (B * T, V)
        temperature = self._settings.temperature
        teacher = TopLogits(ids.flatten(0, 1), logits.flatten(0, 1), log_rest.flatten())
        kl = summed_top_kl(student[:, : self._vocab_size], teacher, targets.flatten(), temperature)
        cross_entropy = summed_cross_entropy(student, targets.flatten())
        loss = temperature**2 * kl + self._settings.cross_entropy_weight * cross_entropy
        return torch.stack([loss, kl.detach(), cross_entropy.detach()])


def find_top_logits(logits: Tensor, top_k: int, temperature: float) -> TopLogits:
    """Return the largest logits of rows (N, V) of any float type, as they are stored: (N, k) and (N,), in fp16."""
    wide = logits.float()
    top, ids = wide.topk(top_k)  # (N, k) each
    largest = top[:, :1]
    others = ((wide - largest) / temperature).scatter_(1, ids, -torch.inf)  # (N, V)
    differences = (top - largest).clamp_(min=torch.finfo(torch.float16).min)
    return TopLogits(ids, differences.half(), others.logsumexp(dim=1))


def summed_top_kl(student: Tensor, teacher: TopLogits, targets: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) over the teacher's top k and all others as one outcome, in nats, summed, fp32.

    Args:
        student: logits (N, V) of any float type.
        teacher: (N, k) and (N,), `log_rest` at the same temperature.
        targets: (N,); rows of `IGNORED_TARGET` add nothing.
    """
    divergence: Tensor = _SummedTopKl.apply(student, *teacher, targets, temperature)  # type: ignore[no-untyped-call]
    return divergence


class _SummedTopKl(torch.autograd.Function):
    """Keeps the student's logits as they came; softmaxes in fp32 exist for some rows at a time only, on both ways."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student: Tensor,
        ids: Tensor,
        logits: Tensor,
        log_rest: Tensor,
        targets: Tensor,
        temperature: float,
    ) -> Tensor:
        """Return the sum."""
        ctx.save_for_backward(student, ids, logits, log_rest, targets)
        ctx.temperature = temperature  # type: ignore[attr-defined]
        total = torch.zeros((), device=student.device)
        for s, i, top, rest, is_counted in _chunks(student, ids, logits, log_rest, targets):
            log_p = _outcomes(top, rest, temperature)  # (rows, k + 1)
            log_q = (s.float() / temperature).log_softmax(dim=-1)  # (rows, V)
            others = _others(log_q, i).logsumexp(dim=-1, keepdim=True)  # (rows, 1)
            terms = log_p.exp() * (log_p - torch.cat((log_q.gather(1, i), others), dim=1))
            divergence = torch.where(log_p > -torch.inf, terms, 0.0).sum(dim=-1)  # 0 log 0 = 0
            total += torch.where(is_counted, divergence, 0.0).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Return the gradient of the student's logits, (softmax of student - wanted) / temperature.

        Wanted of the top k is the teacher's probability; what it leaves is spread over the others as the student does.
        """
        student, ids, logits, log_rest, targets = ctx.saved_tensors  # type: ignore[attr-defined]
        temperature: float = ctx.temperature  # type: ignore[attr-defined]
        out = torch.empty_like(student)
        pieces = torch.split(out, chunk_rows(student))
        chunks = _chunks(student, ids, logits, log_rest, targets)
        for piece, (s, i, top, rest, is_counted) in zip(pieces, chunks, strict=True):
            p = _outcomes(top, rest, temperature).exp()  # (rows, k + 1)
            log_q = (s.float() / temperature).log_softmax(dim=-1)  # (rows, V)
            # Where there are no others, their softmax would be 0 / 0.
            spread = _others(log_q, i).softmax(dim=-1).nan_to_num_(nan=0.0)
            wanted = (p[:, -1:] * spread).scatter_(1, i, p[:, :-1])
            piece.copy_((log_q.exp() - wanted) * (is_counted.float() * grad / temperature)[:, None])
        return out, None, None, None, None, None


def _outcomes(top: Tensor, rest: Tensor, temperature: float) -> Tensor:
    """Return the teacher's log-probabilities of its top k and of all others together, (N, k + 1)."""
    return torch.cat((top.float() / temperature, rest[:, None]), dim=1).log_softmax(dim=-1)


def _others(log_q: Tensor, ids: Tensor) -> Tensor:
    """Return log-probabilities without those of some ids."""
    return log_q.scatter(1, ids, -torch.inf)


def _chunks(
    student: Tensor, ids: Tensor, logits: Tensor, log_rest: Tensor, targets: Tensor
) -> list[tuple[Tensor, ...]]:
    """Return all that is known of some rows at a time, and last whether a row counts."""
    parts = (student, ids, logits, log_rest, targets != IGNORED_TARGET)
    return list(zip(*(torch.split(part, chunk_rows(student)) for part in parts), strict=True))
