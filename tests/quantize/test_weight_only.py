import pytest
import torch
import torch.nn.functional as F

from ray_ds.quantize.kernels import self_test
from ray_ds.quantize.layers import QuantizedExperts, QuantizedLinear, QuantizedMLP
from ray_ds.quantize.layout import pack, unpack
from ray_ds.quantize.scheme import dequantize_weight, quantize_weight


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_only_weights_are_rounded(dtype: torch.dtype, tolerance: float) -> None:
    weight = quantize_weight(random(96, 48))
    x = (random(5, 48, seed=1) * 1e3).to(dtype)
    found = QuantizedLinear(weight, "weight_only")(x)
    expected = F.linear(x.double(), dequantize_weight(*weight).double())
    assert found.dtype == dtype
    assert (found.double() - expected).norm() / expected.norm() < tolerance


def test_an_mlp_and_experts_keep_the_type_of_their_input() -> None:
    gate, up, down = quantize_weight(random(80, 48)), quantize_weight(random(80, 48, seed=1)), random(48, 80, seed=2)
    x = random(6, 48, seed=3).bfloat16()
    mlp = QuantizedMLP(gate, up, quantize_weight(down), "weight_only")
    experts = QuantizedExperts([(gate, up, quantize_weight(down))], "weight_only")
    alone = experts(x, torch.ones(6, 1), torch.zeros(6, 1, dtype=torch.int64))
    assert mlp(x).dtype == alone.dtype == torch.bfloat16
    torch.testing.assert_close(alone, mlp(x))


@pytest.mark.parametrize("columns", [4, 5, 7, 64])
def test_packed_values_are_those_of_compressed_tensors(columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    values, _ = quantize_weight(random(6, columns))
    packed = pack(values)
    assert torch.equal(packed, pack_to_int32(values, 8))
    assert torch.equal(unpack(packed, columns), values)
    assert torch.equal(unpack_from_int32(packed, 8, torch.Size((6, columns))), values)


def test_it_has_one_road_everywhere() -> None:
    assert self_test("cpu", scheme="w8a16").road == "weight_only"
