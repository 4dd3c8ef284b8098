"""What the processes tell each other once a step, so that all of them do the same next."""

from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ray_ds.train.host import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Word:
    """What one process has to say; of all processes' words the largest of each field counts."""

    request: Request
    """What it was asked for."""
    has_failed: bool
    """It could not write its part of the last checkpoint."""
    is_sending: bool
    """A part of a snapshot of its was on its way since the step before."""
    step_s: float
    """Time of its last step alone."""
    stall_s: float
    """Time after that step in which it packed a snapshot and handed it over."""
    other_s: float
    """Time after that step that went into validation, checkpoints and the like."""
    memory_bytes: int
    """The most memory it has had."""


class Agreement:
    """The processes' words on their way to each other; all processes make and read it together.

    One collective of about ten numbers a process. The losses are added in fp64 in the order of the ranks, so the result
    does not depend on how a library reduces.

    Args:
        loss_sums: the loss and its parts, 1-D fp64 on the device of the process group, summed over this process's
            micro-batches.
    """

    def __init__(self, loss_sums: Tensor, word: Word) -> None:
        fields = torch.tensor([float(value) for value in astuple(word)], dtype=torch.double)
        mine = torch.cat([loss_sums, fields.to(loss_sums.device, non_blocking=True)])
        self._num_losses = len(loss_sums)
        self._words = torch.empty(dist.get_world_size() * len(mine), dtype=torch.double, device=loss_sums.device)
        dist.all_gather_into_tensor(self._words, mine)

    def read(self) -> tuple[list[float], Word]:
        """Return the sums of all losses and the common word, the same on each process; waits for the device."""
        rows = self._words.view(dist.get_world_size(), -1).tolist()
        columns = list(zip(*rows, strict=True))
        losses, words = columns[: self._num_losses], columns[self._num_losses :]
        requests, failures, sendings, steps, stalls, others, memories = words
        common = Word(
            request=Request(int(max(requests))),
            has_failed=any(failures),
            is_sending=any(sendings),
            step_s=max(steps),
            stall_s=max(stalls),
            other_s=max(others),
            memory_bytes=int(max(memories)),
        )
        return [sum(loss) for loss in losses], common
