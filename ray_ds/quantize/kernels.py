"""Products with quantized weights: the roads of each scheme, and the self-test that picks one when a process starts.

All roads of W8A8 give the same bits. Those of FP8 are near each other, as tensor cores round while they add.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ray_ds.config.quantize import Scheme
from ray_ds.quantize.cuda_int8 import IntMmWeight, TritonStack, TritonWeight, has_triton
from ray_ds.quantize.float8 import Float8ReferenceWeight, ScaledMmWeight, float8_sums, quantize_rows
from ray_ds.quantize.onednn import OneDnnWeight, TwoPassWeight, is_available
from ray_ds.quantize.scheme import INT8_MAX, MAX_IN_FEATURES, integer_sums, quantize_tokens
from ray_ds.quantize.weight_only import WeightOnly

Road = Literal[
    "onednn",
    "onednn_two_pass",
    "cuda_triton",
    "cuda_int_mm",
    "reference",
    "weight_only",
    "cuda_scaled_mm",
    "float8_reference",
]
"""Which kernel multiplies: the first five for `w8a8`, then one for `w8a16`, the last two for `fp8`."""
FALLBACKS: Mapping[Scheme, Road] = {"w8a8": "reference", "w8a16": "weight_only", "fp8": "float8_reference"}
"""The road of each scheme that is right on every device."""

SELF_TEST_SHAPES = ((48, 64), (5, 17), (1024, 256), (256, 688), (33, 2500))
"""(N, K) of weights that the self-test tries if it is given no others: usual, tiny, odd ones, sums beyond 2**24."""
SELF_TEST_TOKENS = (1, 5, 40)
"""Batch sizes the self-test tries; kernels differ for one row, a few and many."""
FLOAT8_TOLERANCE = 2.0**-10
"""By how much of the products' magnitudes, added up, FP8 sums may be off: Hopper's tensor cores add in about 14 bits
(DeepSeek-V3, arXiv 2412.19437, section 3.3.2)."""


class PackedWeight(Protocol):
    """A weight laid out for one road."""

    in_features: int
    out_features: int

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (M, K) as this road multiplies them, and their fp32 scales (M, 1)."""

    def multiply(self, x: Tensor, token_scale: Tensor) -> Tensor:
        """Return the product of tokens from `quantize` with the weight: (M, N), in fp32 if tokens were rounded."""


class PackedStack(Protocol):
    """Weights of one shape, such as those of a layer's experts, laid out for one road."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (M, K) as this road multiplies them, and their fp32 scales (M, 1)."""

    def multiply(self, x: Tensor, token_scale: Tensor, ends: Tensor) -> Tensor:
        """Return each weight's product with its rows: (M, N), in fp32 if tokens were rounded.

        Args:
            ends: (E,) int64, where each weight's rows end; they lie behind each other.
        """


class ReferenceWeight:
    """A weight as it is on disk, multiplied by `integer_sums`: exact everywhere, and slow."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._scale = scale.flatten()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (M, K) as int8 and their scales (M, 1)."""
        return quantize_tokens(x)

    def multiply(self, x: Tensor, token_scale: Tensor) -> Tensor:
        """Return the product of tokens from `quantize` with the weight: fp32 (M, N)."""
        return integer_sums(x, self._weight).mul_(self._scale).mul_(token_scale)


_ROADS: Mapping[Road, Callable[[Tensor, Tensor], PackedWeight]] = {
    "onednn": OneDnnWeight,
    "onednn_two_pass": TwoPassWeight,
    "cuda_triton": TritonWeight,
    "cuda_int_mm": IntMmWeight,
    "reference": ReferenceWeight,
    "weight_only": WeightOnly,
    "cuda_scaled_mm": ScaledMmWeight,
    "float8_reference": Float8ReferenceWeight,
}


def pack_weight(weight: Tensor, scale: Tensor, road: Road) -> PackedWeight:
    """Return a weight's values (N, K) with their fp32 scales (N, 1), laid out for one road of its scheme."""
    assert weight.shape[1] <= MAX_IN_FEATURES, f"{weight.shape[1]} inputs could overflow int32"
    return _ROADS[road](weight, scale)


class WeightLoop:
    """Weights multiplied one after the other."""

    def __init__(self, weights: Sequence[PackedWeight]) -> None:
        self._weights = weights

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (M, K) as this road multiplies them, and their fp32 scales (M, 1)."""
        return self._weights[0].quantize(x)

    def multiply(self, x: Tensor, token_scale: Tensor, ends: Tensor) -> Tensor:
        """Return each weight's product with its rows: (M, N)."""
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        slices = zip(self._weights, torch.split(x, sizes), torch.split(token_scale, sizes), strict=True)
        return torch.cat([weight.multiply(part, scale) for weight, part, scale in slices if len(part) or not len(x)])


def pack_stack(weights: Sequence[tuple[Tensor, Tensor]], road: Road) -> PackedStack:
    """Return weights of one shape, each values (N, K) and fp32 scales (N, 1), laid out for one road."""
    if road == "cuda_triton":
        return TritonStack(weights)
    return WeightLoop([pack_weight(values, scale, road) for values, scale in weights])


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTest:
    """What the self-test found: the road to take, and why the faster ones were left out."""

    device: str
    road: Road
    rejected: Mapping[str, str]
    """Reason by road, for the roads tried before."""
    seconds: float


def self_test(
    device: str | torch.device = "cpu",
    shapes: Sequence[tuple[int, int]] = SELF_TEST_SHAPES,
    scheme: Scheme = "w8a8",
) -> SelfTest:
    """Return a scheme's fastest road on a device whose products are right: with `w8a8`, the reference's bit for bit.

    Args:
        shapes: (N, K) of the weights to try; `load_quantized` names all those of its model.
    """
    start = time.perf_counter()
    device = torch.device(device)
    rejected: dict[str, str] = {}
    find_fault = _find_float8_fault if scheme == "fp8" else _find_fault
    for road in _candidates(device, scheme):
        reason = find_fault(road, device, shapes)
        if reason is None:
            break
        rejected[road] = reason
    else:
        road = FALLBACKS[scheme]
    return SelfTest(device=str(device), road=road, rejected=rejected, seconds=time.perf_counter() - start)


def _candidates(device: torch.device, scheme: Scheme) -> tuple[Road, ...]:
    """Return the roads to try, the fastest first."""
    if scheme == "w8a16":
        return ()
    if device.type == "cuda":
        if scheme == "fp8":
            return ("cuda_scaled_mm",)
        return ("cuda_triton", "cuda_int_mm") if has_triton() else ("cuda_int_mm",)
    return ("onednn", "onednn_two_pass") if scheme == "w8a8" and is_available() else ()


def _find_fault(road: Road, device: torch.device, shapes: Sequence[tuple[int, int]]) -> str | None:
    """Return where a road of integers differs from the reference, or None."""
    generator = torch.Generator().manual_seed(0)
    for out_features, in_features in shapes:
        for name, x, weight in _trials(out_features, in_features, generator):
            scale = torch.rand((out_features, 1), generator=generator) + 0.5
            # Rows whose largest integer is 127 and whose scale is 1 come back from `quantize` as they went in.
            x[:, 0] = INT8_MAX
            expected = integer_sums(x, weight) * scale.flatten()
            try:
                packed = pack_weight(weight.to(device), scale.to(device), road)
                for tokens in SELF_TEST_TOKENS:
                    values, token_scale = packed.quantize(x[:tokens].to(device, torch.float32))
                    found = packed.multiply(values, token_scale).cpu()
                    if not torch.equal(found, expected[:tokens]):
                        return f"wrong sums for {name} integers, {tokens} tokens, weight {out_features} x {in_features}"
            except Exception as error:  # an operator this build or device lacks, a kernel that does not compile
                return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    return None


def _find_float8_fault(road: Road, device: torch.device, shapes: Sequence[tuple[int, int]]) -> str | None:
    """Return where a road of FP8 is further from the reference than tensor cores round, or None."""
    generator = torch.Generator().manual_seed(0)
    for out_features, in_features in shapes:
        x = torch.randn((max(SELF_TEST_TOKENS), in_features), generator=generator)
        weight, scale = quantize_rows(torch.randn((out_features, in_features), generator=generator))
        values, token_scale = quantize_rows(x)
        factors = scale.flatten() * token_scale  # (M, N)
        expected = float8_sums(values, weight) * factors
        allowed = FLOAT8_TOLERANCE * float8_sums(values.float().abs(), weight.float().abs()) * factors
        try:
            packed = pack_weight(weight.to(device), scale.to(device), road)
            for tokens in SELF_TEST_TOKENS:
                found = packed.multiply(*packed.quantize(x[:tokens].to(device))).cpu()
                if not ((found - expected[:tokens]).abs() <= allowed[:tokens]).all():
                    return f"wrong sums for {tokens} tokens, weight {out_features} x {in_features}"
        except Exception as error:  # as above
            return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    return None


def _trials(out_features: int, in_features: int, generator: torch.Generator) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Yield (name, tokens, weight) of int8: random ones, and the largest, which saturate 16 bits soonest."""
    tokens = max(SELF_TEST_TOKENS)
    low, high = -INT8_MAX, INT8_MAX + 1
    x = torch.randint(low, high, (tokens, in_features), generator=generator, dtype=torch.int8)
    weight = torch.randint(low, high, (out_features, in_features), generator=generator, dtype=torch.int8)
    yield "random", x, weight
    yield "largest", torch.full_like(x, INT8_MAX), torch.full_like(weight, INT8_MAX)
    yield "largest, signs mixed", torch.full_like(x, INT8_MAX), weight.sign() * INT8_MAX
