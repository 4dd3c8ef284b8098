"""How often to take snapshots: as often as costs a fixed part of the time, and before too much work could be lost."""

import math
import statistics
from collections import deque
from typing import Literal

from ray_ds.logs import log_event

FIRST_STEPS = 3
"""Steps before the first snapshot, which measures what one costs; the first of them, which warms up, is not counted."""
QUIET_STEPS = 50
"""Steps without a transfer whose median is the time of a plain step."""
COSTS = 4
"""Snapshots whose dearest is what the next one is expected to cost."""
QUIET_SHARE = 2
"""A transfer of n steps is followed by at least (this - 1) n without one, so that plain steps can be measured."""


class SnapshotCadence:
    """Decides after each step whether a snapshot is due.

    The loop calls `record` after each step, then `is_due`, and takes the snapshot before the next step if it is. All
    processes decide alike if all are given the same figures: the loop gives each the largest of all processes.

    Args:
        setting: steps between snapshots, 0 for none; `auto` measures, and waits until the last one has arrived.
        max_overhead: part of the time that snapshots may cost with `auto`.
        max_lost_s: work in seconds that a killed node may cost with `auto`; where both cannot be had, this counts.
        is_speaking: whether this process logs, once, that snapshots cost more than `max_overhead`.
    """

    def __init__(
        self,
        setting: int | Literal["auto"],
        *,
        max_overhead: float = 0.02,
        max_lost_s: float = 30.0,
        is_speaking: bool = True,
    ) -> None:
        self._setting = setting
        self._max_overhead, self._max_lost_s, self._is_speaking = max_overhead, max_lost_s, is_speaking
        self._seen = 0
        self._quiet: deque[float] = deque(maxlen=QUIET_STEPS)
        self._costs: deque[float] = deque(maxlen=COSTS)
        self._transfers: deque[tuple[int, float]] = deque(maxlen=COSTS)
        self._current: _Snapshot | None = None
        self._steps_since = 0
        self._seconds_since = 0.0
        self._is_wanted = False

    def record(self, step_s: float, *, stall_s: float = 0.0, is_sending: bool = False, other_s: float = 0.0) -> None:
        """Take the figures of a step, the same on all processes.

        Args:
            step_s: time of the step alone.
            stall_s: time before it in which the loop packed a snapshot and handed it over; 0 where none was due.
            is_sending: whether a part was on its way at the end of the step.
            other_s: time before it that went into validation, checkpoints and the like: work that could be lost too.
        """
        self._seen += 1
        self._steps_since += 1
        self._seconds_since += step_s + stall_s + other_s
        if self._current is not None:
            self._current.add(step_s, stall_s, other_s)
            if not is_sending:
                self._end_snapshot(self._current)
        elif self._seen > 1:
            self._quiet.append(step_s)

    def is_due(self) -> bool:
        """Tell whether to take a snapshot now; if so, it counts as taken, and the next step shows what it costs."""
        if not self._is_due():
            return False
        if self._current is not None and self._current.steps:
            self._end_snapshot(self._current)
        self._current = _Snapshot()
        self._steps_since, self._seconds_since, self._is_wanted = 0, 0.0, False
        return True

    def take_now(self) -> None:
        """Have the next `is_due` say yes: the newest snapshot is of no use any more, such as after a roll-back."""
        self._is_wanted = True

    @property
    def overhead(self) -> float | None:
        """The part of the time that snapshots take at the present interval; None before one was measured."""
        if not self._costs or not self._quiet:
            return None
        return max(self._costs) / (self.interval_steps * self._step_s + max(self._costs))

    @property
    def interval_steps(self) -> int:
        """Steps from one snapshot to the next."""
        if isinstance(self._setting, int):
            return self._setting
        if not self._costs or not self._quiet:
            return FIRST_STEPS
        # cost / (steps * step_s + cost) <= max_overhead
        affordable = max(self._costs) * (1 / self._max_overhead - 1) / self._step_s
        transfer_steps = max(steps for steps, _ in self._transfers)
        return max(1, min(max(math.ceil(affordable), QUIET_SHARE * transfer_steps), self._bearable_steps))

    @property
    def _step_s(self) -> float:
        """Time of a plain step."""
        return max(statistics.median(self._quiet), 1e-9)

    @property
    def _transfer_s(self) -> float:
        """Time from taking a snapshot until it counts, in which a killed node still costs the one before."""
        return max((seconds for _, seconds in self._transfers), default=0.0)

    @property
    def _bearable_steps(self) -> int:
        """The most steps between snapshots with which a killed node costs no more than `max_lost_s`."""
        return math.floor((self._max_lost_s - self._transfer_s) / self._step_s)

    def _is_due(self) -> bool:
        if self._setting == 0 or self._is_wanted:
            return self._setting != 0
        if isinstance(self._setting, int):
            return self._steps_since >= self._setting
        if self._current is not None:  # training would stand still until it has arrived
            return False
        # The time counts beside the steps, for validation and slow steps come in between.
        next_s = self._step_s if self._quiet else 0.0
        is_late = self._seconds_since + next_s + self._transfer_s > self._max_lost_s
        return is_late or self._steps_since >= self.interval_steps

    def _end_snapshot(self, snapshot: "_Snapshot") -> None:
        """Note what a snapshot that has arrived cost; of its steps, what they took beyond plain ones."""
        self._current = None
        step_s = self._step_s if self._quiet else snapshot.steps_s / snapshot.steps
        self._costs.append(max(0.0, snapshot.stall_s + snapshot.steps_s - snapshot.steps * step_s))
        self._transfers.append((snapshot.steps, snapshot.seconds))
        overhead = self.overhead
        if self._is_speaking and self._setting == "auto" and overhead is not None and overhead > self._max_overhead:
            self._is_speaking = False
            log_event(
                "snapshots_dear",
                overhead=overhead,
                wanted=self._max_overhead,
                every_steps=self.interval_steps,
                reason=f"a killed node is to cost at most {self._max_lost_s:g} s",
            )


class _Snapshot:
    """What was seen of a snapshot since it was taken."""

    def __init__(self) -> None:
        self.steps = 0
        self.steps_s = 0.0
        self.stall_s = 0.0
        self.seconds = 0.0

    def add(self, step_s: float, stall_s: float, other_s: float) -> None:
        """Take a step during which it was on its way."""
        self.steps += 1
        self.steps_s += step_s
        self.stall_s += stall_s
        self.seconds += step_s + stall_s + other_s
