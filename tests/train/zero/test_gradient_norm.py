"""The norm of large gradients on a CPU, against sums in fp64, however they are cut and however they are shared out."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ray_ds.train.zero.gradient_norm import sum_of_squares
from tests.train.runs import make_settings
from tests.train.zero.worlds import gather, run_world

CPU = torch.device("cpu")
VOCAB_SIZE = 30_000
"""Makes the embedding of the tiny model 2 M elements."""
CLIPPING = 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_norm_is_that_of_fp64_whole_and_cut(kind: str, dtype: torch.dtype) -> None:
    made = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0)) if kind == "normal" else None
    gradient = (torch.full((4_000_000,), 0.1) if made is None else made).to(dtype)
    expected = gradient.double().square().sum().sqrt().float()
    for parts in (1, 3, 1000):
        found = sum_of_squares(gradient.tensor_split(parts), CPU).sqrt().float()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_norm_takes_any_shape_and_none() -> None:
    turned = torch.arange(12.0).view(3, 4).t()
    assert sum_of_squares([turned, torch.tensor(2.0)], CPU) == 506 + 4
    empty = sum_of_squares([], CPU)
    assert empty == 0 and empty.dtype == torch.float64
    assert sum_of_squares([torch.full((2,), 1e30)], CPU) == pytest.approx(2e60), "no overflow before the clipping"


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_norm_of_what_is_no_number_is_none(bad: float) -> None:
    gradients = [torch.ones(5), torch.ones(100_000)]
    gradients[1][70_000] = bad
    assert not sum_of_squares(gradients, CPU).isfinite()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.shows("Large gradients are clipped alike, to 1e-6, by 1 and 3 workers and with and without ZeRO, in fp32")
def test_large_gradients_are_clipped_alike_by_one_and_by_three(tmp_path: Path) -> None:
    for world_size in (3, 1):
        run_world(world_size, clip_large_gradients, tmp_path)
    found = {world_size: torch.load(tmp_path / f"clipped-{world_size}.pt") for world_size in (1, 3)}
    expected_norm, expected = found[1][0]
    assert expected_norm > 2 * CLIPPING
    for world_size, stage in ((1, 2), (3, 0), (3, 2)):
        norm, mean = found[world_size][stage]
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        torch.testing.assert_close(mean.norm(), expected.norm(), rtol=1e-6, atol=0)
        assert (mean - expected).norm() <= 1e-6 * expected.norm()


def clip_large_gradients(rank: int, world_size: int, folder: Path) -> None:
    """Keep each stage's norm in one step, and AdamW's mean of the embedding's gradient, a tenth of what was clipped."""
    from ray_ds.model.decoder import Decoder
    from ray_ds.model.initial import init_weights
    from ray_ds.train.objective import NextTokenObjective
    from ray_ds.train.zero.engine import Engine
    from tests.train.zero.worlds import run_step

    rows = torch.randint(VOCAB_SIZE, (3, 4, 17), generator=torch.Generator().manual_seed(0))
    found: dict[int, tuple[float, Tensor]] = {}
    for stage in (0, 2):
        settings = make_settings(zero_stage=stage, gradient_clipping=CLIPPING, batch_tokens=192)
        decoder = Decoder(settings.model.resolve(VOCAB_SIZE, settings.seq_len))
        init_weights(decoder, 0)
        engine = Engine(NextTokenObjective(decoder), settings, device=CPU, world_size=world_size)
        _, norm = run_step(engine, rows, rank, world_size)
        found[stage] = norm, gather(engine.state()).tensors["lm_head.weight", "exp_avg"].double()
    if rank == 0:
        torch.save(found, folder / f"clipped-{world_size}.pt")
