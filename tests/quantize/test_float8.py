import pytest
import torch
import torch.nn.functional as F

from ray_ds.quantize.float8 import E4M3, Float8ReferenceWeight, float8_sums, quantize_rows
from ray_ds.quantize.kernels import pack_weight, self_test


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rows_use_the_whole_range_and_are_off_by_half_a_step() -> None:
    x = random(9, 48) * torch.logspace(-5, 5, 9)[:, None]
    values, scale = quantize_rows(x)
    assert values.dtype == E4M3 and scale.shape == (9, 1)
    assert (values.float().abs().amax(dim=1) == 448).all()
    # Three bits behind the point: half a step is a sixteenth of the number, or of the smallest normal one, 2**-6.
    error = (values.float() * scale - x).abs()
    assert (error <= torch.maximum(x.abs(), scale * 2**-6) / 16 * 1.0001).all()


def test_zeros_stay_zeros() -> None:
    values, scale = quantize_rows(torch.zeros(3, 8))
    assert not values.float().any() and scale.isfinite().all()


def test_sums_are_exact_whatever_the_order() -> None:
    x, weight = quantize_rows(random(5, 4096) * 10)[0], quantize_rows(random(7, 4096, seed=1))[0]
    sums = float8_sums(x, weight)
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(2))
    assert torch.equal(float8_sums(x.float()[:, order].to(E4M3), weight.float()[:, order].to(E4M3)), sums)
    as_integers = (x.double() * 512).long() @ (weight.double() * 512).long().T  # multiples of 2**-9 both
    assert torch.equal(sums, (as_integers.double() / 2**18).float())


def test_a_token_never_depends_on_the_others_of_its_batch() -> None:
    packed = Float8ReferenceWeight(*quantize_rows(random(40, 64)))
    x = random(16, 64, seed=1)
    together = packed.multiply(*packed.quantize(x))
    assert torch.equal(together, torch.cat([packed.multiply(*packed.quantize(row[None])) for row in x]))
    assert (together - F.linear(x, random(40, 64))).norm() / together.norm() < 0.05


def test_a_processor_takes_the_reference() -> None:
    found = self_test("cpu", shapes=[(6, 16)], scheme="fp8")
    assert (found.road, dict(found.rejected)) == ("float8_reference", {})


@pytest.mark.gpu
def test_tensor_cores_are_near_the_reference() -> None:
    found = self_test("cuda", scheme="fp8")
    assert found.road == "cuda_scaled_mm", found.rejected
    for out_features, in_features in ((256, 128), (33, 70)):
        weight, scale = quantize_rows(random(out_features, in_features))
        x = random(19, in_features, seed=1)
        reference = Float8ReferenceWeight(weight, scale)
        expected = reference.multiply(*reference.quantize(x))
        packed = pack_weight(weight.cuda(), scale.cuda(), "cuda_scaled_mm")
        product = packed.multiply(*packed.quantize(x.cuda())).cpu()
        assert (product - expected).norm() / expected.norm() < 1e-3
