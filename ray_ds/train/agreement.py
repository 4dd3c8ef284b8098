"""What the processes tell each other once a step, so that all of them do the same next."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ray_ds.train.host import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """What all processes know after a step's last micro-batch, the same on each."""

    loss_sum: float
    """Over all micro-batches, in nats."""
    request: Request
    """The highest that any process was asked for."""
    has_failed: bool
    """Whether a process could not write its part of the last checkpoint."""
    seconds: float
    """The longest that a process spent on its last step."""
    stall_s: float
    """The longest that a process waited for its last snapshot."""
    memory_bytes: int
    """The most that a process holds."""


def agree(
    loss_sum: Tensor, *, request: Request, has_failed: bool, seconds: float, stall_s: float, memory_bytes: int
) -> Agreement:
    """Gather every process's word; all processes call this at the same place of a step.

    One collective of six numbers a process. The losses are added in fp64 in the order of the ranks, so the result does
    not depend on how a library reduces.

    Args:
        loss_sum: fp64 scalar on the device of the process group, summed over this process's micro-batches.
    """
    others = torch.tensor(
        [float(request), float(has_failed), seconds, stall_s, float(memory_bytes)], dtype=torch.double
    )
    mine = torch.cat([loss_sum.reshape(1), others.to(loss_sum.device, non_blocking=True)])  # (6,)
    words = torch.empty(dist.get_world_size(), len(mine), dtype=torch.double, device=loss_sum.device)
    dist.all_gather_into_tensor(words, mine)
    rows = words.tolist()  # waits for the device, once a step
    _, requests, failures, durations, stalls, memories = zip(*rows, strict=True)
    return Agreement(
        loss_sum=sum(row[0] for row in rows),
        request=Request(int(max(requests))),
        has_failed=any(failures),
        seconds=max(durations),
        stall_s=max(stalls),
        memory_bytes=int(max(memories)),
    )
