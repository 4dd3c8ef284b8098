"""Where the elements of logical tensors lie in the flat tensors that DeepSpeed's optimizers update."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatSpan:
    """Neighbouring elements of a parameter, and where they lie in a flat tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    stop: int
    offset: int
    """Where they begin in the flat tensor."""

    def within(self, flat: Tensor) -> Tensor:
        """Return them, a 1-D view."""
        return flat.detach().view(-1)[self.offset : self.offset + self.stop - self.start]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a tensor of this process holds."""

    owned: Sequence[FlatSpan]
    """What this process lists; no element is listed by two."""
    held: Sequence[FlatSpan]
    """All there is but padding; it overlaps with other processes' where these keep copies."""
    shape: torch.Size
    """Of the tensor itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A tensor that the optimizer updates."""

    master: Tensor
    layout: Layout
    """Of the master and AdamW's means."""
    momentum: Layout | None
    """Of Muon's mean; None where AdamW trains."""
    momentum_dtype: torch.dtype


class Stage(Protocol):
    """A ZeRO stage's ways."""

    def trained(self) -> list[Trained]:
        """Return what this process's optimizer updates."""

    def open(self) -> None:
        """Get ready for masters to be written."""

    def refresh(self) -> None:
        """Round the masters to the weights trained in, on all processes."""

    def settle(self) -> None:
        """End what is under way of fetching weights ahead of their use."""

    def drop_gradients(self) -> None:
        """Forget the gradients gathered since the last step, as after an overflow of fp16."""
