"""The plan's bytes of activations in groups against the tensors that autograd keeps in real processes."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from ray_ds.config.parallel import AXES, Axis, Parallel
from ray_ds.plan.activations import activations_of, layer_bytes
from ray_ds.plan.case import Case
from tests.plan.kept_tensors import CONFIGS, case_for, kept_bytes, use_gpu_norm
from tests.train.zero.worlds import run_world

MODELS: Mapping[Axis, tuple[str, ...]] = {
    "tensor": ("dense", "query rank", "grouped queries"),
    "expert": ("experts",),
    "sequence": ("dense", "grouped queries", "experts"),
}
CASES = [(axis, name) for axis in AXES for name in MODELS[axis]]
Bytes = Mapping[tuple[str, str, int], int]


def group_case(axis: Axis, name: str, depth: int) -> Case:
    return case_for(CONFIGS[name](depth), world_size=2, parallel=Parallel(**{axis: 2}))


def count(rank: int, world_size: int, folder: Path) -> None:
    from ray_ds.train.parallel.divide import divide
    from ray_ds.train.parallel.mesh import make_mesh

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        use_gpu_norm(patch)
        for axis, name in CASES:
            for depth in (2, 3):
                case = group_case(axis, name, depth)
                mesh = make_mesh(case.parallel, rank=rank, world_size=world_size)
                found[axis, name, depth] = kept_bytes(case, lambda decoder, mesh=mesh: divide(decoder, mesh))  # type: ignore[misc]
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Bytes:
    """Return the means over both processes: experts' rows are not shared out evenly."""
    folder = tmp_path_factory.mktemp("kept")
    run_world(2, count, folder)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2))
    return {key: (first[key] + second[key]) // 2 for key in first}


@pytest.mark.parametrize(("axis", "name"), CASES)
def test_kept_activations_in_groups(counted: Bytes, axis: Axis, name: str) -> None:
    planned = activations_of(group_case(axis, name, 2))
    assert planned.kept + planned.loss == pytest.approx(counted[axis, name, 2], rel=0.1)


@pytest.mark.parametrize(("axis", "name"), CASES)
def test_one_more_layer_in_groups(counted: Bytes, axis: Axis, name: str) -> None:
    case = group_case(axis, name, 2)
    grown = (counted[axis, name, 3] - counted[axis, name, 2]) / case.micro_tokens
    assert layer_bytes(case, is_sparse=name == "experts") == pytest.approx(grown, rel=0.1)
