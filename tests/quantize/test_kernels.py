import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ray_ds.quantize import kernels
from ray_ds.quantize.kernels import Road, pack_weight, self_test
from ray_ds.quantize.scheme import quantize_tokens, quantize_weight

CPU_ROADS: tuple[Road, ...] = ("onednn", "onednn_two_pass", "reference")
SHAPES = ((1024, 256), (256, 688), (5, 17), (3, 8), (64, 5000))
DIGEST_OF_PRODUCTS = """
import hashlib, json, sys, torch
from ray_ds.quantize.kernels import pack_weight, self_test
found = self_test()
digest = hashlib.sha256()
generator = torch.Generator().manual_seed(1)
for out_features, in_features in {shapes}:
    weight = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    packed = pack_weight(weight, torch.full((out_features, 1), 0.01), found.road)
    for tokens in (1, 3, 8, 33):
        x = torch.randn((tokens, in_features), generator=generator)
        x[0] = 1.0  # all at the largest integer
        digest.update(packed.multiply(*packed.quantize(x)).numpy().tobytes())
print(json.dumps([found.road, dict(found.rejected), digest.hexdigest()]))
"""


def exact_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """Multiply as the scheme says, in numpy's 64-bit integers."""
    values, token_scale = quantize_tokens(x)
    sums = values.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    return sums.astype(np.float32) * scale.flatten().numpy() * token_scale.numpy()


def roads_exact_here() -> list[Road]:
    """The roads this processor computes without saturation: all, or all but the fastest."""
    return [road for road in CPU_ROADS if road != "onednn" or self_test().road == "onednn"]


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_every_road_gives_the_bits_of_the_integer_reference(out_features: int, in_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantize_weight(torch.randn((out_features, in_features), generator=generator))
    x = torch.randn((70, in_features), generator=generator) * 3
    expected = exact_product(x, weight, scale)
    for road in roads_exact_here():
        packed = pack_weight(weight, scale, road)
        for tokens in (1, 2, 3, 4, 7, 8, 16, 17, 70):
            found = packed.multiply(*packed.quantize(x[:tokens]))
            assert np.array_equal(found.numpy(), expected[:tokens]), (road, tokens)


@pytest.mark.parametrize("road", CPU_ROADS)
def test_a_token_never_depends_on_the_others_of_its_batch(road: Road) -> None:
    if road not in roads_exact_here():
        road = "onednn_two_pass"
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantize_weight(torch.randn((688, 256), generator=generator))
    packed = pack_weight(weight, scale, road)
    x = torch.randn((64, 256), generator=generator)
    x[7] *= 1e4  # a neighbour far larger than the rest
    together = packed.multiply(*packed.quantize(x))
    alone = torch.cat([packed.multiply(*packed.quantize(row[None])) for row in x])
    assert torch.equal(together, alone)


def test_no_tokens_give_no_rows() -> None:
    weight, scale = quantize_weight(torch.randn(6, 8))
    for road in CPU_ROADS:
        packed = pack_weight(weight, scale, road)
        assert packed.multiply(*packed.quantize(torch.zeros(0, 8))).shape == (0, 6)


def test_threads_do_not_change_a_bit() -> None:
    weight, scale = quantize_weight(torch.randn((1024, 512), generator=torch.Generator().manual_seed(0)))
    x = torch.randn((40, 512), generator=torch.Generator().manual_seed(1))
    packed = pack_weight(weight, scale, self_test().road)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(packed.multiply(*packed.quantize(x)))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.shows("INT8 sums are exact on every x86 instruction set, VNNI or not, by a self-test at start")
@pytest.mark.parametrize("isa", ["ALL", "AVX512_CORE", "AVX2_VNNI", "AVX2"])
def test_the_self_test_finds_an_exact_road_on_every_processor(isa: str) -> None:
    script = DIGEST_OF_PRODUCTS.format(shapes=SHAPES)
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    road, rejected, digest = json.loads(done.stdout)
    if isa in ("AVX512_CORE", "AVX2"):
        assert road == "onednn_two_pass"
        assert "wrong sums" in rejected["onednn"]
    assert digest == _digest_by_reference()


def _digest_by_reference() -> str:
    digest = hashlib.sha256()
    generator = torch.Generator().manual_seed(1)
    for out_features, in_features in SHAPES:
        weight = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
        for tokens in (1, 3, 8, 33):
            x = torch.randn((tokens, in_features), generator=generator)
            x[0] = 1.0
            digest.update(exact_product(x, weight, torch.full((out_features, 1), 0.01)).tobytes())
    return digest.hexdigest()


def test_a_kernel_that_is_wrong_by_one_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class WrongByOne(kernels.ReferenceWeight):
        def multiply(self, x: torch.Tensor, token_scale: torch.Tensor) -> torch.Tensor:
            wrong = super().multiply(x, token_scale)
            wrong[-1, -1] = torch.nextafter(wrong[-1, -1], torch.tensor(torch.inf))
            return wrong

    roads = {**kernels._ROADS, "onednn": WrongByOne, "onednn_two_pass": WrongByOne}
    monkeypatch.setattr(kernels, "_ROADS", roads)
    found = self_test(shapes=[(6, 16)])
    assert found.road == "reference"
    assert set(found.rejected) == {"onednn", "onednn_two_pass"}
    assert all("weight 6 x 16" in reason for reason in found.rejected.values())


def test_a_build_without_the_operators_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_available", lambda: False)
    assert self_test(shapes=[(6, 16)]).road == "reference"


@pytest.mark.gpu
def test_cuda_gives_the_bits_of_the_reference() -> None:
    found = self_test("cuda")
    assert found.road == "cuda_triton", found.rejected
    for out_features, in_features in SHAPES:
        weight, scale = quantize_weight(torch.randn(out_features, in_features))
        x = torch.randn(70, in_features)
        expected = exact_product(x, weight, scale)
        roads: tuple[Road, ...] = ("cuda_triton", "cuda_int_mm")
        for road in roads:
            packed = pack_weight(weight.cuda(), scale.cuda(), road)
            for tokens in (1, 16, 17, 32, 33, 70):
                product = packed.multiply(*packed.quantize(x[:tokens].cuda()))
                assert np.array_equal(product.cpu().numpy(), expected[:tokens]), (road, tokens)
