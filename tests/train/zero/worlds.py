"""Several processes that train side by side, and a whole state in memory, for tests of the engine."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ray_ds.config.train import TrainSettings
from ray_ds.model.balance import expert_load, reset_expert_load
from ray_ds.model.decoder import Decoder
from ray_ds.model.experts import Gate
from ray_ds.model.initial import init_weights
from ray_ds.model.loss import IGNORED_TARGET
from ray_ds.train.objective import MicroBatch, NextTokenObjective
from ray_ds.train.state import EngineState, Kind
from tests.train.processes import spawn
from tests.train.runs import VOCAB_SIZE


@dataclass(frozen=True)
class WholeState:
    """A `StateReader` over the pieces of all processes."""

    tensors: Mapping[tuple[str, str], Tensor]
    """By name and kind, flattened."""
    facts: Mapping[str, Any]

    def has(self, name: str, kind: Kind) -> bool:
        return (name, kind) in self.tensors

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= self.tensors[name, kind].numel()
        return self.tensors[name, kind][start:stop]


def gather(state: EngineState) -> WholeState:
    """Put all processes' pieces together; they must cover every tensor once."""
    mine = [(p.name, p.kind, p.shape, p.start, p.values.detach().cpu().clone()) for p in state.pieces]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (mine, dict(state.facts)))
    tensors: dict[tuple[str, str], Tensor] = {}
    counts: dict[tuple[str, str], Tensor] = {}
    for pieces, facts in parts:
        assert facts == parts[0][1]
        for name, kind, shape, start, values in pieces:
            assert values.dim() == 1 and values.numel() > 0
            numel = torch.Size(shape).numel()
            whole = tensors.setdefault((name, kind), torch.zeros(numel, dtype=values.dtype))
            assert (whole.numel(), whole.dtype) == (numel, values.dtype)
            whole[start : start + len(values)] = values
            counts.setdefault((name, kind), torch.zeros(numel, dtype=torch.int64))[start : start + len(values)] += 1
    for key, count in counts.items():
        assert bool((count == 1).all()), f"{key} is covered {count.min()} to {count.max()} times"
    return WholeState(tensors, parts[0][1])


def run_world(world_size: int, function: Callable[..., None], folder: Path, *args: Any) -> None:
    """Call `function(rank, world_size, folder, *args)` in as many processes, each with one thread."""
    spawn(_enter, (world_size, function, folder, args), count=world_size)


def _enter(rank: int, world_size: int, function: Callable[..., None], folder: Path, args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    function(rank, world_size, folder, *args)


def new_decoder(settings: TrainSettings, seed: int) -> Decoder:
    """Return a decoder with its first weights, and biases of its routers that differ from zero and by the seed."""
    decoder = Decoder(settings.model.resolve(VOCAB_SIZE, settings.seq_len))
    init_weights(decoder, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in decoder.modules():
        if isinstance(module, Gate):
            module.e_score_correction_bias.normal_(0, 0.01, generator=generator)
    return decoder


def new_engine(settings: TrainSettings, seed: int, world_size: int) -> Any:
    """Return an engine on the CPU."""
    from ray_ds.train.zero.engine import Engine

    objective = NextTokenObjective(new_decoder(settings, seed))
    return Engine(objective, settings, device=torch.device("cpu"), world_size=world_size)


def micro_batch(rows: Tensor) -> MicroBatch:
    """Return rows of tokens, (B, T + 1), as a micro-batch of a step."""
    return MicroBatch(rows[:, :-1], rows[:, 1:], terms=rows[:, 1:].numel(), index=0)


def grid(step: int) -> Tensor:
    """Return a step's 4 micro-batches of 4 rows."""
    return torch.randint(VOCAB_SIZE, (4, 4, 17), generator=torch.Generator().manual_seed(step))


def counting_grid(step: int) -> Tensor:
    """Return a step's 4 micro-batches of 4 rows that count upwards: easily learnt."""
    starts = torch.randint(VOCAB_SIZE - 3, (4, 4, 1), generator=torch.Generator().manual_seed(step))
    return (starts + torch.arange(17)) % (VOCAB_SIZE - 3) + 3


def run_step(engine: Any, rows: Tensor, rank: int, world_size: int) -> tuple[float, float]:
    """Train on a step's micro-batches (M, B, T + 1) and return loss and gradient norm."""
    total = forward_backward(engine, rows, rank, world_size)
    dist.all_reduce(total)
    return float(total) / rows[..., 1:].numel(), engine.step(1.0).grad_norm


def forward_backward(engine: Any, rows: Tensor, rank: int, world_size: int, factor: float = 1.0) -> Tensor:
    """Add the gradients of this process's micro-batches, filled up with some without targets; return their loss.

    Args:
        factor: what the gradients are multiplied by.
    """
    mine = rows.tensor_split(world_size)[rank]
    terms = rows[..., 1:].numel() / factor
    total = torch.zeros(())
    for part in mine:
        total += engine.forward_backward(micro_batch(part), terms=terms)[0]
    for _ in range(-(-len(rows) // world_size) - len(mine)):
        tokens = torch.zeros_like(rows[0, :, 1:])
        padding = MicroBatch(tokens, torch.full_like(tokens, IGNORED_TARGET))
        total += engine.forward_backward(padding, terms=terms)[0]
    return total


def take_expert_load(engine: Any) -> list[int]:
    """Return how many choices each MoE layer's experts had together, on all processes, and start anew."""
    load = expert_load(engine.decoder).clone()
    dist.all_reduce(load)
    reset_expert_load(engine.decoder)
    counts: list[int] = load.sum(dim=-1).tolist()
    return counts


def run_steps(engine: Any, steps: Iterable[int], rank: int, world_size: int) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of some steps."""
    return [run_step(engine, grid(step), rank, world_size) for step in steps]
