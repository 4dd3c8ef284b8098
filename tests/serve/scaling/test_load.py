from dataclasses import replace

import pytest

from ray_ds.serve.requests import EngineStats
from ray_ds.serve.scaling.load import METRICS, LoadWindow, ReplicaLoad, read_load, report_load, window_of

STATS = EngineStats(
    num_running=3,
    num_waiting=1,
    num_waiting_tokens=400,
    num_cached_tokens=600,
    num_cache_tokens=2000,
    prefill_tokens_per_s=200.0,
    decode_tokens_per_s=50.0,
    num_steps=7,
    num_tokens=100,
    num_prompt_tokens=1000,
    num_prefix_hits=200,
    num_preemptions=0,
)


def load(**changes: float) -> ReplicaLoad:
    known = read_load(report_load(STATS))
    assert known is not None
    return replace(known, **changes)


def window(first: ReplicaLoad, last: ReplicaLoad, seconds: float) -> LoadWindow:
    return LoadWindow(first=first, last=last, start_s=0.0, end_s=seconds)


def test_what_is_reported_is_what_serve_takes_and_what_is_read() -> None:
    reported = report_load(STATS)
    assert set(reported) == set(METRICS)
    assert {type(value) for value in reported.values()} == {float}
    assert load() == ReplicaLoad(
        num_running=3,
        num_waiting=1,
        num_waiting_tokens=400,
        num_cached_tokens=600,
        num_cache_tokens=2000,
        prefill_tokens_per_s=200,
        decode_tokens_per_s=50,
        num_tokens=100,
        num_prompt_tokens=1000,
        num_prefix_hits=200,
    )


@pytest.mark.parametrize("missing", METRICS)
def test_a_replica_that_lacks_a_metric_reports_no_load(missing: str) -> None:
    reported = report_load(STATS)
    del reported[missing]
    assert read_load(reported) is None
    assert window_of({name: [(1.0, value)] for name, value in reported.items()}) is None


def test_a_window_reaches_from_the_first_to_the_last_report() -> None:
    reported = report_load(STATS)
    series = {name: [(10.0, value), (14.0, value + 1)] for name, value in reported.items()}
    seen = window_of(series)
    assert seen is not None
    assert (seen.start_s, seen.end_s) == (10.0, 14.0)
    assert (seen.first.num_running, seen.last.num_running, seen.num_requests) == (3, 4, 6)


def test_cache_use_counts_what_waiting_prompts_will_want() -> None:
    assert window(load(), load(), 0.0).cache_use == (600 + 400) / 2000
    assert window(load(), load(num_cache_tokens=0.0), 0.0).cache_use == 0.0, "a model without a cache of tokens"


def test_prefill_use_is_the_computed_tokens_a_second_over_those_it_can_compute() -> None:
    later = load(num_prompt_tokens=1600.0, num_prefix_hits=300.0)
    assert window(load(), later, 5.0).prefill_use == pytest.approx((600 - 100) / 5 / 200)
    assert window(load(), later, 0.0).prefill_use == 0.0, "one report only"
    assert window(load(), replace(later, prefill_tokens_per_s=0.0), 5.0).prefill_use == 0.0, "nothing measured yet"
    assert window(load(), load(num_prompt_tokens=1e9), 5.0).prefill_use == 1.0


def test_the_first_token_waits_for_prompts_and_where_places_are_taken_for_answers() -> None:
    prompts_s = 400 / 200
    answers_s = 400 * (100 / 1000) / 50
    assert window(load(), load(), 1.0).predicted_ttft_s == pytest.approx(prompts_s + answers_s)
    assert window(load(), load(num_waiting=0.0), 1.0).predicted_ttft_s == pytest.approx(prompts_s)
    assert window(load(), load(decode_tokens_per_s=0.0), 1.0).predicted_ttft_s == pytest.approx(prompts_s)
    assert window(load(), load(prefill_tokens_per_s=0.0), 1.0).predicted_ttft_s == 0.0, "nothing measured yet"
