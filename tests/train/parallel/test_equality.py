"""Groups of processes and offloading against one process that has all to itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.parallel.groups import Outcome, group_settings, load, new_engine, run, run_step, save
from tests.train.zero.worlds import WholeState, gather, run_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 20
FEW_STEPS = 4
LONG = {
    "tensor-mla-zero-2",
    "tensor-gqa-zero-1",
    "expert-mla-zero-2",
    "sequence-experts-zero-1",
    "offload-experts-zero-2",
}
"""Cases of 20 steps; the others take 4, and all that move."""
Case = tuple[str, dict[str, Any]]
"""Model and what differs from one process with ZeRO 1 in fp32."""
TENSOR, EXPERT, SEQUENCE = ({"parallel": {axis: 2}} for axis in ("tensor", "expert", "sequence"))
OPTIMIZER, ALL = {"offload": "optimizer"}, {"offload": "all", "zero_stage": 3}
CASES: dict[int, dict[str, Case]] = {
    1: {f"one-{model}": (model, {}) for model in ("mla", "gqa", "experts", "gqa-experts")},
    2: {
        **{f"tensor-mla-zero-{stage}": ("mla", {**TENSOR, "zero_stage": stage}) for stage in (0, 1, 2)},
        "tensor-gqa-zero-1": ("gqa", TENSOR),
        "tensor-gqa-zero-2-offload": ("gqa", {**TENSOR, **OPTIMIZER, "zero_stage": 2}),
        "tensor-gqa-recomputed": ("gqa", {**TENSOR, "recompute_activations": True}),
        **{f"expert-mla-zero-{stage}": ("experts", {**EXPERT, "zero_stage": stage}) for stage in (0, 1, 2)},
        "expert-gqa-zero-1-offload": ("gqa-experts", {**EXPERT, **OPTIMIZER}),
        "expert-gqa-recomputed": ("gqa-experts", {**EXPERT, "recompute_activations": True}),
        **{f"sequence-experts-zero-{stage}": ("experts", {**SEQUENCE, "zero_stage": stage}) for stage in (0, 1, 2, 3)},
        "sequence-gqa-zero-3-all-offloaded": ("gqa", {**SEQUENCE, **ALL}),
        "sequence-gqa-recomputed": ("gqa", {**SEQUENCE, "recompute_activations": True}),
        **{f"offload-experts-zero-{stage}": ("experts", {**OPTIMIZER, "zero_stage": stage}) for stage in (1, 2, 3)},
        "offload-gqa-zero-3-all": ("gqa", ALL),
    },
    4: {
        "tensor-mla-two-groups": ("mla", {**TENSOR, "zero_stage": 2}),
        "tensor-mla-of-4": ("mla", {"parallel": {"tensor": 4}}),
        "expert-mla-two-groups": ("experts", {**EXPERT, "zero_stage": 2}),
        "expert-mla-of-4": ("experts", {"parallel": {"expert": 4}}),
        "sequence-experts-two-groups": ("experts", {**SEQUENCE, "zero_stage": 3}),
    },
}
MOVES = {
    "tensor-mla-zero-1": ("tensor-mla-two-groups", "tensor-mla-of-4"),
    "expert-mla-zero-2": ("expert-mla-two-groups", "expert-mla-of-4", "sequence-experts-two-groups"),
    "sequence-experts-zero-3": ("expert-mla-of-4",),
    "offload-experts-zero-2": ("expert-mla-two-groups", "sequence-experts-two-groups"),
    "offload-experts-zero-3": ("expert-mla-of-4",),
}
"""Whose state, after the last step, goes on in which other layout."""
DIVIDED = [name for world_size in (2, 4) for name in CASES[world_size]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("groups")
    found: dict[str, Any] = {}
    for world_size in CASES:
        run_world(world_size, run_cases, folder)
        found |= load(folder / f"outcomes-{world_size}.pt")
    return found


def run_cases(rank: int, world_size: int, folder: Path) -> None:
    found: dict[str, Any] = {}
    for name, (model, changes) in CASES[world_size].items():
        settings = group_settings(model, **changes)
        found[name] = run(settings, FEW_STEPS, world_size)
        if name in LONG:
            found[f"{name}-long"] = run(settings, STEPS, world_size)
        if world_size == 1:
            found[f"{name}-long"] = run(settings, STEPS, world_size)
            found[f"{name}-on"] = go_on(settings, found[name].last, world_size)
    if world_size == 4:
        before = load(folder / "outcomes-2.pt")
        for old, targets in MOVES.items():
            for new in targets:
                model, changes = CASES[4][new]
                found[f"{old}-to-{new}"] = go_on(group_settings(model, **changes), before[old].last, world_size)
    save(found, folder / f"outcomes-{world_size}.pt")


def go_on(settings: Any, state: WholeState, world_size: int) -> tuple[WholeState, tuple[float, ...]]:
    """Load a state into a new engine; return it as listed again, and the next step's figures."""
    engine = new_engine(settings, 1, world_size)
    engine.load_state(state)
    return gather(engine.state()), run_step(engine, FEW_STEPS)


def reference_name(name: str) -> str:
    """Return the case of one process with the same model."""
    return next(f"one-{model}" for cases in CASES.values() for key, (model, _) in cases.items() if key == name)


def reference(outcomes: dict[str, Any], name: str) -> Outcome:
    one: Outcome = outcomes[reference_name(name)]
    return one


def assert_close(found: WholeState, expected: WholeState, kinds: tuple[str, ...], tolerance: float) -> None:
    """Want each tensor within a part of its norm."""
    assert found.tensors.keys() == expected.tensors.keys()
    for key, tensor in expected.tensors.items():
        if key[1] in kinds:
            assert (found.tensors[key] - tensor).norm() <= tolerance * tensor.norm(), key


@pytest.mark.shows("In tensor, expert and sequence groups and offloaded, 20 fp32 losses are one process's within 1e-5")
@pytest.mark.parametrize("name", LONG)
def test_twenty_losses_and_norms_are_those_of_one_process(outcomes: dict[str, Any], name: str) -> None:
    expected = outcomes[f"{reference_name(name)}-long"]
    found = torch.tensor(outcomes[f"{name}-long"].curve)
    torch.testing.assert_close(found, torch.tensor(expected.curve), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", DIVIDED)
def test_losses_and_norms_are_those_of_one_process(outcomes: dict[str, Any], name: str) -> None:
    expected, found = reference(outcomes, name), outcomes[name]
    torch.testing.assert_close(torch.tensor(found.curve), torch.tensor(expected.curve), rtol=1e-5, atol=0)
    assert found.load == expected.load
    assert found.validation == pytest.approx(expected.validation, rel=1e-5)


@pytest.mark.parametrize("name", DIVIDED)
def test_gradients_are_those_of_one_process(outcomes: dict[str, Any], name: str) -> None:
    """AdamW's first mean of the first step is a tenth of the gradient."""
    assert_close(outcomes[name].first, reference(outcomes, name).first, ("exp_avg",), 1e-5)


@pytest.mark.parametrize("name", DIVIDED)
def test_weights_as_kept_and_as_exported_are_those_of_one_process(outcomes: dict[str, Any], name: str) -> None:
    expected, found = reference(outcomes, name), outcomes[name]
    assert_close(found.last, expected.last, ("master", "buffer"), 1e-5)
    assert found.weights.keys() == expected.weights.keys()
    for key, weight in found.weights.items():
        kind = "buffer" if (key, "buffer") in found.last.tensors else "master"
        assert key == "lm_head.weight" or torch.equal(weight.flatten(), found.last.tensors[key, kind]), key


@pytest.mark.shows("A state written in groups or offloaded loads, bit by bit, into groups of another size or kind")
@pytest.mark.parametrize(("old", "new"), [(old, new) for old, targets in MOVES.items() for new in targets])
def test_states_move_between_layouts(outcomes: dict[str, Any], old: str, new: str) -> None:
    listed, figures = outcomes[f"{old}-to-{new}"]
    saved = outcomes[old].last
    assert listed.facts == saved.facts and listed.tensors.keys() == saved.tensors.keys()
    for key, tensor in saved.tensors.items():
        assert torch.equal(listed.tensors[key], tensor), key
    model = CASES[4][new][0]
    assert figures == pytest.approx(outcomes[f"one-{model}-on"][1], rel=1e-5)
