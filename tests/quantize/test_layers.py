import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_ds.quantize.kernels import Road, self_test
from ray_ds.quantize.layers import QuantizedExperts, QuantizedLinear, QuantizedMLP, QuantizedWeight
from ray_ds.quantize.scheme import dequantize_weight, quantize_tokens, quantize_weight

ROAD = self_test().road


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fake_quantized_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Multiply what the integers stand for in fp64: the same mathematics with other rounding."""
    values, scale = quantize_tokens(x.flatten(0, -2))
    product = (values * scale).double() @ dequantize_weight(*weight).double().T
    return product.view(*x.shape[:-1], -1).float()


def fake_quantized_mlp(x: Tensor, gate: QuantizedWeight, up: QuantizedWeight, down: QuantizedWeight) -> Tensor:
    return fake_quantized_linear(F.silu(fake_quantized_linear(x, gate)) * fake_quantized_linear(x, up), down)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48)])
def test_a_linear_layer_keeps_shape_and_type_and_is_near_the_float_layer(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = random(96, 48)
    x = random(*shape, seed=1).to(dtype)
    found = QuantizedLinear(quantize_weight(weight), ROAD)(x)
    assert found.shape == (*shape[:-1], 96) and found.dtype == dtype
    assert relative_error(found, F.linear(x.float(), weight)) < 0.02


def test_a_linear_layer_computes_what_its_integers_stand_for() -> None:
    weight = quantize_weight(random(96, 48))
    x = random(4, 7, 48, seed=1)
    assert relative_error(QuantizedLinear(weight, ROAD)(x), fake_quantized_linear(x, weight)) < 1e-6


def test_an_mlp_computes_what_its_integers_stand_for() -> None:
    weights = [quantize_weight(random(*shape, seed=i)) for i, shape in enumerate([(80, 48), (80, 48), (48, 80)])]
    x = random(2, 6, 48, seed=9)
    found = QuantizedMLP(*weights, ROAD)(x)
    assert found.shape == x.shape
    assert relative_error(found, fake_quantized_mlp(x, *weights)) < 1e-3  # a rare value falls to the next integer


def make_experts(count: int) -> list[tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]]:
    return [
        (
            quantize_weight(random(40, 48, seed=3 * e)),
            quantize_weight(random(40, 48, seed=3 * e + 1)),
            quantize_weight(random(48, 40, seed=3 * e + 2)),
        )
        for e in range(count)
    ]


@pytest.mark.parametrize("road", [ROAD, "reference"])
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_experts_equal_a_loop_over_tokens_and_their_experts(num_tokens: int, road: Road) -> None:
    weights = make_experts(6)
    mlps = [QuantizedMLP(*expert, ROAD) for expert in weights]
    x = random(num_tokens, 48, seed=100)
    chosen = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:2] for i in range(num_tokens)])
    gates = random(num_tokens, 2, seed=101).sigmoid()
    expected = torch.stack(
        [sum(gates[n, k] * mlps[chosen[n, k]](x[n]) for k in range(2)) for n in range(num_tokens)]  # type: ignore[misc]
    )
    found = QuantizedExperts(weights, road)(x, gates, chosen)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_an_experts_token_never_depends_on_the_others_of_its_batch() -> None:
    experts = QuantizedExperts(make_experts(4), ROAD)
    x = random(33, 48).bfloat16()
    chosen = torch.randint(0, 4, (33, 1), generator=torch.Generator().manual_seed(0))
    gates = torch.ones(33, 1)
    together = experts(x, gates, chosen)
    alone = torch.cat([experts(x[n : n + 1], gates[:1], chosen[n : n + 1]) for n in range(33)])
    assert torch.equal(together, alone)


def test_quantized_layers_hold_no_float_weights() -> None:
    linear = QuantizedLinear(quantize_weight(random(8, 16)), ROAD)
    modules: list[nn.Module] = [linear, QuantizedExperts(make_experts(2), ROAD)]
    assert not any(list(module.parameters()) for module in modules)
