"""The state of training by logical parameter: what any number of processes in any ZeRO stage writes and reads.

A process holds `Piece`s: runs of elements of logical tensors (a parameter's fp32 master, its optimizer state, a
router's bias). The pieces of all processes together cover every tensor once, so that they can be cut anew for another
number of processes or another ZeRO stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import JsonValue
from torch import Tensor

Kind = Literal["master", "exp_avg", "exp_avg_sq", "momentum", "buffer"]
"""`master`: the weight in fp32, from which the weights trained in are rounded; `exp_avg`, `exp_avg_sq`: AdamW's running
means; `momentum`: Muon's running mean; `buffer`: what is kept beside the parameters, such as a router's bias."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A run of a logical tensor's elements that this process holds."""

    name: str
    """The parameter's or buffer's name in the decoder."""
    kind: Kind
    shape: tuple[int, ...]
    """Of the whole logical tensor."""
    start: int
    """Where the run begins, counted in elements of the flattened tensor."""
    values: Tensor
    """1-D, on any device: a view of the process's memory, which the next step changes."""

    @property
    def stop(self) -> int:
        """Where the run ends."""
        return self.start + self.values.numel()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Neighbouring elements of a logical tensor, without their values."""

    name: str
    kind: Kind
    start: int
    """Where they begin, counted in elements of the flattened tensor."""
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineState:
    """One process's part of an engine's state."""

    pieces: Sequence[Piece]
    """No element is in the pieces of two processes."""
    facts: Mapping[str, JsonValue]
    """The same on every process: `optimizer_steps`, and with fp16 `loss_scale`, the scaler's own fields."""


class StateReader(Protocol):
    """A whole state to load from, wherever its pieces lie."""

    @property
    def facts(self) -> Mapping[str, JsonValue]:
        """What `EngineState.facts` was."""

    def has(self, name: str, kind: Kind) -> bool:
        """Tell whether the state has a tensor; AdamW's means are absent before the first step."""

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        """Return elements of a flattened tensor, 1-D on the CPU in the type they were written.

        Raises:
            ArtifactError: the pieces do not cover them, or are damaged.
        """
