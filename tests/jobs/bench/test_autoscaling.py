"""Ray Serve's real decisions on simulated replicas: what our policy makes of loads, beside what Serve's own does."""

import os

os.environ["RAY_AUTH_MODE"] = "disabled"

import functools
from dataclasses import replace

import pytest

from jobs.bench.autoscaling.cases import CAPACITY, CASES, SPEED, Outcome, direction_changes, simulate
from jobs.bench.autoscaling.engine import Request, SimulatedEngine
from jobs.bench.autoscaling.simulated_serve import Scaling, ServeTimes
from jobs.bench.autoscaling.traffic import arrivals, square_wave, step_load

BY_NAME = {case.name: case for case in CASES}
TIMES = ServeTimes()
SEEDS = range(2)


@functools.cache
def outcomes(name: str, policy: str = "tokens") -> list[Outcome]:
    return [simulate(BY_NAME[name], policy, TIMES, seed=seed) for seed in SEEDS]


@pytest.mark.shows("Autoscaling changes its direction at most once a load step, in the simulator and on real decisions")
@pytest.mark.parametrize("name", ["step", "large_step", "ramp", "square_wave", "slow_square_wave"])
def test_the_number_turns_at_most_once_a_load_step(name: str) -> None:
    for outcome in outcomes(name):
        assert outcome.direction_changes <= outcome.load_steps


@pytest.mark.shows("In 95 of 100 requests of a square wave the first token comes in time")
@pytest.mark.parametrize("name", ["square_wave", "slow_square_wave"])
def test_the_first_token_comes_in_time_over_a_square_wave(name: str) -> None:
    ours, stock = outcomes(name), outcomes(name, "serve_defaults")
    for one, other in zip(ours, stock, strict=True):
        assert one.ttft_met >= 0.95
        assert one.replica_seconds < other.replica_seconds, "Serve's defaults keep replicas for ten minutes"
        if name == "square_wave":
            assert one.ttft_met > other.ttft_met


def test_too_much_load_is_answered_within_seconds() -> None:
    for ours, stock in zip(outcomes("large_step"), outcomes("large_step", "serve_defaults"), strict=True):
        assert ours.ttft_met > stock.ttft_met
    case = replace(BY_NAME["large_step"], rate=step_load(0.0, 4 * CAPACITY, 60))
    for seed in SEEDS:
        outcome = simulate(case, "tokens", TIMES, seed=seed)
        assert outcome.reacted_s is not None and outcome.reacted_s <= 4.0


@pytest.mark.shows("Replicas whose streams have ended go, though Serve still counts the streams as open (ray#61551)")
def test_replicas_go_when_streams_have_drained() -> None:
    for ours in outcomes("streams_drain"):
        assert ours.back_to_minimum_s is not None and ours.back_to_minimum_s <= 70
        assert ours.cut_off == 0
    for stock in outcomes("streams_drain", "ongoing_requests"):
        assert stock.back_to_minimum_s is None, "Serve's own policy believes its count, so this shows nothing"


@pytest.mark.shows("A steady load does not drive the number of replicas up and down (ray#63279)")
def test_a_steady_load_moves_no_replicas() -> None:
    for ours, stock in zip(outcomes("oscillation"), outcomes("oscillation", "ongoing_requests"), strict=True):
        assert ours.direction_changes <= 1
        assert stock.direction_changes > 10, "Serve's own policy holds still, so this shows nothing"
        assert ours.replica_seconds < stock.replica_seconds / 2


@pytest.mark.shows("Without requests there are no replicas; the first request brings one within seconds")
def test_the_number_goes_to_zero_and_back() -> None:
    for outcome in outcomes("zero"):
        assert outcome.reacted_s is not None
        assert outcome.ttft_max_s <= 5.0, "from the first request to its first token, with the start of a replica"
        assert outcome.back_to_minimum_s is not None and outcome.back_to_minimum_s <= 70


@pytest.mark.parametrize("silent_s", [5.0, 30.0])
def test_new_replicas_that_report_late_disturb_nothing(silent_s: float) -> None:
    late = replace(TIMES, silent_s=silent_s)
    for seed in SEEDS:
        usual = simulate(BY_NAME["large_step"], "tokens", TIMES, seed=seed)
        outcome = simulate(BY_NAME["large_step"], "tokens", late, seed=seed)
        assert outcome.direction_changes <= 1
        assert outcome.most_replicas <= usual.most_replicas
        assert outcome.ttft_met >= 0.95


@pytest.mark.parametrize("startup_s", [2.0, 10.0, 30.0])
def test_slow_starts_do_not_make_it_swing(startup_s: float) -> None:
    for seed in SEEDS:
        outcome = simulate(BY_NAME["step"], "tokens", replace(TIMES, startup_s=startup_s), seed=seed)
        assert outcome.direction_changes <= 1


def test_the_same_seed_gives_the_same_run() -> None:
    case = replace(BY_NAME["step"], end_s=100.0)
    assert simulate(case, "tokens", TIMES, seed=4) == simulate(case, "tokens", TIMES, seed=4)


def test_traffic_has_the_rate_that_was_asked_for() -> None:
    requests = list(arrivals(square_wave(2.0, 8.0, 100), 1000, prompt_tokens=100, answer_tokens=10, seed=1))
    high = [request for request in requests if request.arrival_s % 100 >= 50]
    assert len(requests) == pytest.approx(5000, rel=0.05)
    assert len(high) == pytest.approx(4000, rel=0.05)
    assert sum(request.prompt_tokens for request in requests) / len(requests) == pytest.approx(100, rel=0.02)


def test_a_full_engine_answers_as_many_requests_as_its_capacity_says() -> None:
    engine = SimulatedEngine(SPEED)
    requests = [Request(arrival_s=0.0, prompt_tokens=200, answer_tokens=60) for _ in range(200)]
    for request in requests:
        engine.submit(request)
    for tick in range(6000):
        engine.step(tick / 100, 0.01)
    assert sum(request.finished_s is not None for request in requests) / 60 == pytest.approx(CAPACITY, rel=0.15)
    assert engine.stats.num_running == 8 and engine.stats.num_waiting == engine.num_requests - 8


def test_turns_are_counted() -> None:
    def turns(*targets: int) -> int:
        return direction_changes([Scaling(float(i), target) for i, target in enumerate(targets)])

    assert turns(1) == turns(1, 2, 5) == 0
    assert turns(1, 3, 2, 1) == 1
    assert turns(1, 3, 2, 3) == 2
