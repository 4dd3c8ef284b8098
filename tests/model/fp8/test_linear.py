"""Linear layers in FP8: how far they are from exact ones, and that a model learns through them as it does in bf16."""

import pytest
import torch
from torch import Tensor, nn

from ray_ds.model.fp8 import Fp8Linear
from ray_ds.model.fp8.numbers import FINE, quantize

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


def test_a_number_is_off_by_half_a_step_at_most_whatever_other_rows_hold() -> None:
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1.0, 30.0, 1e4])[:, None]
    x8, scales = quantize(x, FINE, dims=(1,))
    normal = x.abs() > x.abs().amax(dim=1, keepdim=True) * 2.0**-10  # smaller ones have fewer bits
    found = x8.float() * scales[:, None]
    assert ((found - x).abs() <= x.abs() * 2.0**-4 * 1.0001)[normal].all()
    torch.testing.assert_close(found.abs().amax(dim=1), x.abs().amax(dim=1))


def quantized(x: Tensor) -> Tensor:
    """Return what FP8 makes of the rows of `x`."""
    x8, scales = quantize(x, FINE, dims=(1,))
    return x8.double() * scales[:, None].double()


def test_products_are_those_of_the_quantized_operands(layer: Fp8Linear) -> None:
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(ROWS, OUT, dtype=torch.bfloat16)
    out = layer(x)
    out.backward(grad)
    weight = layer.weight.detach()
    products = (
        (out, quantized(x.detach()) @ quantized(weight).T),
        (x.grad, quantized(grad) @ quantized(weight.T).T),
        (layer.weight.grad, grad.double().T @ x.detach().double()),
    )
    for found, exact in products:
        assert found is not None and found.dtype == torch.bfloat16
        assert relative_error(found, exact) < 4e-3  # rounding of the result to bf16


def test_a_large_row_takes_no_bits_from_the_others(layer: Fp8Linear) -> None:
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16)
    before = layer(x)
    x[0] *= 1e5
    assert torch.equal(layer(x)[1:], before[1:])


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
