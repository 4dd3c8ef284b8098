"""DeepSpeed's look at the gradient before a step: in few kernels and, where nothing hangs on it, without waiting.

DeepSpeed 0.19.8 asks each parameter's gradient for its largest and smallest element, then for its norm: five kernels a
parameter, launched one by one while the GPU has nothing else to do. A gradient that is no number has a norm that is
none, which DeepSpeed looks at too (stage_1_and_2.py `step`), so the norm alone tells; and all norms of a group come in
one call. DeepSpeed then waits for the norm, twice, before it launches the update. On an H200 with 369 M parameters
in 219 tensors it launched 3,900 kernels behind the last pass, which kept the device busy for 16 of 104 ms under a
profiler. fp16 keeps DeepSpeed's way, for its loss scale hangs on it. Held by tests/train/zero/test_quick_update.py.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from ray_ds.train.zero.gradient_norm import sum_of_squares


def use_quick_update(optimizer: Any, *, waits: bool) -> bool:
    """Replace three methods on a ZeRO 1 or 2 optimizer that is not of fp16; tell whether it was one.

    Args:
        waits: look at the norm before the update, and leave the weights as they were where it is no number. Otherwise
            such a gradient spoils the weights, and who reads the norm must throw them away. Only bf16 can do without.
    """
    if type(optimizer) is not DeepSpeedZeroOptimizer or optimizer.dtype == torch.float16:
        return False

    def norm_of(gradients: Iterable[Tensor], params: Any, norm_type: int = 2) -> Tensor:
        """Return the norm of all processes' gradients of a group."""
        return group_norm(gradients, optimizer.dp_process_group, torch.device(optimizer.device))

    def leave_it_to_the_norm(partition_gradients: bool = True) -> None:
        """Scan nothing."""

    def clip(gradients: Sequence[Tensor], total_norm: Tensor) -> None:
        """Scale gradients down whose norm is above the clipping; DeepSpeed's arithmetic for a loss scale of 1."""
        if optimizer.clip_grad:
            excess = ((total_norm + 1e-6) / optimizer.clip_grad).clamp(min=1.0)
            for gradient in gradients:
                gradient.mul_(1.0 / excess)

    optimizer.get_grad_norm_direct = norm_of
    optimizer.check_overflow = leave_it_to_the_norm
    optimizer.unscale_and_clip_grads = clip
    optimizer.check_grad_overflow = waits
    return True


def group_norm(gradients: Iterable[Tensor], group: Any, device: torch.device) -> Tensor:
    """Return the L2 norm, fp32, of the gradients that the processes of a group hold together.

    What DeepSpeed marks as padding is left out.
    """
    own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    squares = sum_of_squares(own, device)
    torch.distributed.all_reduce(squares, group=group)
    return squares.sqrt().float()
