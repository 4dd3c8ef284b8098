"""What `partitions.py` believes of DeepSpeed's private structures, held against DeepSpeed as it is installed."""

import functools
import itertools
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from ray_ds.config.train import TrainSettings
from tests.train.runs import make_settings
from tests.train.zero.worlds import WholeState, gather, grid, new_engine, run_step, run_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STAGES = (0, 1, 2, 3)
CASES = list(itertools.product(STAGES, ("fp32", "bf16"), ("adamw", "muon")))
NAMES = {
    0: ("param_groups",),
    1: (
        *("single_partition_of_fp32_groups", "partition_size", "real_dp_process_group", "bit16_groups"),
        *("round_robin_bit16_groups", "round_robin_bit16_offsets", "averaged_gradients", "all_grad_tensors"),
        *("gradient_accumulation_dtype", "use_grad_accum_attribute", "dtype", "optimizer", "update_lp_params"),
        *("zero_grad", "_release_preflattened_grad_buffers", "cpu_offload", "micro_step_id", "reset_cpu_buffers"),
    ),
    3: (
        *("fp32_partitioned_groups_flat", "fp16_groups", "use_muon", "communication_data_type"),
        *("persistent_parameters", "averaged_gradients", "_partition_all_parameters", "_pre_step", "zero_grad"),
        "_reassign_or_swap_out_partitioned_parameters",
    ),
}
"""What is used of each stage's optimizer."""
NAMES[2] = NAMES[1]
ENGINE_NAMES = ("optimizer", "basic_optimizer", "micro_steps", "gradient_accumulation_steps", "data_parallel_group")


def blame(name: str) -> str:
    return (
        f"DeepSpeed {deepspeed.__version__}: {name} is gone or means something else than in 0.19.8; "
        "ray_ds/train/zero/partitions.py must follow"
    )


def case_settings(stage: int, precision: str, optimizer: str, **changes: Any) -> TrainSettings:
    clipping = 0.0 if optimizer == "muon" else 1.0
    kind = {"optimizer": {"kind": optimizer}, "gradient_clipping": clipping}
    return make_settings(zero_stage=stage, precision=precision, num_workers=1, **kind, **changes)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes see of DeepSpeed."""
    folder = tmp_path_factory.mktemp("partitions")
    run_world(2, look, folder)
    return torch.load(folder / "seen.pt", weights_only=False)


def look(rank: int, world_size: int, folder: Path) -> None:
    found: dict[str, Any] = {"-".join(map(str, case)): look_at_case(case, rank, world_size) for case in CASES}
    for stage in STAGES:
        settings = case_settings(stage, "bf16", "adamw", model={"preset": "tiny", "tie_word_embeddings": True})
        found[f"tied-{stage}"] = move(settings, settings, rank, world_size)
    for optimizer in ("adamw", "muon"):
        settings = case_settings(3, "fp32", optimizer)
        found[f"sub-groups-{optimizer}"] = move(settings, settings, rank, world_size, sub_group_size=5_000)
    if rank == 0:
        torch.save(found, folder / "seen.pt")


def look_at_case(case: tuple[int, str, str], rank: int, world_size: int) -> dict[str, Any]:
    """Return the names that are missing, and what is true of those that are there, after one step."""
    engine = new_engine(case_settings(*case), 0, world_size)
    optimizer, logical = engine._engine.optimizer, engine._state
    missing = [f"DeepSpeedEngine.{name}" for name in ENGINE_NAMES if not hasattr(engine._engine, name)]
    missing += [f"{type(optimizer).__name__}.{name}" for name in NAMES[case[0]] if not hasattr(optimizer, name)]
    if case[:2] == (0, "bf16"):
        wanted = ("fp16_groups", "fp32_groups", "refresh_fp32_params", "state")
        missing += [f"FP16_UnfusedOptimizer.{name}" for name in wanted if not hasattr(optimizer, name)]
    if case[0] == 3:
        wanted = ("partition_numel", "ds_numel", "ds_shape", "all_gather")
        parameter = next(engine.decoder.parameters())
        missing += [f"a ZeRO-3 parameter's {name}" for name in wanted if not hasattr(parameter, name)]
        if case[2] == "muon":
            missing += [name for name in ("sub_groups_using_muon",) if not hasattr(optimizer, name)]
    started = gather(engine.state())
    run_step(engine, grid(0), rank, world_size)
    state, weights = gather(engine.state()), engine.full_state()
    return {
        "missing": missing,
        "started": {key[1] for key in started.tensors},
        "steps": (started.facts["optimizer_steps"], state.facts["optimizer_steps"]),
        "masters": rank != 0 or all(are_rounded(state, name, weight) for name, weight in weights.items()),
        "momentum": [
            (value.numel(), value.dtype) == (trained.momentum.shape.numel(), trained.momentum_dtype)
            for trained in logical._trained
            if trained.momentum is not None and trained.momentum.held
            for value in [logical._states[trained.master]["momentum_buffer"]]
        ],
        "copies": have_equal_copies(logical),
    }


def are_rounded(state: WholeState, name: str, weight: torch.Tensor) -> bool:
    """Tell whether a weight is what its master rounds to, and a buffer is itself."""
    kind = "buffer" if name.endswith("e_score_correction_bias") else "master"
    return torch.equal(state.tensors[name, kind].to(weight.dtype), weight.flatten())


def have_equal_copies(logical: Any) -> bool:
    """Tell whether the elements that several processes hold are the same on all."""
    mine = {
        (run.name, kind): run.within(logical._states[trained.master][key]).clone()
        for trained in logical._trained
        for kind, key, layout in (
            ("exp_avg", "exp_avg", trained.layout),
            ("momentum", "momentum_buffer", trained.momentum),
        )
        if layout is not None and key in logical._states.get(trained.master, {})
        for run in layout.held
        if run.stop - run.start == torch.Size(run.shape).numel()
    }
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return all(torch.equal(parts[0][key], parts[1][key]) for key in parts[0].keys() & parts[1].keys())


def move(
    settings: TrainSettings, other: TrainSettings, rank: int, world_size: int, *, sub_group_size: int | None = None
) -> dict[str, Any]:
    """Train a step, move the state to another engine, and train a step in both."""
    from ray_ds.train.zero import engine as module

    old = new_engine(settings, 0, world_size)
    run_step(old, grid(0), rank, world_size)
    saved = gather(old.state())
    plain = module.deepspeed_config
    if sub_group_size is not None:
        module.deepspeed_config = functools.partial(with_sub_groups, plain, sub_group_size)  # type: ignore[assignment]
    new = new_engine(other, 1, world_size)
    module.deepspeed_config = plain
    new.load_state(saved)
    states = [state for state in new._state._states.values() if "step" in state]
    counts = {"states": len(states), "step tensors": len({state["step"].data_ptr() for state in states})}
    curves = [run_step(engine, grid(1), rank, world_size) for engine in (old, new)]
    after = [gather(engine.state()) for engine in (old, new)]
    return {
        "names": {name for name, _ in saved.tensors},
        "num_trained": (len(old._state._trained), len(new._state._trained)),
        "curves": curves,
        "differences": [
            key for key, value in after[0].tensors.items() if not torch.equal(value, after[1].tensors[key])
        ],
        "facts": [state.facts for state in after],
        **counts,
    }


def with_sub_groups(plain: Any, size: int, settings: TrainSettings, world_size: int, **where: Any) -> dict[str, Any]:
    config: dict[str, Any] = plain(settings, world_size, **where)
    config["zero_optimization"]["sub_group_size"] = size
    return config


all_cases = pytest.mark.parametrize("case", ["-".join(map(str, case)) for case in CASES])


@all_cases
def test_names_are_there(seen: dict[str, Any], case: str) -> None:
    assert not seen[case]["missing"], blame(", ".join(seen[case]["missing"]))


@all_cases
def test_masters_lie_where_they_are_sought(seen: dict[str, Any], case: str) -> None:
    assert seen[case]["masters"], blame("the layout of the masters")
    assert seen[case]["copies"], blame("the layout of the optimizer's states")


@all_cases
def test_steps_are_counted_from_the_first(seen: dict[str, Any], case: str) -> None:
    """Also where DeepSpeed makes a step of its own at the start."""
    assert seen[case]["steps"] == (0, 1), blame("the optimizer's `step`")
    assert seen[case]["started"] - {"momentum"} == {"master", "buffer"}, blame("when the optimizer's states are made")


@all_cases
def test_momentum_has_the_size_and_type_that_it_is_made_with(seen: dict[str, Any], case: str) -> None:
    assert bool(seen[case]["momentum"]) == case.endswith("muon"), blame("momentum_buffer")
    assert all(seen[case]["momentum"]), blame("momentum_buffer")


@pytest.mark.parametrize("stage", STAGES)
def test_tied_embedding_is_one_parameter(seen: dict[str, Any], stage: int) -> None:
    found = seen[f"tied-{stage}"]
    assert "model.embed_tokens.weight" in found["names"] and "lm_head.weight" not in found["names"]
    assert found["curves"][0] == found["curves"][1]
    assert not found["differences"] and found["facts"][0] == found["facts"][1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_moves_into_several_sub_groups(seen: dict[str, Any], optimizer: str) -> None:
    found = seen[f"sub-groups-{optimizer}"]
    assert found["num_trained"][1] > found["num_trained"][0] + 3, blame("sub_group_size")
    assert found["curves"][0] == pytest.approx(found["curves"][1], rel=1e-6)
    assert found["facts"][0] == found["facts"][1] == {"optimizer_steps": 2}
    assert found["step tensors"] == found["states"] > 1
    assert not found["differences"]
