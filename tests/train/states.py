"""Small states for tests of checkpoints: made from a seed, cut for any number of ranks, compared bit by bit."""

import random
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from ray_ds.train.checkpoints import CheckpointReader, CheckpointWriter, Commit
from ray_ds.train.host import Part
from ray_ds.train.packing import pack
from ray_ds.train.state import EngineState, Kind, Piece, StateReader

State = dict[tuple[str, Kind], Tensor]
SHAPES = {"embedding.weight": (13, 4), "layers.0.w": (6, 5), "layers.1.w": (7,), "norm": (3,)}


def make_state(seed: int) -> State:
    """Return all tensors of a state; other seeds give other values everywhere."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in SHAPES.items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            state[name, kind] = torch.randn(shape, generator=generator)
    state["layers.1.w", "momentum"] = torch.randn(7, generator=generator).to(torch.bfloat16)
    state["layers.0.bias", "buffer"] = torch.randn(5, generator=generator, dtype=torch.float64)
    state["layers.0.load", "buffer"] = torch.randint(0, 1000, (5,), generator=generator)
    return state


def facts_of(step: int) -> dict[str, JsonValue]:
    return {"optimizer_steps": step, "loss_scale": 2.0**15, "scaler": {"growth": 1 / 3, "tracker": None}}


def extra_of(step: int) -> dict[str, JsonValue]:
    return {"cursor": step * 8, "seed": 7, "note": "ü"}


def cut(state: State, world_size: int, *, seed: int) -> list[list[Piece]]:
    """Return each rank's pieces: every tensor is cut at random places, and each run goes to a random rank."""
    order = random.Random(seed)
    pieces: list[list[Piece]] = [[] for _ in range(world_size)]
    for (name, kind), tensor in state.items():
        flat = tensor.flatten()
        places = sorted(order.randint(0, flat.numel()) for _ in range(world_size - 1))
        for start, stop in zip([0, *places], [*places, flat.numel()], strict=True):
            piece = Piece(name=name, kind=kind, shape=tuple(tensor.shape), start=start, values=flat[start:stop])
            pieces[order.randrange(world_size)].append(piece)
    return pieces


def make_parts(step: int, world_size: int, *, seed: int | None = None) -> list[Part]:
    """Return all ranks' parts of the state that belongs to a step."""
    state = make_state(step if seed is None else seed)
    return [
        pack(
            EngineState(pieces=pieces, facts=facts_of(step)),
            step=step,
            rank=rank,
            world_size=world_size,
            extra=extra_of(step),
            own={"random": f"{step}-{rank}"},
        )
        for rank, pieces in enumerate(cut(state, world_size, seed=step))
    ]


def assert_holds(reader: StateReader, step: int, *, seed: int | None = None) -> None:
    """Read a state for another number of ranks and compare every bit with the one that belongs to a step."""
    expected = make_state(step if seed is None else seed)
    assert reader.facts == facts_of(step)
    for pieces in cut(expected, 1 + step % 5, seed=step + 1):
        for piece in pieces:
            assert reader.has(piece.name, piece.kind)
            found = reader.read(piece.name, piece.kind, piece.start, piece.stop)
            assert found.dtype == piece.values.dtype
            assert torch.equal(found, piece.values), f"{piece.kind} of {piece.name}"


def make_writers(
    root: str | Path, world_size: int, *, keep: int = 3, keep_best: bool = False
) -> list[CheckpointWriter]:
    """Return the writers of all ranks, which need no process of their own."""
    return [
        CheckpointWriter(str(root), rank=rank, world_size=world_size, keep=keep, keep_best=keep_best, timeout_s=20)
        for rank in range(world_size)
    ]


def metrics_of(step: int) -> str:
    return "".join(f'{{"step":{number}}}\n' for number in range(1, step + 1))


def start(
    writers: list[CheckpointWriter],
    step: int,
    *,
    attempt: str = "first",
    validation_loss: float | None = None,
    seed: int | None = None,
) -> None:
    """Begin a checkpoint on all ranks."""
    parts = make_parts(step, len(writers), seed=seed)
    for writer, part in zip(writers, parts, strict=True):
        writer.start(part, attempt=attempt, metrics=metrics_of(step), validation_loss=validation_loss)


def write(writers: list[CheckpointWriter], step: int, *, attempt: str = "first", loss: float | None = None) -> None:
    """Write a checkpoint of all ranks and wait until it counts."""
    start(writers, step, attempt=attempt, validation_loss=loss)
    for writer in writers:
        writer.wait(30)


def assert_readable(root: str | Path, commit: Commit) -> None:
    """Compare a checkpoint with the state that belongs to its step."""
    with CheckpointReader(str(root), commit) as reader:
        assert_holds(reader, commit.step)
        assert reader.extra == extra_of(commit.step)
        assert reader.metrics() == metrics_of(commit.step)
        for rank in range(commit.world_size):
            assert reader.own(rank) == {"random": f"{commit.step}-{rank}"}
