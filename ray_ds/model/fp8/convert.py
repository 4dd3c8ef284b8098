"""Which layers of a model multiply in FP8."""

import torch
from torch import nn

from ray_ds.model.experts import Experts
from ray_ds.model.fp8.experts import MIN_WIDTH, Fp8Experts
from ray_ds.model.fp8.linear import Fp8Linear
from ray_ds.model.fp8.numbers import ALIGNMENT

GROUPED_CAPABILITY = (9, 0)
"""Compute capability of Hopper, the only one that torch has a grouped FP8 product with plain scales for."""


def to_fp8(module: nn.Module, device: torch.device) -> int:
    """Replace each layer below `module` whose products can be in FP8 and gain by it; return how many.

    These are linear layers, and routed experts that are wide enough. Parameters stay the same objects under the same
    names.

    Args:
        device: where the module will compute.
    """
    has_grouped = device.type == "cpu" or torch.cuda.get_device_capability(device) == GROUPED_CAPABILITY
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and _is_aligned(child.in_features, child.out_features):
                setattr(parent, name, Fp8Linear.of(child))
            elif type(child) is Experts and has_grouped and _gains(child):
                setattr(parent, name, Fp8Experts.of(child))
            else:
                continue
            count += 1
    return count


def _is_aligned(*widths: int) -> bool:
    """Tell whether the kernels take these widths."""
    return not any(width % ALIGNMENT for width in widths)


def _gains(experts: Experts) -> bool:
    """Tell whether both of an expert's products can be in FP8 and are the faster for it."""
    _, width, inner = experts.down_proj.shape
    return _is_aligned(width, inner) and width * inner / (width + inner) >= MIN_WIDTH
