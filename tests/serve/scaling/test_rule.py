from dataclasses import replace

import pytest

from ray_ds.serve.scaling.load import LoadWindow, ReplicaLoad
from ray_ds.serve.scaling.rule import ScalingTargets, TokenLoadRule, measure_need

IDLE = ReplicaLoad(
    num_running=0,
    num_waiting=0,
    num_waiting_tokens=0,
    num_cached_tokens=0,
    num_cache_tokens=1000,
    prefill_tokens_per_s=100,
    decode_tokens_per_s=10,
    num_tokens=100,
    num_prompt_tokens=100,
    num_prefix_hits=0,
)
TARGETS = ScalingTargets(
    max_running_requests=10,
    target_utilization=0.5,
    target_ttft_s=2.0,
    hysteresis=0.2,
    upscale_delay_s=1.0,
    downscale_delay_s=60.0,
    downscale_to_zero_delay_s=300.0,
)
STEP_S = 0.1


def window(**changes: float) -> LoadWindow:
    return LoadWindow(first=IDLE, last=replace(IDLE, **changes), start_s=0.0, end_s=5.0)


def running(*counts: int) -> list[LoadWindow]:
    return [window(num_running=count) for count in counts]


class Timeline:
    """Asks a rule ten times a second, as Serve does, and puts its answers in force at once."""

    def __init__(self, target: int, targets: ScalingTargets = TARGETS) -> None:
        self.rule = TokenLoadRule(targets)
        self.target = target
        self.now_s = 1000.0

    def hold(self, seconds: float, windows: list[LoadWindow], *, replicas: int | None = None, queued: float = 0) -> int:
        """Return the target after so many seconds of this load."""
        for _ in range(round(seconds / STEP_S)):
            self.now_s += STEP_S
            count = len(windows) if replicas is None else replicas
            self.target = self.rule.decide(self.now_s, self.target, count, windows, queued)
        return self.target


def test_needs_are_sums_over_replicas_against_the_targets() -> None:
    windows = [window(num_running=6, num_waiting=4), window(num_cached_tokens=800, num_waiting_tokens=300)]
    need = measure_need(windows, 5, TARGETS)
    assert need.places == pytest.approx(15 / 10 / 0.5)
    assert need.cache == pytest.approx(1.1 / 0.5)
    assert need.first_token == pytest.approx(3.0 / 2.0)
    assert measure_need([window(num_prompt_tokens=350)], 0, TARGETS).prefill == pytest.approx(250 / 5 / 100 / 0.5)
    assert need.most == need.places


def test_more_are_wanted_after_a_second_of_too_much_and_as_many_as_are_needed() -> None:
    timeline = Timeline(1)
    timeline.hold(5.0, running(5))
    assert timeline.hold(0.9, running(14)) == 1
    assert timeline.hold(0.2, running(14)) == 3


def test_a_peak_shorter_than_the_delay_adds_nothing() -> None:
    timeline = Timeline(1)
    for _ in range(20):
        timeline.hold(0.8, running(40))
        assert timeline.hold(0.2, running(5)) == 1


def test_replicas_that_are_starting_are_not_asked_for_twice() -> None:
    timeline = Timeline(1)
    timeline.hold(5.0, running(5))
    assert timeline.hold(30.0, running(14)) == 3


def test_fewer_are_wanted_only_after_a_minute_in_which_fewer_would_have_done() -> None:
    timeline = Timeline(3)
    timeline.hold(30.0, running(4, 4, 4))
    assert timeline.hold(59.8, running(1, 1, 0)) == 3
    assert timeline.hold(0.4, running(1, 1, 0)) == 1


def test_as_many_stay_as_the_busiest_moment_of_the_minute_needed() -> None:
    timeline = Timeline(4)
    for _ in range(8):
        timeline.hold(9.0, running(1, 1, 0, 0))
        timeline.hold(1.0, running(2, 2, 2, 1))
    assert timeline.target == 2, "7 requests need 1.4 replicas, 1.75 with some to spare"


def test_between_the_bounds_nothing_changes() -> None:
    timeline = Timeline(2)
    assert timeline.hold(200.0, running(5, 4)) == 2, "9 requests: 1.8 are needed, 2.25 with some to spare"
    assert timeline.hold(200.0, running(3, 2)) == 2, "5 requests fit into one, but not with some to spare"
    assert timeline.hold(200.0, running(2, 2)) == 1


def test_survivors_must_hold_the_cache_too() -> None:
    timeline = Timeline(2)
    assert timeline.hold(200.0, [window(num_running=1, num_cached_tokens=300), window(num_cached_tokens=200)]) == 2


def test_a_replica_without_reports_counts_as_idle_and_keeps_all_there_are() -> None:
    timeline = Timeline(3)
    assert timeline.hold(200.0, running(1, 1), replicas=3) == 3, "the third may be busy"
    assert timeline.hold(2.0, running(20), replicas=3) == 4, "what is known needs four"


def test_without_any_report_the_number_stays() -> None:
    timeline = Timeline(2)
    assert timeline.hold(200.0, [], replicas=2) == 2
    assert timeline.hold(200.0, [], replicas=0) == 2, "they are starting"


def test_requests_that_no_replica_took_count() -> None:
    timeline = Timeline(1)
    assert timeline.hold(5.0, running(5), queued=9) == 3


def test_the_last_replica_goes_after_a_longer_pause_and_only_without_a_request() -> None:
    timeline = Timeline(2)
    assert timeline.hold(61.0, running(0, 0)) == 1
    assert timeline.hold(238.0, running(0)) == 1
    assert timeline.hold(2.0, running(0)) == 0
    busy = Timeline(1)
    assert busy.hold(400.0, running(1)) == 1


def test_a_controller_that_came_back_takes_nothing_away_before_it_knows_a_minute() -> None:
    timeline = Timeline(5)
    assert timeline.hold(59.0, running(0, 0, 0, 0, 0)) == 5
    assert timeline.hold(2.0, running(0, 0, 0, 0, 0)) == 1


def test_delays_of_nothing_act_at_once() -> None:
    quick = replace(TARGETS, upscale_delay_s=0.0, downscale_delay_s=0.0, downscale_to_zero_delay_s=0.0)
    timeline = Timeline(1, quick)
    assert timeline.hold(0.2, running(14)) == 3
    assert timeline.hold(0.2, running(0, 0, 0)) == 0
