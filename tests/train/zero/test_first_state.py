"""An engine that was given first weights as a state is, bit by bit, one that was made with them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ds.train import start
from ray_ds.train.first_state import FirstState
from tests.train.chats import new_checkpoint, tuned_settings, tuning_task
from tests.train.runs import make_settings, make_task
from tests.train.zero.worlds import new_decoder, new_engine, run_steps, run_world

SEED = 3
ADAMW = {"kind": "adamw", "lr": 1e-2, "weight_decay": 0.1}
MUON = {"kind": "muon", "lr": 1e-2, "weight_decay": 0.1}


def begin_both_ways(rank: int, world_size: int, folder: Path, changes: dict[str, Any]) -> None:
    from ray_ds.train.zero.engine import Engine

    settings = make_settings(num_workers=world_size, **changes)
    made = new_engine(settings, SEED, world_size)
    expected = values_of(made)
    figures = run_steps(made, range(2), rank, world_size)
    objective = start.NextTokenObjective(new_decoder(settings, SEED + 1))
    with torch.no_grad():
        for parameter in objective.decoder.parameters():
            parameter.fill_(math.nan)  # memory that nobody has written may hold anything
    given = Engine(objective, settings, device=torch.device("cpu"), world_size=world_size)
    dtype = start.DTYPES[settings.precision]
    given.load_state(FirstState(new_decoder(settings, SEED), dtype, given.state().facts))
    found = values_of(given)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert run_steps(given, range(2), rank, world_size) == figures


def values_of(engine: Any) -> dict[tuple[str, str, int], torch.Tensor]:
    """Return copies of what a process holds of weights and buffers; the optimizer has learnt nothing yet."""
    learnt = ("exp_avg", "exp_avg_sq", "momentum")
    pieces = engine.state().pieces
    assert not any(piece.values.any() for piece in pieces if piece.kind in learnt)
    return {(own.name, own.kind, own.start): own.values.clone() for own in pieces if own.kind not in learnt}


@pytest.mark.slow
@pytest.mark.shows("First weights that are loaded as a state train as those an engine is made with, bit by bit")
@pytest.mark.parametrize(
    ("zero_stage", "precision", "optimizer"),
    [
        (0, "fp32", ADAMW), (0, "bf16", ADAMW), (1, "bf16", MUON),
        (2, "bf16", ADAMW), (3, "fp32", ADAMW), (3, "bf16", MUON),
    ],
)  # fmt: skip
def test_it_is_the_engine_that_was_made_with_them(
    tmp_path: Path, zero_stage: int, precision: str, optimizer: dict[str, Any]
) -> None:
    changes = {"zero_stage": zero_stage, "precision": precision, "optimizer": optimizer, "gradient_clipping": 0.0}
    run_world(2, begin_both_ways, tmp_path, changes)


def test_masters_are_of_the_type_trained_in_and_nothing_is_learnt() -> None:
    decoder = new_decoder(make_settings(), SEED)
    first = FirstState(decoder, torch.bfloat16, {"optimizer_steps": 0})
    for name, parameter in decoder.named_parameters():
        rounded = parameter.detach().bfloat16().float().flatten()
        assert torch.equal(first.read(name, "master", 2, 9), rounded[2:9])
        assert first.has(name, "master") and not first.has(name, "exp_avg") and not first.has(name, "momentum")
    for name, buffer in decoder.named_buffers():
        if name in decoder.state_dict():
            assert torch.equal(first.read(name, "buffer", 0, buffer.numel()), buffer.flatten())


@pytest.mark.shows("A restart draws no first weights and reads none, for the state it goes on from has all of them")
def test_what_a_state_will_bring_is_not_made_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("first weights were made")

    device = torch.device("cpu")
    new = make_task(tmp_path, make_settings())
    tuned = tuning_task(tmp_path, tuned_settings(), "chat", "tuned")
    adapted = tuning_task(tmp_path, tuned_settings(lora={"rank": 4}), "chat", "adapted")
    kept = start.make_objective(adapted, device).decoder.state_dict()
    assert adapted.init_from == new_checkpoint(tmp_path / "start")
    first = start.first_weights(adapted).state_dict()
    assert all(torch.equal(kept[name], first[name]) for name in first)  # no state has what is not trained
    monkeypatch.setattr(start, "init_weights", refuse)
    monkeypatch.setattr(start, "load_checkpoint", refuse)
    for task in (new, tuned):
        decoder = start.make_objective(task, device).decoder
        assert {name for name, _ in decoder.named_parameters()} <= first.keys()
        assert not any(buffer.any() for name, buffer in decoder.named_buffers() if name.endswith("expert_load"))
