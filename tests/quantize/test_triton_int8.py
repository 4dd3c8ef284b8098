"""The Triton kernels give the bits of the reference."""

import pytest
import torch

from ray_ds.quantize.kernels import WeightLoop, pack_stack, pack_weight
from ray_ds.quantize.scheme import quantize_tokens, quantize_weight

pytestmark = pytest.mark.gpu


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 48), (7, 130), (40, 4096)])
def test_tokens_become_the_same_integers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from ray_ds.quantize import triton_int8

    x = (random(*shape) * 3).to(dtype)
    x[0, 0] = 0
    expected = quantize_tokens(x)
    for found, wanted in zip(triton_int8.quantize_tokens(x.cuda()), expected, strict=True):
        assert torch.equal(found.cpu(), wanted)


def test_a_token_that_is_not_a_number_is_not_hidden() -> None:
    from ray_ds.quantize import triton_int8

    x = random(3, 8).cuda()
    x[1, 4] = float("nan")
    assert triton_int8.quantize_tokens(x)[1].isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("sizes", [[3, 0, 17, 1], [0, 100, 0, 70], [64, 64, 64, 64], [0, 0, 0, 0], [1, 0, 0, 0]])
def test_experts_equal_a_loop_over_the_reference(sizes: list[int]) -> None:
    weights = [quantize_weight(random(200, 336, seed=i)) for i in range(len(sizes))]
    values, scale = (
        quantize_tokens(random(sum(sizes), 336, seed=9))
        if sum(sizes)
        else (
            torch.zeros((0, 336), dtype=torch.int8),
            torch.zeros((0, 1)),
        )
    )
    ends = torch.tensor(sizes).cumsum(0)
    loop = WeightLoop([pack_weight(*weight, "reference") for weight in weights])
    stack = pack_stack([(weight.cuda(), own.cuda()) for weight, own in weights], "cuda_triton")
    found = stack.multiply(values.cuda(), scale.cuda(), ends.cuda())
    assert torch.equal(found.cpu(), loop.multiply(values, scale, ends))


def test_a_graph_of_one_step_serves_other_choices_of_experts() -> None:
    weights = [quantize_weight(random(64, 48, seed=i)) for i in range(4)]
    stack = pack_stack([(weight.cuda(), own.cuda()) for weight, own in weights], "cuda_triton")
    x, ends = random(8, 48).cuda(), torch.tensor([2, 4, 6, 8]).cuda()
    stack.multiply(*stack.quantize(x), ends)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stack.multiply(*stack.quantize(x), ends)
    ends.copy_(torch.tensor([0, 8, 8, 8]))
    graph.replay()
    assert torch.equal(out, stack.multiply(*stack.quantize(x), ends))
