"""Linear layers in FP8: how far they are from exact ones, and that a model learns through them as it does in bf16."""

import pytest
import torch
from torch import Tensor, nn

from ray_ds.model.fp8 import Fp8Linear
from ray_ds.model.fp8.numbers import FINE, WIDE, quantize

ROWS, WIDTH, OUT = 64, 96, 48


@pytest.fixture
def layer() -> Fp8Linear:
    torch.manual_seed(0)
    layer = Fp8Linear(WIDTH, OUT, bias=False)
    nn.init.normal_(layer.weight)
    return layer.bfloat16()


def relative_error(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(("dtype", "bits"), [(FINE, 3), (WIDE, 2)])
def test_a_number_is_off_by_half_a_step_at_most(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    x8, scale = quantize(x, dtype)
    normal = x.abs() > x.abs().max() * 2.0**-10  # smaller ones have fewer bits
    found = x8.float() * scale
    assert ((found - x).abs() <= x.abs() * 2.0 ** -(bits + 1) * 1.0001)[normal].all()
    assert found.abs().max() == pytest.approx(float(x.abs().max()), rel=1e-6)


def test_products_are_those_of_the_quantized_operands(layer: Fp8Linear) -> None:
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(ROWS, OUT, dtype=torch.bfloat16)
    out = layer(x)
    out.backward(grad)
    x_wide, w_wide = (
        q.double() * s.double() for q, s in (quantize(x.detach(), FINE), quantize(layer.weight.detach(), FINE))
    )
    g8, g_scale = quantize(grad, WIDE)
    g_wide = g8.double() * g_scale.double()
    for found, exact in ((out, x_wide @ w_wide.T), (x.grad, g_wide @ w_wide), (layer.weight.grad, g_wide.T @ x_wide)):
        assert found is not None and found.dtype == torch.bfloat16
        assert relative_error(found, exact) < 4e-3  # rounding of the result to bf16


def test_output_and_gradients_are_near_those_of_the_exact_layer(layer: Fp8Linear) -> None:
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16)
    exact = x.double() @ layer.weight.double().T
    assert relative_error(layer(x), exact) < 0.05
    assert relative_error(layer.eval()(x), exact) < 4e-3, "evaluation is not in FP8"


def test_rows_of_an_odd_number_take_the_exact_way(layer: Fp8Linear) -> None:
    x = torch.randn(17, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))


def test_a_bad_number_stays_one(layer: Fp8Linear) -> None:
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16)
    x[3, 5] = float("inf")
    assert layer(x).isnan().any()
