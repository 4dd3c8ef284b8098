"""Distillation from a teacher's largest logits, against plain formulas and against the teacher itself."""

import pytest
import torch
from torch import Tensor

from ray_ds.config.objective import Distill
from ray_ds.model.loss import IGNORED_TARGET
from ray_ds.train.distillation import DistillObjective, summed_kl
from ray_ds.train.objective import token_logits
from ray_ds.train.stored_distillation import StoredDistillObjective, TopLogits, find_top_logits, summed_top_kl
from tests.train.runs import VOCAB_SIZE
from tests.train.test_objectives import check_gradients, gradients, new_decoder, packed_rows

TARGETS = torch.tensor([1, IGNORED_TARGET, 2, 3, 4, IGNORED_TARGET, 5, 6, 7])
COUNTED = TARGETS != IGNORED_TARGET


def random_logits() -> tuple[Tensor, Tensor]:
    """Return a student's and a teacher's logits, (9, 30); the teacher's are multiples of 1/16, which fp16 holds."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(9, 30, generator=generator) * 3 for _ in range(2))
    return student.requires_grad_(), (teacher * 16).round() / 16


def few_outcomes(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return the probabilities of some tokens, and of all others together, (N, k + 1)."""
    probs = log_probs.exp()
    top = probs.gather(1, ids)
    return torch.cat((top, 1 - top.sum(1, keepdim=True)), dim=1)


@pytest.mark.shows("Distilling all of a teacher's stored logits has the loss and gradient of the teacher itself")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_logits_stored_are_the_teacher(temperature: float) -> None:
    student, teacher = random_logits()
    found = summed_top_kl(student, find_top_logits(teacher, 30, temperature), TARGETS, temperature)
    expected = summed_kl(student, teacher, TARGETS, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradient = [torch.autograd.grad(each, student)[0] for each in (found, expected)]
    torch.testing.assert_close(gradient[0], gradient[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 7, 29])
def test_others_count_as_one_outcome(top_k: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_ds.model.loss.CPU_CHUNK", 64)  # two rows at a time
    student, teacher = random_logits()
    stored = find_top_logits(teacher, top_k, temperature)
    assert torch.equal(teacher.gather(1, stored.ids), teacher.sort(dim=1, descending=True).values[:, :top_k])
    found = summed_top_kl(student, stored, TARGETS, temperature)
    log_p, log_q = ((logits.double() / temperature).log_softmax(1) for logits in (teacher, student))
    p, q = few_outcomes(log_p, stored.ids), few_outcomes(log_q, stored.ids)
    expected = (p * (p / q).log()).sum(1)[COUNTED].sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    # Of a token of the top k, q - p; of another, q - p_rest * (its share of the student's rest): d KL / d logit.
    (gradient,) = torch.autograd.grad(found, student)
    wanted = (log_q.exp() * p[:, -1:] / q[:, -1:]).scatter(1, stored.ids, p[:, :-1])
    analytic = (log_q.exp() - wanted).detach() / temperature * COUNTED[:, None]
    torch.testing.assert_close(gradient.double(), analytic, rtol=1e-4, atol=1e-6)
    (plain,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6)


def test_more_logits_come_closer_to_the_whole_divergence() -> None:
    student, teacher = random_logits()
    student = student.detach()
    found = [float(summed_top_kl(student, find_top_logits(teacher, k, 1.0), TARGETS, 1.0)) for k in (1, 2, 5, 12, 30)]
    assert found == sorted(found) and found[0] < 0.8 * found[-1]


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    _, teacher = random_logits()
    student = teacher.clone().requires_grad_()
    divergence = summed_top_kl(student, find_top_logits(teacher, 4, 1.0), TARGETS, 1.0)
    assert divergence.detach().abs() < 1e-5
    assert torch.autograd.grad(divergence, student)[0].abs().max() < 1e-6


def test_extreme_logits_give_numbers() -> None:
    teacher = torch.tensor([[0.0, 1e6, -1e6, 3.0]])
    student = torch.tensor([[300.0, -300.0, 0.0, 1.0]], requires_grad=True)
    for top_k in (1, 2, 4):
        divergence = summed_top_kl(student, find_top_logits(teacher, top_k, 1.0), torch.tensor([1]), 1.0)
        assert float(divergence.detach()) == pytest.approx(600, abs=1e-3)
        torch.testing.assert_close(torch.autograd.grad(divergence, student)[0], torch.tensor([[1.0, -1.0, 0.0, 0.0]]))


def test_the_objective_is_that_of_the_live_teacher() -> None:
    tokens, targets, segments, _ = packed_rows()
    decoder, teacher = new_decoder(1), new_decoder(2)
    settings = Distill(kind="distill", temperature=2.0, cross_entropy_weight=0.3)
    stored = find_top_logits(token_logits(teacher, tokens, segments).detach(), VOCAB_SIZE, 2.0)
    rows = TopLogits(*(tensor.unflatten(0, tokens.shape) for tensor in stored))
    found = StoredDistillObjective(decoder, settings, VOCAB_SIZE)(tokens, targets, segments, *rows)
    live = DistillObjective(decoder, settings, teacher)(tokens, targets, segments)
    torch.testing.assert_close(found, live, rtol=1e-4, atol=1e-4)  # stored in fp16
    rounded = torch.zeros(tokens.numel(), VOCAB_SIZE).scatter(1, stored.ids, stored.logits.float())
    kl = summed_kl(token_logits(decoder, tokens, segments), rounded, targets.flatten(), 2.0)
    expected = 4 * kl + 0.3 * decoder(tokens, targets, segments=segments)
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-6)
    check_gradients(gradients(decoder, found[0]), gradients(decoder, expected))


def test_rows_without_targets_add_nothing() -> None:
    tokens, targets, segments, _ = packed_rows()
    decoder = new_decoder(1)
    shape = (*tokens.shape, 5)
    padding = TopLogits(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape).half(), torch.zeros(tokens.shape))
    objective = StoredDistillObjective(decoder, Distill(kind="distill"), VOCAB_SIZE)
    sums = objective(tokens, torch.full_like(targets, IGNORED_TARGET), segments, *padding)
    assert not sums.any() and not any(gradient.any() for gradient in gradients(decoder, sums[0]).values())


@pytest.mark.gpu
def test_a_gpu_finds_the_divergence_that_a_cpu_does() -> None:
    student, teacher = random_logits()
    found = []
    for device in ("cpu", "cuda"):
        stored = find_top_logits(teacher.to(device), 7, 2.0)
        logits = student.detach().to(device).requires_grad_()
        divergence = summed_top_kl(logits, stored, TARGETS.to(device), 2.0)
        found.append((divergence.detach().cpu(), torch.autograd.grad(divergence, logits)[0].cpu()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
