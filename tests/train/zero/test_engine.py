"""DeepSpeed's stages against plain torch and each other, and a state that moves between stages and world sizes."""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ray_ds.config.train import TrainSettings
from ray_ds.model.loss import IGNORED_TARGET
from tests.train.runs import make_settings
from tests.train.zero.worlds import (
    WholeState,
    forward_backward,
    gather,
    grid,
    micro_batch,
    new_decoder,
    new_engine,
    run_step,
    run_steps,
    run_world,
    take_expert_load,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Case = tuple[int, str, str]
"""Stage, precision and optimizer."""
STAGES = (0, 1, 2, 3)
WORLD_SIZES = (2, 3, 1)
"""In this order: the first makes the states that all start from, and each goes on from the one before."""
CASES: list[Case] = list(itertools.product(STAGES, ("fp32", "bf16"), ("adamw", "muon")))
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": {"kind": "adamw", "lr": 0.01}, "gradient_clipping": 1.0},
    "muon": {"optimizer": {"kind": "muon", "lr": 0.005}, "gradient_clipping": 0.0},
}
ids = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
worlds_too = pytest.mark.parametrize("world_size", WORLD_SIZES)


@dataclass(frozen=True)
class Part:
    """Some steps and the state after them."""

    curve: list[tuple[float, float]]
    """Loss and gradient norm of each step."""
    state: WholeState


@dataclass(frozen=True)
class Outcome:
    """What one case did at one world size."""

    loaded: WholeState
    """The shared state, listed again right after it was loaded."""
    one: Part
    """Step 3, from the shared state."""
    two: Part
    """Steps 4 and 5."""
    skipped: Part
    """The same after the state of `one` was loaded into the running engine and a step of NaNs was skipped."""
    resumed: Part
    """The same in a new engine that loaded the state of `one`."""
    decays: list[float]
    """Of the resumed engine's parameter groups."""
    expert_load: list[int]
    """Choices of experts in step 3, by layer."""


def case_settings(case: Case) -> TrainSettings:
    stage, precision, optimizer = case
    return make_settings(zero_stage=stage, precision=precision, num_workers=1, **OPTIMIZERS[optimizer])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the worlds leave their outcomes: they run one after the other."""
    folder = tmp_path_factory.mktemp("worlds")
    for world_size in WORLD_SIZES:
        run_world(world_size, run_cases, folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[tuple[int, Case], Outcome]:
    return {
        (world_size, case): outcome
        for world_size in WORLD_SIZES
        for case, outcome in load(folder / f"outcomes-{world_size}.pt").items()
    }


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def save(value: Any, path: Path) -> None:
    """Write a file that all processes may read from now on."""
    if dist.get_rank() == 0:
        torch.save(value, path)
    dist.barrier()


def run_cases(rank: int, world_size: int, folder: Path) -> None:
    if world_size == WORLD_SIZES[0]:
        make_shared_states(rank, world_size, folder)
    shared, chain = load(folder / "shared.pt"), load(folder / "chain.pt")
    save(
        {case: run_case(case, shared[case[1:]], rank, world_size) for case in CASES},
        folder / f"outcomes-{world_size}.pt",
    )
    for case, state in chain.items():
        moved = ((case[0] + WORLD_SIZES.index(world_size)) % 4, *case[1:])
        engine = new_engine(case_settings(moved), 1, world_size)
        engine.load_state(state.state)
        curve = [*state.curve, run_step(engine, grid(len(state.curve)), rank, world_size)]
        chain[case] = Part(curve, gather(engine.state()))
    save(chain, folder / "chain.pt")


def make_shared_states(rank: int, world_size: int, folder: Path) -> None:
    """Train three steps from the start in each case; step 0's state is loaded again after a step, too."""
    first = {}
    for case in CASES:
        engine = new_engine(case_settings(case), 0, world_size)
        start = gather(engine.state())
        run_step(engine, grid(0), rank, world_size)
        engine.load_state(start)
        first[case] = Part(run_steps(engine, range(3), rank, world_size), gather(engine.state()))
    save(first, folder / "first.pt")
    save({case[1:]: part.state for case, part in first.items() if case[0] == 1}, folder / "shared.pt")
    save({case: part for case, part in first.items() if case[1] == "fp32"}, folder / "chain.pt")


def run_case(case: Case, shared: WholeState, rank: int, world_size: int) -> Outcome:
    engine = new_engine(case_settings(case), 1, world_size)
    engine.load_state(shared)
    loaded = gather(engine.state())
    one = Part(run_steps(engine, [3], rank, world_size), gather(engine.state()))
    load = take_expert_load(engine)
    two = Part(run_steps(engine, [4, 5], rank, world_size), gather(engine.state()))
    engine.load_state(one.state)
    skip_nans(engine, rank, world_size)
    skipped = Part(run_steps(engine, [4, 5], rank, world_size), gather(engine.state()))
    engine = new_engine(case_settings(case), 1, world_size)
    engine.load_state(one.state)
    resumed = Part(run_steps(engine, [4, 5], rank, world_size), gather(engine.state()))
    decays = [group["weight_decay"] for group in engine._engine.optimizer.param_groups]
    return Outcome(loaded, one, two, skipped, resumed, decays, load)


def skip_nans(engine: Any, rank: int, world_size: int) -> None:
    """Gather gradients that are all NaN, of one micro-batch and then of a whole step, and skip both."""
    engine.forward_backward(micro_batch(grid(8)[0]), terms=float("nan"))
    engine.skip_step()
    forward_backward(engine, grid(9), rank, world_size, factor=float("nan"))
    engine.skip_step()


@functools.cache
def plain_torch_adamw() -> list[tuple[float, float]]:
    """Train six steps on whole batches in one process without DeepSpeed."""
    decoder = new_decoder(make_settings(), 0)
    matrices = [p for p in decoder.parameters() if p.dim() >= 2]
    vectors = [p for p in decoder.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    out = []
    for step in range(6):
        rows = grid(step).flatten(0, 1)
        loss = decoder(rows[:, :-1], rows[:, 1:]) / 256
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        out.append((loss.item(), norm.item()))
    return out


def assert_same(one: Part, other: Part) -> None:
    """Want equal bits."""
    assert one.curve == other.curve
    assert_same_state(one.state, other.state)


def assert_same_state(one: WholeState, other: WholeState) -> None:
    assert one.facts == other.facts
    assert one.tensors.keys() == other.tensors.keys()
    for key, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[key].dtype and torch.equal(tensor, other.tensors[key]), key


@pytest.mark.shows("ZeRO 0 to 3 in fp32 train as plain torch does, to 2e-5, also when 2 workers become 3 or 1")
@worlds_too
@pytest.mark.parametrize("stage", STAGES)
def test_fp32_adamw_is_plain_torch(folder: Path, outcomes: dict[Any, Outcome], stage: int, world_size: int) -> None:
    first, later = load(folder / "first.pt")[stage, "fp32", "adamw"], outcomes[world_size, (stage, "fp32", "adamw")]
    found = torch.tensor(first.curve + later.one.curve + later.two.curve)
    torch.testing.assert_close(found, torch.tensor(plain_torch_adamw()), rtol=2e-5, atol=0)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-6), ("bf16", 1e-3)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stages_agree(folder: Path, optimizer: str, precision: str, tolerance: float) -> None:
    losses = [[loss for loss, _ in load(folder / "first.pt")[stage, precision, optimizer].curve] for stage in STAGES]
    for stage in (1, 2, 3):
        torch.testing.assert_close(losses[stage], losses[0], rtol=tolerance, atol=0)


@pytest.mark.shows("A state written by any number of workers in any ZeRO stage loads, bit by bit, into any other")
@worlds_too
@ids
def test_loaded_state_is_the_one_that_was_saved(
    folder: Path, outcomes: dict[Any, Outcome], case: Case, world_size: int
) -> None:
    shared: WholeState = load(folder / "shared.pt")[case[1:]]
    loaded = outcomes[world_size, case].loaded
    if case == (0, "bf16", "muon"):
        # Without ZeRO, DeepSpeed keeps Muon's mean in fp32; the others have it in the weights' type.
        wide = {key: value.float() if key[1] == "momentum" else value for key, value in shared.tensors.items()}
        shared = WholeState(wide, shared.facts)
    assert_same_state(loaded, shared)
    assert loaded.facts["optimizer_steps"] == 3
    kinds = {"master", "buffer", "exp_avg", "exp_avg_sq", *(["momentum"] if case[2] == "muon" else [])}
    assert {kind for _, kind in loaded.tensors} == kinds
    assert {name for name, kind in loaded.tensors if kind in ("master", "buffer")} == set(
        new_decoder(case_settings(case), 0).state_dict()
    )
    bias = loaded.tensors["model.layers.1.mlp.gate.e_score_correction_bias", "buffer"]
    assert bias.dtype == torch.float32 and bool((bias != 0).all())


@pytest.mark.shows("One fp32 step from a shared state is equal to 1e-6 for 1, 2 or 3 workers in ZeRO 0 to 3")
@worlds_too
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_step_from_a_shared_state(
    outcomes: dict[Any, Outcome], stage: int, optimizer: str, world_size: int
) -> None:
    expected = outcomes[1, (1, "fp32", optimizer)].one
    found = outcomes[world_size, (stage, "fp32", optimizer)].one
    (loss, norm), (expected_loss, expected_norm) = found.curve[0], expected.curve[0]
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    # With Muon, ZeRO 1-3 report the norm of the orthogonalized update.
    if optimizer == "adamw" or stage > 0:
        assert norm == pytest.approx(expected_norm, rel=1e-6)
    assert found.state.facts == expected.state.facts
    assert found.state.tensors.keys() == expected.state.tensors.keys()
    pairs = {key: (tensor, found.state.tensors[key]) for key, tensor in expected.state.tensors.items()}
    if optimizer == "muon":
        # Newton-Schulz makes rounding of the mean a hundred times larger: of one small matrix, 1.1e-6 was measured.
        masters = [pairs.pop(key) for key in expected.state.tensors if key[1] == "master"]
        pairs["all weights", "master"] = (
            torch.cat([one for one, _ in masters]),
            torch.cat([one for _, one in masters]),
        )
    for key, (tensor, other) in pairs.items():
        assert (other - tensor).norm() <= 1e-6 * tensor.norm(), key


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_moves_from_world_to_world(
    folder: Path, outcomes: dict[Any, Outcome], stage: int, optimizer: str
) -> None:
    """A step each with 2, 3 and 1 workers, in another stage each, is three steps with 2 workers."""
    moved: Part = load(folder / "chain.pt")[stage, "fp32", optimizer]
    stayed = outcomes[2, (1, "fp32", optimizer)]
    assert moved.state.facts == {"optimizer_steps": 6}
    losses = [loss for loss, _ in moved.curve[3:]]
    assert losses == pytest.approx([loss for loss, _ in stayed.one.curve + stayed.two.curve], rel=2e-6)


@pytest.mark.shows("With the same number of workers training goes on bit by bit, in fp32 and bf16, with AdamW and Muon")
@worlds_too
@ids
def test_resumes_bit_by_bit(outcomes: dict[Any, Outcome], case: Case, world_size: int) -> None:
    outcome = outcomes[world_size, case]
    assert_same(outcome.resumed, outcome.two)


@worlds_too
@ids
def test_skipped_step_leaves_no_trace(outcomes: dict[Any, Outcome], case: Case, world_size: int) -> None:
    outcome = outcomes[world_size, case]
    assert_same(outcome.skipped, outcome.two)


@worlds_too
@ids
def test_weight_decay_of_each_group_survives(outcomes: dict[Any, Outcome], case: Case, world_size: int) -> None:
    expected = [0.1, 0.0] if case[2] == "adamw" else [0.01, 0.01, 0.0]
    assert outcomes[world_size, case].decays == expected


@worlds_too
@ids
def test_filled_up_share_counts_no_tokens(outcomes: dict[Any, Outcome], case: Case, world_size: int) -> None:
    assert outcomes[world_size, case].expert_load == [4 * 4 * 16 * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batch_without_targets_has_no_gradient(dtype: torch.dtype) -> None:
    decoder = new_decoder(make_settings(), 0).to(dtype)
    tokens = torch.zeros(4, 16, dtype=torch.int64)
    loss = decoder(tokens, torch.full_like(tokens, IGNORED_TARGET))
    loss.backward()
    assert loss.item() == 0
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
