"""Real engines' state through files: written in one ZeRO stage by some processes, read in another by more or fewer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import JsonValue
from torch import Tensor

from ray_ds.config.train import TrainSettings
from ray_ds.train import checkpoints
from ray_ds.train.packing import pack
from ray_ds.train.state import Kind, StateReader, Stretch
from tests.train.runs import make_settings
from tests.train.zero.worlds import gather, new_engine, run_steps, run_world

CHAIN = [(2, 2), (3, 3), (1, 0), (2, 1)]
"""World size and ZeRO stage, one after the other from the checkpoint before."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": {"kind": "adamw", "lr": 0.01}, "gradient_clipping": 1.0},
    "muon": {"optimizer": {"kind": "muon", "lr": 0.005}, "gradient_clipping": 0.0},
}


def settings_of(stage: int, optimizer: str) -> TrainSettings:
    return make_settings(zero_stage=stage, precision="bf16", num_workers=1, **OPTIMIZERS[optimizer])


class WatchedReader:
    """A reader that notes what was read."""

    def __init__(self, reader: StateReader) -> None:
        self._reader = reader
        self.stretches: set[Stretch] = set()

    @property
    def facts(self) -> Mapping[str, JsonValue]:
        return self._reader.facts

    def has(self, name: str, kind: Kind) -> bool:
        return self._reader.has(name, kind)

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        self.stretches.add(Stretch(name=name, kind=kind, start=start, stop=stop))
        return self._reader.read(name, kind, start, stop)


def train_on(rank: int, world_size: int, _: Path, folder: Path, stage: int, optimizer: str) -> None:
    """Load the newest checkpoint, check every bit of it, train a step, write the next checkpoint."""
    root = str(folder / optimizer)
    engine = new_engine(settings_of(stage, optimizer), world_size, world_size)
    found = checkpoints.find_latest(root)
    step = found.step if found is not None else 0
    if found is not None:
        with checkpoints.CheckpointReader(root, found) as reader:
            watched = WatchedReader(reader)
            engine.load_state(watched)
            wanted = {stretch for stretch in engine.needs() if reader.has(stretch.name, stretch.kind)}
            assert watched.stretches == wanted, "a restart fetches what the engine says, before the engine reads it"
        expected = torch.load(folder / f"{optimizer}-{step}.pt", weights_only=False)
        loaded = gather(engine.state())
        assert loaded.facts == expected.facts
        assert loaded.tensors.keys() == expected.tensors.keys()
        for key, tensor in expected.tensors.items():
            # Without ZeRO, DeepSpeed keeps Muon's mean in fp32; the others have it in the weights' type.
            as_kept = tensor.to(loaded.tensors[key].dtype) if key[1] == "momentum" else tensor
            assert torch.equal(loaded.tensors[key], as_kept), key
    run_steps(engine, [step], rank, world_size)
    whole = gather(engine.state())
    if rank == 0:
        torch.save(whole, folder / f"{optimizer}-{step + 1}.pt")
    writer = checkpoints.CheckpointWriter(root, rank=rank, world_size=world_size, keep=2, keep_best=False)
    part = pack(engine.state(), step=step + 1, rank=rank, world_size=world_size, extra={})
    writer.start(part, attempt=f"attempt-{step}", metrics="", validation_loss=None)
    writer.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.shows("A checkpoint of any ZeRO stage and number of workers goes on, bit by bit, in any other")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_moves_between_stages_and_numbers_of_processes(tmp_path: Path, optimizer: str) -> None:
    for number, (world_size, stage) in enumerate(CHAIN):
        meeting_place = tmp_path / str(number)
        meeting_place.mkdir()
        run_world(world_size, train_on, meeting_place, tmp_path, stage, optimizer)
    found = checkpoints.find_latest(str(tmp_path / optimizer))
    assert found is not None and (found.step, found.world_size, found.facts["optimizer_steps"]) == (4, 2, 4)
