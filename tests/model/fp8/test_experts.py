"""Experts in FP8: against products of the same numbers in fp64, and against the exact layer."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from ray_ds.config.presets import PRESETS
from ray_ds.model.experts import Experts, lay_out
from ray_ds.model.fp8.experts import Fp8Experts, fill_up, grouped_product
from ray_ds.model.fp8.numbers import FINE, quantize

WIDTH, INNER, NUM_EXPERTS = 64, 48, 6
CONFIG = dataclasses.replace(
    PRESETS["tiny"], hidden_size=WIDTH, moe_intermediate_size=INNER, n_routed_experts=NUM_EXPERTS
)


def relative_error(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def exact_experts() -> Experts:
    experts = Experts(CONFIG)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return experts.bfloat16()


def choices(num_tokens: int) -> Tensor:
    """Return two experts a token; nobody chooses expert 2 or the last."""
    busy = torch.tensor([0, 1, 3, 4])
    return torch.stack([busy[torch.randperm(4)[:2]] for _ in range(num_tokens)])


@pytest.mark.parametrize("num_tokens", [1, 7, 33, 64])
def test_a_layout_is_filled_up_to_whole_blocks_of_rows(num_tokens: int) -> None:
    chosen = choices(num_tokens)
    layout = lay_out(chosen, NUM_EXPERTS)
    filled = fill_up(layout)
    sizes = filled.ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    assert (sizes % 16 == 0).all() and (sizes >= 16).all() and filled.ends[-1] == len(filled.order)
    assert filled.order[filled.inverse].tolist() == list(range(2 * num_tokens)), "each choice has a row"
    expert = torch.searchsorted(filled.ends, filled.inverse, right=True)
    assert expert.tolist() == chosen.flatten().tolist(), "among those of its expert"


def test_products_are_those_of_the_quantized_operands() -> None:
    offsets = torch.tensor([16, 64, 80, 96, 112, 128], dtype=torch.int32)
    rows = torch.randn(128, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(NUM_EXPERTS, INNER, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(128, INNER, dtype=torch.bfloat16)
    out = grouped_product(rows, weights, offsets)
    out.backward(grad)
    x, g = (q.double() * scale.double() for q, scale in (quantize(rows, FINE), quantize(grad, FINE)))
    w8, scales = quantize(weights, FINE, dims=(1, 2))
    w = w8.double() * scales[:, None, None].double()
    expert = torch.searchsorted(offsets, torch.arange(128), right=True)
    w_grad = torch.stack([g[expert == e].T @ x[expert == e] for e in range(NUM_EXPERTS)])
    wanted = (torch.einsum("nd,nod->no", x, w[expert]), torch.einsum("no,nod->nd", g, w[expert]), w_grad)
    for found, exact in zip((out, rows.grad, weights.grad), wanted, strict=True):
        assert found is not None and found.dtype == torch.bfloat16
        assert relative_error(found, exact) < 4e-3  # rounding of the result to bf16


def test_output_and_gradients_are_near_those_of_the_exact_layer() -> None:
    num_tokens = 50
    exact = exact_experts()
    fp8 = Fp8Experts.of(exact)
    chosen, weights = choices(num_tokens), torch.rand(num_tokens, 2)
    grad = torch.randn(num_tokens, WIDTH).bfloat16()
    results = []
    for layer in (exact, fp8):
        x = torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
        shares = weights.clone().requires_grad_()
        out = layer(x, shares, chosen)
        results.append((out, *torch.autograd.grad(out, (x, shares, *layer.parameters()), grad)))
    for found, wanted in zip(*reversed(results), strict=True):
        # Six operands on the longest way, each off by 2^-4 / sqrt(3) of itself at the most in root mean square.
        assert found.dtype == wanted.dtype and relative_error(found, wanted) < 6**0.5 * 2**-4 / 3**0.5
    for gradient in results[1][3:]:
        assert not gradient[2].any() and not gradient[-1].any(), "an expert without tokens has a gradient of zero"


def test_the_kernel_takes_the_operands() -> None:
    """By torch's own checks of shapes, strides and types, which it makes without a device too."""
    rows = torch.empty(128, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weights = torch.empty(NUM_EXPERTS, INNER, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out = grouped_product(rows, weights, torch.empty(NUM_EXPERTS, dtype=torch.int32, device="meta"))
    assert out.shape == (128, INNER) and out.dtype == torch.bfloat16
    out.backward(torch.empty_like(out))
    for operand in (rows, weights):
        assert operand.grad is not None and operand.grad.shape == operand.shape


def test_evaluation_is_exact_and_parameters_are_the_same_objects() -> None:
    exact = exact_experts()
    fp8 = Fp8Experts.of(exact).eval()
    assert all(fp8.get_parameter(name) is parameter for name, parameter in exact.named_parameters())
    x, weights, chosen = torch.randn(9, WIDTH).bfloat16(), torch.rand(9, 2), choices(9)
    assert torch.equal(fp8(x, weights, chosen), exact(x, weights, chosen))


def test_they_learn_what_experts_in_bf16_learn() -> None:
    x, chosen, shares = torch.randn(256, WIDTH).bfloat16(), choices(256), torch.full((256, 2), 0.5)
    wanted = exact_experts()(x, shares, chosen).detach()
    start = exact_experts()
    explained = []
    for layer in (copy.deepcopy(start), Fp8Experts.of(start)):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            (layer(x, shares, chosen) - wanted).float().square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            off = layer.eval()(x, shares, chosen) - wanted
        explained.append(1 - float(off.float().square().mean() / wanted.float().square().mean()))
    assert explained[0] > 0.9
    assert explained[1] == pytest.approx(explained[0], abs=0.02)


def test_a_bad_number_stays_one() -> None:
    x = torch.randn(9, WIDTH).bfloat16()
    x[3, 5] = float("inf")
    assert Fp8Experts.of(exact_experts())(x, torch.rand(9, 2), choices(9)).isnan().any()
