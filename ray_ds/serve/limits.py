"""What each API key may still ask for: token buckets of requests and of tokens, and leases of requests in progress.

A bucket holds as much as a minute allows and fills up evenly, so that in any t seconds no more passes than
limit * (1 + t / 60).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ray_ds.config.keys import ApiKey

LimitKind = Literal["requests_per_minute", "tokens_per_minute", "max_parallel_requests"]

PARALLEL_RETRY_AFTER_S = 1.0
"""When to try again where other requests must end first: nobody knows when they do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What is left in a bucket."""

    limit: int
    remaining: int
    reset_s: float
    """Seconds until it is full again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a request may start."""

    lease: int | None
    """What `settle` wants; None = refused."""
    refused_by: LimitKind | None = None
    retry_after_s: float = 0.0
    """Seconds after which the same request would pass, if no other comes; set where it is refused."""
    requests: Budget | None = None
    tokens: Budget | None = None


class LedgerUnavailableError(Exception):
    """Nobody can say what a key may still ask for."""


class LedgerClient(Protocol):
    """How a replica asks a ledger that it may share with others."""

    async def admit(self, name: str, key: ApiKey, num_tokens: int, lease_s: float) -> Verdict:
        """Do what `Ledger.admit` does.

        Raises:
            LedgerUnavailableError: the ledger does not answer.
        """

    def settle(self, name: str, lease: int, unused_tokens: int) -> None:
        """Do what `Ledger.settle` does, without waiting for it."""


class TokenBucket:
    """Holds what a minute allows, and fills up evenly."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._time = now

    def take(self, amount: float, now: float) -> None:
        """Take out; a negative amount gives back."""
        self._fill(now)
        self._level = min(self._level - amount, float(self.per_minute))

    def wait_s(self, amount: float, now: float) -> float:
        """Return the seconds until `amount`, at most `per_minute`, is there."""
        self._fill(now)
        return max(0.0, amount - self._level) * 60 / self.per_minute

    def budget(self, now: float) -> Budget:
        """Return what is left."""
        self._fill(now)
        missing = self.per_minute - self._level
        return Budget(limit=self.per_minute, remaining=max(0, int(self._level)), reset_s=missing * 60 / self.per_minute)

    def _fill(self, now: float) -> None:
        self._level = min(self._level + (now - self._time) * self.per_minute / 60, float(self.per_minute))
        self._time = now


@dataclass(kw_only=True, slots=True)
class _Account:
    """What is known of one key."""

    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    leases: dict[int, float] = field(default_factory=dict)
    """When each request in progress is taken for dead: a replica that was killed gives nothing back."""


class Ledger:
    """Counts for all keys. One process owns it; it starts with full buckets."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._num_leases = 0

    def admit(self, name: str, key: ApiKey, num_tokens: int, lease_s: float) -> Verdict:
        """Charge a request to the key called `name`, or refuse it and charge nothing.

        Args:
            num_tokens: most that it may come to, prompts and answers; no more than `key.tokens_per_minute`.
            lease_s: seconds after which it has ended, settled or not.
        """
        now = self._clock()
        account = self._account(name, key, now)
        refused_by, wait_s = _refusal(account, key, num_tokens, now)
        lease = None
        if refused_by is None:
            self._num_leases += 1
            lease = self._num_leases
            account.leases[lease] = now + lease_s
            if account.requests is not None:
                account.requests.take(1, now)
            if account.tokens is not None:
                account.tokens.take(num_tokens, now)
        return Verdict(
            lease=lease,
            refused_by=refused_by,
            retry_after_s=wait_s,
            requests=None if account.requests is None else account.requests.budget(now),
            tokens=None if account.tokens is None else account.tokens.budget(now),
        )

    def settle(self, name: str, lease: int, unused_tokens: int) -> None:
        """End a request and give back the tokens it did not come to. A second time changes nothing."""
        account = self._accounts.get(name)
        if account is None or account.leases.pop(lease, None) is None:
            return
        if account.tokens is not None:
            account.tokens.take(-unused_tokens, self._clock())

    def _account(self, name: str, key: ApiKey, now: float) -> _Account:
        account = self._accounts.setdefault(name, _Account())
        account.requests = _bucket(account.requests, key.requests_per_minute, now)
        account.tokens = _bucket(account.tokens, key.tokens_per_minute, now)
        account.leases = {lease: end for lease, end in account.leases.items() if end > now}
        return account


def _bucket(bucket: TokenBucket | None, per_minute: int | None, now: float) -> TokenBucket | None:
    """Return a key's bucket; a new one where the limit has changed."""
    if per_minute is None:
        return None
    return bucket if bucket is not None and bucket.per_minute == per_minute else TokenBucket(per_minute, now)


def _refusal(account: _Account, key: ApiKey, num_tokens: int, now: float) -> tuple[LimitKind | None, float]:
    """Return the limit that holds a request up longest, and for how long."""
    if key.max_parallel_requests is not None and len(account.leases) >= key.max_parallel_requests:
        return "max_parallel_requests", PARALLEL_RETRY_AFTER_S
    waits: list[tuple[float, LimitKind]] = []
    if account.requests is not None:
        waits.append((account.requests.wait_s(1, now), "requests_per_minute"))
    if account.tokens is not None:
        waits.append((account.tokens.wait_s(num_tokens, now), "tokens_per_minute"))
    wait_s, kind = max(waits, default=(0.0, None))
    return (kind, wait_s) if wait_s > 0 else (None, 0.0)


class LocalLedger:
    """A ledger of this process alone, for an endpoint of one process."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        self._ledger = ledger or Ledger()

    async def admit(self, name: str, key: ApiKey, num_tokens: int, lease_s: float) -> Verdict:
        """Ask the ledger."""
        return self._ledger.admit(name, key, num_tokens, lease_s)

    def settle(self, name: str, lease: int, unused_tokens: int) -> None:
        """Tell the ledger."""
        self._ledger.settle(name, lease, unused_tokens)
