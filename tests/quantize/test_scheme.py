import numpy as np
import pytest
import torch

from ray_ds.quantize.scheme import dequantize_weight, integer_sums, quantize_tokens, quantize_weight


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_weights_are_off_by_at_most_half_a_step() -> None:
    weight = random(33, 70) * torch.logspace(-6, 3, 33)[:, None]
    values, scale = quantize_weight(weight)
    assert values.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (33, 1)
    error = (dequantize_weight(values, scale) - weight).abs()
    assert (error <= 0.5001 * scale).all()


def test_each_row_uses_the_whole_range_and_never_minus_128() -> None:
    values, _ = quantize_weight(random(50, 300))
    assert (values.to(torch.int16).abs().amax(dim=1) == 127).all()


def test_weights_match_an_independent_quantizer() -> None:
    weight = random(20, 64).numpy()
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    values, found_scale = quantize_weight(torch.from_numpy(weight))
    assert np.array_equal(found_scale.numpy(), scale)
    assert np.array_equal(values.numpy(), np.rint(weight / scale).astype(np.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_off_by_at_most_half_a_step(dtype: torch.dtype) -> None:
    x = (random(9, 48) * torch.logspace(-5, 5, 9)[:, None]).to(dtype)
    values, scale = quantize_tokens(x)
    assert ((values.float() * scale - x.float()).abs() <= 0.5001 * scale).all()


def test_a_zero_point_only_moves_the_integers() -> None:
    x = random(9, 48)
    signed, scale = quantize_tokens(x)
    unsigned, same_scale = quantize_tokens(x, zero_point=128)
    assert unsigned.dtype == torch.uint8
    assert torch.equal(unsigned.to(torch.int16) - 128, signed.to(torch.int16))
    assert torch.equal(scale, same_scale)


@pytest.mark.parametrize("zero_point", [0, 128])
def test_tokens_are_rounded_to_the_nearest_integer_and_halves_to_even(zero_point: int) -> None:
    ratios = torch.arange(-127, 127.5, 0.5)[None]  # the largest is 127, so the scale is 1
    values, scale = quantize_tokens(ratios, zero_point)
    assert scale.item() == 1
    assert np.array_equal(values.to(torch.int64).numpy() - zero_point, np.rint(ratios.numpy()).astype(np.int64))


def test_zeros_stay_zeros() -> None:
    for quantize in (quantize_tokens, quantize_weight):
        values, scale = quantize(torch.zeros(3, 8))
        assert not values.any() and scale.isfinite().all()


def test_a_token_that_is_not_a_number_is_not_hidden() -> None:
    x = random(3, 8)
    x[1, 4] = float("nan")
    _, scale = quantize_tokens(x)
    assert scale.isnan().flatten().tolist() == [False, True, False]


def test_sums_equal_those_of_64_bit_integers() -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(-127, 128, (12, 3000), dtype=np.int8)
    weight = generator.integers(-127, 128, (7, 3000), dtype=np.int8)
    weight[0], x[0] = 127, 127
    expected = (x.astype(np.int64) @ weight.astype(np.int64).T).astype(np.float32)
    assert np.array_equal(integer_sums(torch.from_numpy(x), torch.from_numpy(weight)).numpy(), expected)
