"""Each objective's loss and gradient against plain formulas, on one process."""

import pytest
import torch
from torch import Tensor

from ray_ds.config.objective import Distill, Dpo, Lora
from ray_ds.errors import ConfigError
from ray_ds.model.decoder import Decoder, LossWeights
from ray_ds.model.initial import init_weights
from ray_ds.model.loss import IGNORED_TARGET
from ray_ds.train.distillation import DistillObjective, summed_kl
from ray_ds.train.lora import add_adapters, merge_adapters
from ray_ds.train.objective import NextTokenObjective, Objective
from ray_ds.train.preference import DpoObjective
from tests.train.runs import VOCAB_SIZE, make_settings

LENGTHS = ((5, 4), (3, 4))
"""Tokens of two documents in each of two rows of 12, which are filled up."""


def new_decoder(seed: int, std: float = 0.2) -> Decoder:
    decoder = Decoder(make_settings().new_model(VOCAB_SIZE))
    init_weights(decoder, seed)
    with torch.no_grad():  # larger than a first model's, so that models differ
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std, generator=torch.Generator().manual_seed(seed))
    return decoder


def packed_rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[list[tuple[Tensor, Tensor]]]]:
    """Return tokens, targets and segments, (2, 12) each, and every document alone as tokens and targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    targets = torch.full((2, 12), IGNORED_TARGET)
    segments = torch.full((2, 12), 2)
    alone: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, length in enumerate(lengths):
            document = torch.randint(3, VOCAB_SIZE, (length + 1,), generator=generator)
            wanted = document[1:].clone()
            wanted[:1] = IGNORED_TARGET
            tokens[row, at : at + length], targets[row, at : at + length] = document[:-1], wanted
            segments[row, at : at + length] = number
            alone[row].append((document[:-1][None], wanted[None]))
            at += length
    return tokens, targets, segments, alone


def log_prob(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return a document's log-probability of its targets, the obvious way."""
    log_probs = decoder(tokens).double().log_softmax(-1)[0]
    counted = targets[0] != IGNORED_TARGET
    return log_probs[counted].gather(1, targets[0][counted][:, None]).sum()


def gradients(decoder: Decoder, loss: Tensor) -> dict[str, Tensor]:
    decoder.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_packed_documents_cost_what_they_cost_alone() -> None:
    tokens, targets, segments, alone = packed_rows()
    decoder = new_decoder(1)
    found = NextTokenObjective(decoder)(tokens, targets, segments)
    expected = -sum(log_prob(decoder, *document) for row in alone for document in row)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)
    check_gradients(gradients(decoder, found[0]), gradients(decoder, expected))


def test_other_losses_are_minimised_and_shown_beside_the_loss() -> None:
    tokens, targets, segments, _ = packed_rows()
    plain = new_decoder(1)
    weighted = Decoder(plain.config, weights=LossWeights(balance=0.5))
    weighted.load_state_dict(plain.state_dict())
    objective = NextTokenObjective(weighted)
    total, loss, balance = objective(tokens, targets, segments)
    assert objective.figures == ("loss", "balance_loss") and float(balance) > 0
    torch.testing.assert_close(loss, NextTokenObjective(plain)(tokens, targets, segments)[0].detach())
    torch.testing.assert_close(total.detach(), loss + 0.5 * balance)
    objective.eval()
    assert float(objective(tokens, targets, segments)[0]) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.shows("DPO's loss and gradient are those of the paper's equation 7")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_equation_7(smoothing: float) -> None:
    tokens, targets, segments, alone = packed_rows()
    decoder, reference = new_decoder(1), new_decoder(2)
    settings = Dpo(kind="dpo", beta=0.3, label_smoothing=smoothing)
    sums = DpoObjective(decoder, settings, reference)(tokens, targets, segments)
    gains = [[log_prob(decoder, *d) - log_prob(reference, *d).detach() for d in row] for row in alone]
    margins = torch.stack([0.3 * (better - worse) for better, worse in gains])
    prob = torch.sigmoid(margins)
    expected = (-(1 - smoothing) * prob.log() - smoothing * (1 - prob).log()).sum()
    torch.testing.assert_close(sums[0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[1].double(), margins.sum(), rtol=1e-4, atol=1e-4)
    assert float(sums[2].detach()) == int((margins.detach() > 0).sum())
    found = gradients(decoder, sums[0])
    # The paper's gradient, -beta * sigmoid(-margin) * (grad better - grad worse), with s of the pairs turned round.
    weights = (1 - smoothing) * (1 - prob) - smoothing * prob
    analytic = -(0.3 * weights.detach() * torch.stack([better - worse for better, worse in gains])).sum()
    check_gradients(found, gradients(decoder, analytic))


@pytest.mark.shows("Distillation's gradient is the difference of the softmaxes, and equal models have nothing to learn")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_and_its_gradient_are_the_plain_ones(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_ds.model.loss.CPU_CHUNK", 64)  # two rows at a time
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(9, 30, generator=generator) * 3 for _ in range(2))
    targets = torch.tensor([1, IGNORED_TARGET, 2, 3, 4, IGNORED_TARGET, 5, 6, 7])
    student.requires_grad_()
    found = summed_kl(student, teacher, targets, temperature)
    counted = targets != IGNORED_TARGET
    p, q = ((logits.double() / temperature).softmax(-1) for logits in (teacher, student.detach()))
    expected = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)[counted].sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(gradient.double(), (q - p) / temperature * counted[:, None], rtol=1e-5, atol=1e-6)
    same = summed_kl(student, student.detach(), targets, temperature)
    assert float(same) == 0 and not torch.autograd.grad(same, student)[0].any()


def test_distillation_weighs_kl_and_cross_entropy() -> None:
    tokens, targets, segments, _ = packed_rows()
    decoder, teacher = new_decoder(1), new_decoder(2)
    settings = Distill(kind="distill", temperature=2.0, cross_entropy_weight=0.3)
    loss, kl, cross_entropy = DistillObjective(decoder, settings, teacher)(tokens, targets, segments)
    plain = NextTokenObjective(decoder)(tokens, targets, segments)[0]
    torch.testing.assert_close(cross_entropy, plain.detach())
    torch.testing.assert_close(loss, 4 * kl + 0.3 * cross_entropy)


@pytest.mark.parametrize("kind", ["next_token", "dpo", "distill"])
def test_rows_without_targets_add_nothing(kind: str) -> None:
    tokens, targets, segments, _ = packed_rows()
    decoder, other = new_decoder(1), new_decoder(2)
    objectives: dict[str, Objective] = {
        "next_token": NextTokenObjective(decoder),
        "dpo": DpoObjective(decoder, Dpo(kind="dpo"), other),
        "distill": DistillObjective(decoder, Distill(kind="distill"), other),
    }
    sums = objectives[kind](tokens * 0, torch.full_like(targets, IGNORED_TARGET), segments * 0)
    assert not sums.any() and not any(g.any() for g in gradients(decoder, sums[0]).values())
    names = {name for name, _ in objectives[kind].named_parameters()}
    assert names == {f"decoder.{name}" for name, _ in decoder.named_parameters()}  # what is only asked is no part


@pytest.mark.shows("A merged LoRA model computes what the adapters beside frozen weights do")
def test_merged_adapters_are_the_unmerged_model() -> None:
    tokens, targets, segments, _ = packed_rows()
    decoder, lora = new_decoder(1), Lora(rank=3, alpha=6.0)
    plain = decoder(tokens)
    names = [name for name, _ in decoder.named_parameters()]
    add_adapters(decoder, lora, seed=0)
    assert torch.equal(decoder(tokens), plain)  # B starts at 0
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in decoder.named_parameters()} - set(names)
    assert {name.rsplit(".", 2)[-2] for name in trained} == {
        "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    merged, adapters = merge_adapters(decoder.state_dict(), lora)
    assert adapters.keys() == trained
    other = new_decoder(4)
    other.load_state_dict(merged)
    assert (decoder(tokens) - plain).abs().max() > 0.1
    torch.testing.assert_close(other(tokens), decoder(tokens), rtol=1e-4, atol=1e-4)
    sums = [NextTokenObjective(each)(tokens, targets, segments) for each in (decoder, other)]
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-4)


def test_a_pattern_that_names_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.modules \(\*.qproj\) must name linear layers of the model: down_"):
        add_adapters(new_decoder(0), Lora(modules=("*.qproj",)), seed=0)
