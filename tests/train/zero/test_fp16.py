"""fp16's loss scale on a CPU: real overflows, the way back, and a resume in between.

DeepSpeed refuses fp16 on CPUs whose matrix products have no fp16 instructions; torch computes them all the same.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.runs import make_settings
from tests.train.zero.worlds import WholeState, gather, grid, new_engine, run_step, run_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TOO_LARGE = 2.0**22
"""A loss scale with which the gradients of these steps do not fit into fp16."""

LATER = (2, 3, 4, 5)
"""Steps after the first that fits; one of them may overflow once more."""


@pytest.mark.shows("fp16's loss scale overflows and recovers, in ZeRO 1 to 3; a resume in between is equal bit by bit")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overflows_are_skipped_until_the_scale_fits_and_a_resume_goes_on_amid_them(tmp_path: Path, stage: int) -> None:
    run_world(2, overflow_and_recover, tmp_path, stage)


def overflow_and_recover(rank: int, world_size: int, folder: Path, stage: int) -> None:
    engine = new_fp16_engine(stage, 0, world_size)
    _, usual_norm = run_step(engine, grid(0), rank, world_size)
    fitting = gather(engine.state())
    scale: dict[str, Any] = {**fitting.facts["loss_scale"], "cur_scale": TOO_LARGE}
    engine.load_state(WholeState(fitting.tensors, {**fitting.facts, "loss_scale": scale}))

    losses, overflows = set(), 0
    while True:
        before = gather(engine.state())
        used = float(engine._engine.optimizer.loss_scale)
        step_loss, norm = run_step(engine, grid(1), rank, world_size)
        losses.add(step_loss)
        if not engine._engine.optimizer.overflow:
            break
        overflows += 1
        after = gather(engine.state())
        assert not math.isfinite(norm)
        assert after.facts["optimizer_steps"] == before.facts["optimizer_steps"] == 1
        assert all(torch.equal(value, before.tensors[key]) for key, value in after.tensors.items())
        patience = scale["cur_hysteresis"] - 1  # so many overflows DeepSpeed puts up with
        assert after.facts["loss_scale"]["cur_scale"] == used / (2 if overflows > patience else 1)
        if overflows == 2:
            amid = after
    assert overflows > 2 and used < TOO_LARGE
    assert len(losses) == 1, "a skipped step leaves the weights as they were"
    assert norm == pytest.approx(usual_norm, rel=0.5)
    curve = [(step_loss, norm), *(run_step(engine, grid(step), rank, world_size) for step in LATER)]
    state = gather(engine.state())
    assert state.facts["optimizer_steps"] == 1 + sum(math.isfinite(norm) for _, norm in curve) > 3

    resumed = new_fp16_engine(stage, 1, world_size)
    resumed.load_state(amid)
    for _ in range(overflows - 2):
        run_step(resumed, grid(1), rank, world_size)
        assert resumed._engine.optimizer.overflow
    assert [run_step(resumed, grid(step), rank, world_size) for step in (1, *LATER)] == curve
    again = gather(resumed.state())
    assert again.facts == state.facts
    assert all(torch.equal(value, state.tensors[key]) for key, value in again.tensors.items())


def new_fp16_engine(stage: int, seed: int, world_size: int) -> Any:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    return new_engine(make_settings(precision="fp16", zero_stage=stage), seed, world_size)
