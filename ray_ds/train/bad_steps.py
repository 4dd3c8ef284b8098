"""Telling a bad step from a good one: a loss that is no number, or one that jumps."""

import math
import statistics
from collections import deque
from collections.abc import Sequence

from ray_ds.config.train import TrainSettings
from ray_ds.train.metrics import Record

WINDOW = 32
"""Good losses whose median a new one is compared with; a spike is looked for once there are as many."""


class BadSteps:
    """Judges the loss of each step and counts the bad ones; equal losses give equal judgements on every process."""

    def __init__(self, settings: TrainSettings, records: Sequence[Record], *, count: int = 0) -> None:
        """Start behind the steps that count so far, of which `count` more were bad."""
        self._settings = settings
        self.count = count
        self.start_behind(records)

    def start_behind(self, records: Sequence[Record]) -> None:
        """Take the losses of these steps as those before the next one."""
        losses = [record["loss"] for record in records if not record.get("is_skipped")]
        self._recent = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)

    def judge(self, loss: float) -> str | None:
        """Return what is wrong with a loss, or None; only a good one counts towards the median.

        It is the loss before it is scaled: where fp16 looks for its scale, gradients overflow and this stays a number.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        spike = self._settings.loss_spike
        if spike is not None and len(self._recent) == WINDOW:
            median = statistics.median(self._recent)
            if loss > spike * median:
                return f"the loss is {loss:.5g}, over {spike:g} times the median of the last {WINDOW}, {median:.5g}"
        self._recent.append(loss)
        return None

    def add(self, step: int, reason: str) -> None:
        """Count a bad step.

        Raises:
            FloatingPointError: bad steps end the job, or there were too many.
        """
        self.count += 1
        settings = self._settings
        if settings.bad_loss == "fail":
            action = "lower the learning rate, or set bad_loss to skip or roll_back"
            raise FloatingPointError(f"step {step} is bad: {reason}; {action}")
        assert settings.max_bad_steps is not None, "settings fill it in"
        if self.count > settings.max_bad_steps:
            action = "lower the learning rate, or look at the data of these steps"
            raise FloatingPointError(f"step {step} is bad, the {self.count}th that is: {reason}; {action}")
