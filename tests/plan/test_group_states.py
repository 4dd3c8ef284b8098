"""The plan's bytes in groups and with offload against the tensors that real processes hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ds.plan.states import States, states_of
from tests.plan.engines import Counted, case_for, count_engine, engine_settings
from tests.train.zero.worlds import run_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DENSE = {"model": {"preset": "demo", "num_hidden_layers": 6, "n_routed_experts": 0, "intermediate_size": 1024}}
TENSOR, EXPERT, SEQUENCE = ({"parallel": {axis: 2}} for axis in ("tensor", "expert", "sequence"))
Ways = Mapping[str, dict[str, Any]]
GROUPS: Mapping[int, Ways] = {
    2: {
        "tensor, ZeRO 0": {**DENSE, **TENSOR, "zero_stage": 0},
        "tensor, ZeRO 1": {**DENSE, **TENSOR, "zero_stage": 1},
        "expert, ZeRO 2": {**EXPERT, "zero_stage": 2},
        "sequence, ZeRO 1": {**SEQUENCE, "zero_stage": 1},
        "sequence, ZeRO 3": {**SEQUENCE, "zero_stage": 3},
    },
    4: {
        "tensor, ZeRO 2": {**DENSE, **TENSOR, "zero_stage": 2},
        "expert, ZeRO 1": {**EXPERT, "zero_stage": 1},
    },
}
OFFLOADED: Mapping[int, Ways] = {
    2: {
        "optimizer, ZeRO 1": {"offload": "optimizer", "zero_stage": 1},
        "optimizer, ZeRO 2": {"offload": "optimizer", "zero_stage": 2},
        "optimizer, ZeRO 3": {"offload": "optimizer", "zero_stage": 3},
        "all, ZeRO 3": {"offload": "all", "zero_stage": 3},
    }
}


def count_ways(rank: int, world_size: int, folder: Path) -> None:
    ways = {**GROUPS[world_size], **OFFLOADED.get(world_size, {})}
    counted = {name: count_engine(engine_settings(world_size, precision="bf16", **way)) for name, way in ways.items()}
    if rank == 0:
        torch.save(counted, folder / f"{world_size}.pt")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Mapping[str, Counted]]:
    folder = tmp_path_factory.mktemp("worlds")
    for world_size in GROUPS:
        run_world(world_size, count_ways, folder)
    return {world_size: torch.load(folder / f"{world_size}.pt", weights_only=False) for world_size in GROUPS}


def planned(ways: Mapping[int, Ways], world_size: int, name: str) -> States:
    return states_of(case_for(engine_settings(world_size, precision="bf16", **ways[world_size][name])))


groups = pytest.mark.parametrize(("world_size", "name"), [(size, name) for size in GROUPS for name in GROUPS[size]])
offloaded = pytest.mark.parametrize("name", OFFLOADED[2])


@groups
@pytest.mark.usefixtures("small_bucket")
@pytest.mark.shows("The plan's memory in groups and with offload is that of real processes")
def test_kept_between_steps_in_groups(counted: Any, world_size: int, name: str) -> None:
    assert planned(GROUPS, world_size, name).kept == pytest.approx(counted[world_size][name].kept, rel=0.1)


@groups
@pytest.mark.usefixtures("small_bucket")
def test_peak_of_a_step_in_groups(counted: Any, world_size: int, name: str) -> None:
    states, found = planned(GROUPS, world_size, name), counted[world_size][name]
    running = states.kept + states.gathered + states.earlier_gradients
    assert max(running, states.kept + states.reducing) == pytest.approx(found.reducing, rel=0.1)
    assert states.kept + states.updating == pytest.approx(found.updating, rel=0.1)


@offloaded
@pytest.mark.usefixtures("small_bucket")
def test_device_and_host_hold_what_is_planned(counted: Any, name: str) -> None:
    """On a CPU both are one memory."""
    states = planned(OFFLOADED, 2, name)
    assert states.kept + states.host == pytest.approx(counted[2][name].kept, rel=0.1)
