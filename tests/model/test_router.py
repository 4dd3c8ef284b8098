import dataclasses

import pytest
import torch

from ray_ds.config.model import ModelConfig
from ray_ds.config.presets import PRESETS
from ray_ds.model.balance import expert_load, max_violation, reset_expert_load
from ray_ds.model.decoder import LossWeights
from ray_ds.model.loss import IGNORED_TARGET
from ray_ds.model.router import Gate, sequence_balance
from tests.model.models import LATENT, V2, batch, new_decoder

GROUPED = dataclasses.replace(
    PRESETS["tiny"], n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3, routed_scaling_factor=2.5
)
UNGROUPED = dataclasses.replace(GROUPED, n_group=1, topk_group=1)


def new_gate(config: ModelConfig) -> Gate:
    gate = Gate(config)
    torch.nn.init.normal_(gate.weight, std=0.3)
    gate.e_score_correction_bias.normal_(std=0.3)
    return gate


@pytest.mark.parametrize("config", [GROUPED, UNGROUPED, dataclasses.replace(GROUPED, norm_topk_prob=False)])
def test_gate_chooses_by_biased_scores_within_the_best_groups_and_weighs_by_plain_ones(config):
    gate = new_gate(config)
    x = torch.randn(50, config.hidden_size)
    weights, chosen, _ = gate(x)
    size = config.n_routed_experts // config.n_group
    for token, token_weights, token_chosen in zip(x, weights, chosen, strict=True):
        scores = [1 / (1 + (-(token @ w)).exp()) for w in gate.weight]
        biased = [(s + b).item() for s, b in zip(scores, gate.e_score_correction_bias, strict=True)]
        groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
        groups.sort(key=lambda group: sum(sorted(biased[e] for e in group)[-2:]), reverse=True)
        allowed = [e for group in groups[: config.topk_group] for e in group]
        wanted = sorted(allowed, key=lambda e: biased[e], reverse=True)[: config.num_experts_per_tok]
        assert set(token_chosen.tolist()) == set(wanted)
        total = sum(scores[e] for e in wanted) if config.norm_topk_prob else 1
        plain = torch.stack([scores[e] / total * config.routed_scaling_factor for e in token_chosen.tolist()])
        torch.testing.assert_close(token_weights, plain)


def test_the_bias_has_no_part_in_the_weights_gradient():
    gate = new_gate(UNGROUPED)
    weights, _, _ = gate(torch.randn(5, UNGROUPED.hidden_size))
    weights.square().sum().backward()
    assert not gate.e_score_correction_bias.requires_grad
    assert gate.weight.grad.any()


def test_v2_limits_groups_by_their_best_expert():
    config = dataclasses.replace(
        GROUPED, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False
    )
    gate = Gate(config)
    torch.nn.init.normal_(gate.weight, std=0.3)
    assert gate.e_score_correction_bias is None
    x = torch.randn(50, config.hidden_size)
    weights, chosen, scores = gate(x)
    torch.testing.assert_close(scores, (x @ gate.weight.T).softmax(-1))
    for row, token_weights, token_chosen in zip(scores, weights, chosen, strict=True):
        groups = sorted(row.view(4, 4).tolist(), key=max, reverse=True)[:2]
        wanted = sorted((score for group in groups for score in group), reverse=True)[:3]
        torch.testing.assert_close(row[token_chosen].sort(descending=True).values, torch.tensor(wanted))
        torch.testing.assert_close(token_weights, row[token_chosen] * 2.5)


def plain_balance(scores: torch.Tensor, num_picked: int) -> torch.Tensor:
    """Return equations 17 to 20 of arXiv 2412.19437 for one sequence, (T, E), expert by expert."""
    length, num_experts = scores.shape
    total = torch.zeros(())
    for expert in range(num_experts):
        hits = sum(expert in scores[t].topk(num_picked).indices for t in range(length))
        frequency = num_experts / (num_picked * length) * hits
        share = sum(scores[t, expert] / scores[t].sum() for t in range(length)) / length
        total = total + frequency * share
    return total


@pytest.mark.parametrize("function", [torch.sigmoid, lambda x: x.softmax(-1)], ids=["sigmoid", "softmax"])
def test_balance_and_its_gradient_are_those_of_the_formula(function):
    logits = torch.randn(3, 10, 6, requires_grad=True)
    scores = function(logits)
    found = sequence_balance(scores, scores.topk(2, dim=-1).indices)
    wanted = torch.stack([plain_balance(row, 2) for row in scores])
    torch.testing.assert_close(found, wanted)
    weights = torch.tensor([1.0, 2.0, -1.0])
    (ours,) = torch.autograd.grad((found * weights).sum(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad((wanted * weights).sum(), logits)
    torch.testing.assert_close(ours, theirs)


def test_balance_is_1_where_even_and_grows_to_the_experts_a_choice():
    even = torch.full((1, 6, 6), 0.5)
    picked = torch.arange(12).view(1, 6, 2) % 6
    torch.testing.assert_close(sequence_balance(even, picked), torch.ones(1))
    collapsed = torch.full((1, 6, 6), 1e-9)
    collapsed[..., :2] = 1
    torch.testing.assert_close(sequence_balance(collapsed, torch.tensor([0, 1]).expand(1, 6, 2)), torch.tensor([3.0]))


@pytest.mark.parametrize("config", [LATENT, V2], ids=["v3", "v2"])
def test_each_row_counts_as_often_as_it_has_targets(config):
    tokens, targets = batch(config)
    targets[0, :15] = IGNORED_TARGET
    targets[1] = IGNORED_TARGET
    decoder = new_decoder(config, scale=3, weights=LossWeights(balance=0.25))
    plain = new_decoder(config, scale=3)(tokens, targets)
    added = decoder(tokens, targets) - plain
    rows = []
    for tokens_of_row in tokens:
        one = new_decoder(config, scale=3, weights=LossWeights(balance=0.25))
        one(tokens_of_row[None], torch.zeros(1, 20, dtype=torch.int64))
        rows.append(one.extra_losses[1] / 20)
    assert rows[0] != rows[2]
    torch.testing.assert_close(decoder.extra_losses[1], 5 * rows[0] + 20 * rows[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(added, 0.25 * decoder.extra_losses[1], rtol=1e-3, atol=1e-3)


@pytest.mark.shows("The sequence-wise balance loss makes busy experts less busy")
@pytest.mark.parametrize("config", [LATENT, V2], ids=["v3", "v2"])
def test_training_with_the_loss_balances_the_experts(config):
    def violation(weight: float) -> float:
        decoder = new_decoder(dataclasses.replace(config, n_routed_experts=8), weights=LossWeights(balance=weight))
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
        total = torch.zeros(1, 8, dtype=torch.int64)
        tokens, targets = batch(config, rows=4, length=32)
        for step in range(25):
            optimizer.zero_grad()
            (decoder(tokens, targets) / targets.numel()).backward()
            optimizer.step()
            total += expert_load(decoder) if step >= 20 else 0
            reset_expert_load(decoder)
        return max_violation(total).item()

    assert violation(0.3) < 0.5 * violation(0.0)
