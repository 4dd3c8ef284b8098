"""What the processes tell each other once a step, so that all of them do the same next."""

from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ray_ds.train.arrival import Arrival
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

    One collective of a few numbers a process. The sums are added in fp64 in the order of the ranks, so the result
    does not depend on how a library reduces.

    Args:
        sums: fp64, (S,), on the device of the process group: loss and figures over this process's micro-batches.
    """

    def __init__(self, sums: Tensor, word: Word) -> None:
        fields = torch.tensor([float(value) for value in astuple(word)], dtype=torch.double)
        mine = torch.cat([sums, fields.to(sums.device, non_blocking=True)])  # (S + 7,)
        self._num_sums = len(sums)
        words = torch.empty(dist.get_world_size() * len(mine), dtype=torch.double, device=sums.device)
        dist.all_gather_into_tensor(words, mine)
        self._words = Arrival(words)

    def read(self) -> tuple[list[float], Word]:
        """Return all processes' sums and the common word, the same on each process; waits until they are here."""
        rows = self._words.read().view(dist.get_world_size(), -1).tolist()
        sums = [sum(values) for values in zip(*(row[: self._num_sums] for row in rows), strict=True)]
        words = (row[self._num_sums :] for row in rows)
        requests, failures, sendings, steps, stalls, others, memories = zip(*words, strict=True)
        common = Word(
            request=Request(int(max(requests))),
            has_failed=any(failures),
            is_sending=any(sendings),
            step_s=max(steps),
            stall_s=max(stalls),
            other_s=max(others),
            memory_bytes=int(max(memories)),
        )
        return sums, common
