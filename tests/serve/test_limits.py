import random

import pytest

from ray_ds.config.keys import ApiKey
from ray_ds.serve.limits import Ledger, TokenBucket

HASH = "0" * 64


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_bucket_fills_up_evenly_and_no_higher() -> None:
    bucket = TokenBucket(60, 0.0)
    bucket.take(60, 0.0)
    assert bucket.wait_s(1, 0.0) == 1 and bucket.wait_s(60, 0.0) == 60
    assert bucket.wait_s(10, 4.0) == 6
    assert bucket.budget(30.0).remaining == 30 and bucket.budget(30.0).reset_s == 30
    assert bucket.budget(1000.0).remaining == 60 and bucket.budget(1000.0).reset_s == 0
    bucket.take(-5, 1000.0)
    assert bucket.budget(1000.0).remaining == 60


def test_requests_beyond_a_minutes_wait_for_the_next_place(clock: Clock) -> None:
    ledger, key = Ledger(clock), ApiKey(sha256=HASH, requests_per_minute=3)
    verdicts = [ledger.admit("a", key, 10, 600.0) for _ in range(4)]
    assert [verdict.lease is not None for verdict in verdicts] == [True, True, True, False]
    assert verdicts[3].refused_by == "requests_per_minute" and verdicts[3].retry_after_s == 20
    assert [verdict.requests.remaining for verdict in verdicts] == [2, 1, 0, 0]
    assert verdicts[0].tokens is None
    assert ledger.admit("b", key, 10, 600.0).lease is not None, "keys do not share limits"
    clock.now += 19.9
    assert ledger.admit("a", key, 10, 600.0).lease is None
    clock.now += 0.2
    assert ledger.admit("a", key, 10, 600.0).lease is not None


def test_tokens_that_were_not_written_are_given_back(clock: Clock) -> None:
    ledger, key = Ledger(clock), ApiKey(sha256=HASH, tokens_per_minute=100)
    lease = ledger.admit("a", key, 90, 600.0).lease
    refused = ledger.admit("a", key, 30, 600.0)
    assert refused.refused_by == "tokens_per_minute" and refused.retry_after_s == pytest.approx(12)
    assert lease is not None
    ledger.settle("a", lease, 70)
    assert ledger.admit("a", key, 80, 600.0).tokens.remaining == 0
    ledger.settle("a", lease, 70)
    ledger.settle("never seen", 1, 70)
    assert ledger.admit("a", key, 1, 600.0).lease is None, "given back twice"


def test_a_refused_request_is_charged_nothing(clock: Clock) -> None:
    ledger, key = Ledger(clock), ApiKey(sha256=HASH, requests_per_minute=2, tokens_per_minute=100)
    assert ledger.admit("a", key, 60, 600.0).lease is not None
    assert ledger.admit("a", key, 60, 600.0).refused_by == "tokens_per_minute"
    assert ledger.admit("a", key, 40, 600.0).lease is not None


def test_parallel_requests_are_counted_until_they_end_or_their_replica_is_surely_gone(clock: Clock) -> None:
    ledger, key = Ledger(clock), ApiKey(sha256=HASH, max_parallel_requests=2)
    first, _ = (ledger.admit("a", key, 1, 600.0).lease for _ in range(2))
    assert ledger.admit("a", key, 1, 600.0).refused_by == "max_parallel_requests"
    assert first is not None
    ledger.settle("a", first, 0)
    assert ledger.admit("a", key, 1, 600.0).lease is not None
    clock.now += 601
    assert [ledger.admit("a", key, 1, 600.0).lease is not None for _ in range(3)] == [True, True, False]


def test_a_changed_limit_holds_from_the_next_request(clock: Clock) -> None:
    ledger = Ledger(clock)
    for limit in (2, 5, 1):
        key = ApiKey(sha256=HASH, requests_per_minute=limit)
        verdicts = [ledger.admit("a", key, 1, 600.0) for _ in range(limit + 1)]
        assert [verdict.lease is not None for verdict in verdicts] == [True] * limit + [False]
    assert ledger.admit("a", ApiKey(sha256=HASH), 1, 600.0).lease is not None


@pytest.mark.shows("A key's limits hold over any stretch of time, for any pattern of requests")
def test_no_stretch_of_time_sees_more_than_the_limit_allows(clock: Clock) -> None:
    generator = random.Random(0)
    ledger, key = Ledger(clock), ApiKey(sha256=HASH, requests_per_minute=20, tokens_per_minute=1000)
    passed: list[tuple[float, int]] = []
    for _ in range(2000):
        clock.now += generator.expovariate(1.0)
        tokens = generator.randint(1, 200)
        if ledger.admit("a", key, tokens, 600.0).lease is not None:
            passed.append((clock.now, tokens))
    for first in range(0, len(passed), 7):
        num_tokens = 0
        for last in range(first, min(first + 100, len(passed))):
            share = 1 + (passed[last][0] - passed[first][0]) / 60
            num_tokens += passed[last][1]
            assert last - first + 1 <= 20 * share + 1e-6 and num_tokens <= 1000 * share + 1e-6
    seconds = passed[-1][0] - passed[0][0]
    assert sum(tokens for _, tokens in passed) > 0.95 * 1000 * seconds / 60, "refused what it should have let pass"
