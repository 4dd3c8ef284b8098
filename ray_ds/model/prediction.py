"""What multi-token prediction trains on: at each place, the tokens behind the next one."""

import torch
from torch import Tensor

from ray_ds.model.loss import IGNORED_TARGET


def look_ahead(tokens: Tensor, targets: Tensor, segments: Tensor | None, depth: int) -> tuple[Tensor, Tensor]:
    """Return the tokens that stand `depth` places on, and the targets there, (B, T) each.

    Rows keep their length: the last `depth` places have no target, nor have those whose token ahead belongs to another
    document. Being last in their row or document, they are seen by none that has one.

    Args:
        tokens, targets: (B, T), of the model itself; a target that it ignores is ignored here too.
        segments: (B, T), numbers of documents; None = every row is one.
    """
    ahead, goals = tokens.roll(-depth, dims=1), targets.roll(-depth, dims=1)
    length = tokens.shape[1]
    has_goal = (torch.arange(length, device=tokens.device) < length - depth).expand_as(goals)
    if segments is not None:
        has_goal = has_goal & (segments.roll(-depth, dims=1) == segments)
    return ahead, torch.where(has_goal, goals, IGNORED_TARGET)
