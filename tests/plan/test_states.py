"""The plan's bytes of weights, gradients and optimizer state against the tensors of real DeepSpeed engines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ds.config.train import TrainSettings
from ray_ds.plan.states import States, states_of
from tests.plan.engines import Counted, case_for, count_engine, engine_settings
from tests.train.zero.worlds import run_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Key = tuple[int, str, str]
"""Stage, precision and optimizer."""
EVERY_STAGE: list[Key] = [(stage, "bf16", "adamw") for stage in (0, 1, 2, 3)]
CASES: dict[int, list[Key]] = {
    1: [*EVERY_STAGE, *((stage, "bf16", "muon") for stage in (0, 1, 2, 3)), (1, "fp32", "adamw")],
    2: [*EVERY_STAGE, (1, "bf16", "muon")],
}
"""By the number of workers."""


def settings_of(key: Key, world_size: int) -> TrainSettings:
    stage, precision, optimizer = key
    clipping = 0.0 if optimizer == "muon" else 1.0
    choices = {"zero_stage": stage, "precision": precision, "optimizer": {"kind": optimizer}}
    return engine_settings(world_size, **choices, gradient_clipping=clipping)


def count_cases(rank: int, world_size: int, folder: Path) -> None:
    counted = {key: count_engine(settings_of(key, world_size)) for key in CASES[world_size]}
    if rank == 0:
        torch.save(counted, folder / f"{world_size}.pt")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Mapping[Key, Counted]]:
    folder = tmp_path_factory.mktemp("worlds")
    found = {}
    for world_size in CASES:
        run_world(world_size, count_cases, folder)
        found[world_size] = torch.load(folder / f"{world_size}.pt", weights_only=False)
    return found


def planned(key: Key, world_size: int) -> States:
    return states_of(case_for(settings_of(key, world_size)))


cases = pytest.mark.parametrize(
    ("world_size", "key"),
    [(world_size, key) for world_size, keys in CASES.items() for key in keys],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else f"{value}workers",
)


@cases
@pytest.mark.usefixtures("small_bucket")
@pytest.mark.shows("The plan's memory of weights, gradients and optimizer is that of real DeepSpeed engines, ZeRO 0-3")
def test_kept_between_steps(counted: Any, world_size: int, key: Key) -> None:
    assert planned(key, world_size).kept == pytest.approx(counted[world_size][key].kept, rel=0.02)


@cases
@pytest.mark.usefixtures("small_bucket")
def test_peak_of_the_update(counted: Any, world_size: int, key: Key) -> None:
    states = planned(key, world_size)
    assert states.kept + states.updating == pytest.approx(counted[world_size][key].updating, rel=0.1)


@cases
@pytest.mark.usefixtures("small_bucket")
def test_peak_of_the_last_backward_pass(counted: Any, world_size: int, key: Key) -> None:
    states = planned(key, world_size)
    running = states.kept + states.gathered + states.earlier_gradients
    most = max(running, states.kept + states.reducing)
    assert most == pytest.approx(counted[world_size][key].reducing, rel=0.1)


@cases
@pytest.mark.usefixtures("small_bucket")
def test_gradients_of_earlier_micro_batches(counted: Any, world_size: int, key: Key) -> None:
    states = planned(key, world_size)
    assert states.kept + states.earlier_gradients == pytest.approx(counted[world_size][key].after_first, rel=0.1)


@cases
@pytest.mark.usefixtures("small_bucket")
def test_peak_of_the_start(counted: Any, world_size: int, key: Key) -> None:
    assert planned(key, world_size).starting == pytest.approx(counted[world_size][key].started, rel=0.1)
