"""Groups and offloading in bf16 and with Muon, and steps that are skipped there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.parallel.groups import MODELS, group_settings, load, micro_batch, new_engine, run_step, save
from tests.train.zero.worlds import WholeState, gather, grid, run_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 4
TENSOR, EXPERT, SEQUENCE = ({"parallel": {axis: 2}} for axis in ("tensor", "expert", "sequence"))
BF16 = {"precision": "bf16"}
MUON = {"optimizer": {"kind": "muon", "lr": 5e-3}, "gradient_clipping": 0.0}
OPTIMIZER, ALL = {"offload": "optimizer"}, {"offload": "all", "zero_stage": 3}
ROUNDED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"tensor-zero-{stage}": ("mla", {**TENSOR, **BF16, "zero_stage": stage}) for stage in (0, 1, 2)},
    **{f"expert-zero-{stage}": ("experts", {**EXPERT, **BF16, "zero_stage": stage}) for stage in (0, 1, 2)},
    **{f"sequence-zero-{stage}": ("experts", {**SEQUENCE, **BF16, "zero_stage": stage}) for stage in (0, 1, 3)},
    "tensor-offloaded": ("gqa", {**TENSOR, **BF16, **OPTIMIZER, "zero_stage": 2}),
    "offloaded": ("experts", {**BF16, **OPTIMIZER}),
    "all-offloaded": ("gqa", {**BF16, **ALL}),
}
SKIPPED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"offload-zero-{stage}": ("experts", {**OPTIMIZER, "zero_stage": stage}) for stage in (1, 2, 3)},
    "all-offloaded": ("gqa", ALL),
    "tensor": ("mla", {**TENSOR, "zero_stage": 2}),
    "tensor-zero-0": ("gqa", {**TENSOR, "zero_stage": 0}),
    "expert": ("experts", EXPERT),
}
SEQUENCE_MUON = [f"muon-{stage}" for stage in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("types")
    for world_size, function in ((1, run_alone), (2, run_groups)):
        run_world(world_size, function, folder)
    return {**load(folder / "alone.pt"), **load(folder / "groups.pt")}


def run_alone(rank: int, world_size: int, folder: Path) -> None:
    out: dict[str, Any] = {f"bf16-{model}": losses(group_settings(model, **BF16)) for model in MODELS}
    out |= {f"one-muon-{stage}": losses(group_settings("experts", **MUON, zero_stage=stage)) for stage in (0, 1, 2, 3)}
    save(out, folder / "alone.pt")


def run_groups(rank: int, world_size: int, folder: Path) -> None:
    out: dict[str, Any] = {name: losses(group_settings(m, **changes)) for name, (m, changes) in ROUNDED.items()}
    for stage in (0, 1, 2, 3):
        out[f"muon-{stage}"] = losses(group_settings("experts", **MUON, **SEQUENCE, zero_stage=stage))
    for name, (model, changes) in SKIPPED.items():
        settings = group_settings(model, **changes)
        out[f"skipped-{name}"] = state_after(settings, skips=True), state_after(settings, skips=False)
    save(out, folder / "groups.pt")


def losses(settings: Any) -> list[float]:
    engine = new_engine(settings, 0, torch.distributed.get_world_size())
    return [run_step(engine, step)[0] for step in range(STEPS)]


def state_after(settings: Any, *, skips: bool) -> WholeState:
    """Return the state after two steps, with a step of NaNs between them or without."""
    engine = new_engine(settings, 0, torch.distributed.get_world_size())
    run_step(engine, 0)
    if skips:
        rows = grid(9)
        for part in rows.tensor_split(engine.mesh.num_readers)[engine.mesh.reader]:
            engine.forward_backward(micro_batch(part), terms=float("nan"))
        engine.skip_step()
    run_step(engine, 1)
    return gather(engine.state())


@pytest.mark.parametrize("name", ROUNDED)
def test_bf16_losses_are_those_of_one_process(found: dict[str, Any], name: str) -> None:
    assert found[name] == pytest.approx(found[f"bf16-{ROUNDED[name][0]}"], rel=1e-3)


@pytest.mark.parametrize("name", SEQUENCE_MUON)
def test_muon_in_a_sequence_group_is_that_of_one_process(found: dict[str, Any], name: str) -> None:
    assert found[name] == pytest.approx(found[f"one-{name}"], rel=1e-5)


@pytest.mark.parametrize("name", SKIPPED)
def test_a_skipped_step_leaves_no_trace(found: dict[str, Any], name: str) -> None:
    skipped, plain = found[f"skipped-{name}"]
    assert skipped.tensors.keys() == plain.tensors.keys()
    for key, tensor in plain.tensors.items():
        assert torch.equal(skipped.tensors[key], tensor), key
