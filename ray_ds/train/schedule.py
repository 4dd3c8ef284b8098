"""How the learning rate changes over the steps."""

import math

from ray_ds.config.optimizer import Schedule


def lr_factor(step: int, num_steps: int, schedule: Schedule) -> float:
    """Return what the peak rates are multiplied by in a step.

    Args:
        step: from 0; the warm-up's last step is the first at the peak.
        num_steps: of the whole run; its last step has `final_lr_fraction`.
    Source: cosine decay as in SGDR, arXiv 1608.03983, without restarts.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    decay_steps = num_steps - schedule.warmup_steps
    progress = (step + 1 - schedule.warmup_steps) / decay_steps
    low = schedule.final_lr_fraction
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
