import dataclasses

import pytest
import torch

from ray_ds.config.model import ModelConfig
from ray_ds.config.presets import PRESETS
from ray_ds.model.experts import Experts, MoE
from ray_ds.model.router import Gate

GROUPED = dataclasses.replace(
    PRESETS["tiny"], n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3, routed_scaling_factor=2.5
)


def new_gate(config: ModelConfig) -> Gate:
    gate = Gate(config)
    torch.nn.init.normal_(gate.weight, std=0.3)
    gate.e_score_correction_bias.normal_(std=0.3)
    return gate


def new_experts(config: ModelConfig) -> Experts:
    experts = Experts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts


@pytest.mark.parametrize("num_tokens", [1, 2, 64])
def test_experts_are_a_weighted_sum_of_gated_mlps(num_tokens):
    experts = new_experts(GROUPED)
    x = torch.randn(num_tokens, GROUPED.hidden_size, requires_grad=True)
    weights, chosen, _ = new_gate(GROUPED)(x.detach())
    weights = weights.detach().requires_grad_()

    def one(expert: int, token: torch.Tensor) -> torch.Tensor:
        gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
        return experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)

    rows = zip(x, weights, chosen, strict=True)
    wanted = torch.stack([sum(w * one(int(e), token) for w, e in zip(ws, es, strict=True)) for token, ws, es in rows])
    leaves = (x, weights, *experts.parameters())
    found = experts(x, weights, chosen)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    out_grad = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, out_grad), torch.autograd.grad(wanted, leaves, out_grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    experts = new_experts(GROUPED)
    chosen = torch.tensor([[0, 1, 2]])
    experts(torch.randn(1, GROUPED.hidden_size), torch.ones(1, 3), chosen).sum().backward()
    assert experts.down_proj.grad[:3].any()
    assert not experts.down_proj.grad[3:].any()
    assert not experts.gate_up_proj.grad[3:].any()


def test_load_counts_every_choice():
    moe = MoE(GROUPED)
    moe.gate.weight.data.normal_()
    for parameter in moe.experts.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 5, GROUPED.hidden_size)
    _, load, _ = moe(x)
    _, chosen, _ = moe.gate(x.flatten(0, 1))
    assert load.tolist() == torch.bincount(chosen.flatten(), minlength=16).tolist()


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_the_bias_stays_fp32_when_the_module_is_cast(cast):
    moe = MoE(GROUPED)
    moe.gate.e_score_correction_bias.copy_(torch.linspace(0, 1, 16) / 3)
    before = moe.gate.e_score_correction_bias.clone()
    getattr(moe, cast)()
    assert moe.gate.weight.dtype != torch.float32
    assert moe.gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(moe.gate.e_score_correction_bias, before)
    assert moe.state_dict()["gate.e_score_correction_bias"].dtype == torch.float32


def test_counts_are_whole_and_not_part_of_a_checkpoint():
    moe = MoE(GROUPED).bfloat16()
    assert moe.gate.expert_load.dtype == torch.int64
    assert not any("load" in name for name in moe.state_dict())


def test_grouped_products_give_what_the_loop_does():
    results = []
    x = torch.randn(40, GROUPED.hidden_size)
    weights, chosen, _ = new_gate(GROUPED)(x)
    for kernels in ("plain", "fast"):
        torch.manual_seed(1)
        experts = Experts(GROUPED, kernels)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        out = experts(x, weights.detach(), chosen)
        out.square().sum().backward()
        results.append((out, *(parameter.grad for parameter in experts.parameters())))
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_a_layer_may_have_no_shared_experts():
    moe = MoE(dataclasses.replace(GROUPED, n_shared_experts=0))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 5, GROUPED.hidden_size)
    tokens = x.flatten(0, 1)
    torch.testing.assert_close(moe(x)[0].flatten(0, 1), moe.experts(tokens, *moe.gate(tokens)[:2]))
