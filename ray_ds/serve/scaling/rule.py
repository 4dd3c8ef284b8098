"""From the loads of all replicas to how many there should be.

Needs are counted in replicas: 2.4 means that two are too few. The number goes up when the least that was needed over
`upscale_delay_s` is more than there are, and down to the most that was needed, with some to spare, over
`downscale_delay_s`: so a short peak adds nothing, and nothing is taken away that was needed a moment ago. Kubernetes'
autoscaler calls this stabilization windows. Needs are absolute, never a factor of the present number, so replicas that
are still starting are not asked for twice.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ray_ds.serve.scaling.load import LoadWindow

ROUNDING = 1e-6
"""A need of 2 and this much is a need of 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingTargets:
    """What a replica should be loaded with, and how long a change must be wanted."""

    max_running_requests: int
    target_utilization: float
    target_ttft_s: float
    hysteresis: float
    upscale_delay_s: float
    downscale_delay_s: float
    downscale_to_zero_delay_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """How many replicas each part of the load needs."""

    places: float
    """For the requests that run, wait at a replica or wait before all replicas."""
    cache: float
    prefill: float
    first_token: float
    """For the predicted time to first token."""

    @property
    def most(self) -> float:
        """What all parts together need."""
        return max(self.places, self.cache, self.prefill, self.first_token)


def measure_need(windows: Sequence[LoadWindow], num_queued: float, targets: ScalingTargets) -> Need:
    """Return what the load of some replicas needs.

    Args:
        num_queued: requests that no replica has taken.
    """
    num_requests = num_queued + sum(window.num_requests for window in windows)
    return Need(
        places=num_requests / targets.max_running_requests / targets.target_utilization,
        cache=sum(window.cache_use for window in windows) / targets.target_utilization,
        prefill=sum(window.prefill_use for window in windows) / targets.target_utilization,
        first_token=sum(window.predicted_ttft_s for window in windows) / targets.target_ttft_s,
    )


@dataclass(frozen=True, slots=True)
class _Wanted:
    until_s: float
    """The last time at which this was wanted; it was from the end of the one before on."""
    up: int
    """Replicas that the load needs: with fewer, some must be added."""
    down: int
    """Replicas that hold the load with some to spare: with more, some may go."""


class TokenLoadRule:
    """Decides again and again; remembers what was needed as long as its windows are."""

    def __init__(self, targets: ScalingTargets) -> None:
        self._targets = targets
        self._longest_s = max(targets.upscale_delay_s, targets.downscale_delay_s, targets.downscale_to_zero_delay_s)
        self._wanted: deque[_Wanted] = deque()

    def decide(
        self, now_s: float, target: int, num_replicas: int, windows: Sequence[LoadWindow], num_queued: float
    ) -> int:
        """Return how many replicas there should be.

        Args:
            target: how many there should be so far, those that are starting among them.
            num_replicas: how many run.
            windows: of those of them that report; others count as idle, and while there are any, none is taken away.
            num_queued: requests that no replica has taken.
        """
        if not self._wanted:  # Nothing is known of before: what there is was needed, and no more.
            self._wanted.append(_Wanted(now_s, 0, target))
        need = measure_need(windows, num_queued, self._targets).most
        up = math.ceil(need - ROUNDING)
        down = math.ceil(need / (1 - self._targets.hysteresis) - ROUNDING)
        is_all_known = 0 < len(windows) == num_replicas
        self._remember(_Wanted(now_s, up, down if is_all_known else max(down, target)))
        least_up = min(wanted.up for wanted in self._within(now_s, self._targets.upscale_delay_s))
        return least_up if least_up > target else min(target, self._most_down(now_s))

    def _remember(self, wanted: _Wanted) -> None:
        """Add what is wanted now, or make what was wanted before last until now; forget what no window reaches."""
        before = self._wanted[-1]
        if (before.up, before.down) == (wanted.up, wanted.down):
            self._wanted.pop()
        self._wanted.append(wanted)
        while self._wanted[0].until_s < wanted.until_s - self._longest_s:
            self._wanted.popleft()

    def _most_down(self, now_s: float) -> int:
        """Return the most that was needed, with some to spare, over the windows of scaling down."""
        most = max(wanted.down for wanted in self._within(now_s, self._targets.downscale_delay_s))
        if most:
            return most
        return min(1, max(wanted.down for wanted in self._within(now_s, self._targets.downscale_to_zero_delay_s)))

    def _within(self, now_s: float, seconds: float) -> Iterator[_Wanted]:
        """Yield what was wanted over the last seconds, the latest first."""
        for wanted in reversed(self._wanted):
            if wanted.until_s < now_s - seconds:
                return
            yield wanted
