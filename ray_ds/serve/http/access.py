"""Who asks, and how much they may: the caller of a request, whichever way it came.

Keys come as `Authorization: Bearer KEY`, which is what openai's client sends and vLLM reads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_ds.config.keys import ApiKey
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.keys import KeyRing, find_key
from ray_ds.serve.limits import Budget, LedgerClient, LedgerUnavailableError, Verdict
from ray_ds.serve.requests import GenerationRequest, Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Who may ask what."""

    keys: KeyRing | None
    """None = open to all who reach the port."""
    ledger: LedgerClient
    request_timeout_s: float
    """Longest time from a request's first byte to its answer's last."""

    async def identify(self, authorization: str | None) -> "Caller":
        """Return who asks.

        Args:
            authorization: the request's header of this name.
        Raises:
            ApiError: 401, without a valid key.
        """
        if self.keys is None:
            return Caller(self, "", None)
        scheme, _, sent = (authorization or "").partition(" ")
        keys = await self.keys.current()
        name = find_key(keys, sent.strip() if scheme.lower() == "bearer" else "")
        if name is None:
            message = "missing or wrong API key; send it as 'Authorization: Bearer KEY'"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, type="authentication_error", code="invalid_api_key", headers=headers)
        return Caller(self, name, keys[name])


class Caller:
    """Who sent a request, and what that holds of the key's limits until it ends."""

    def __init__(self, access: Access, name: str, key: ApiKey | None) -> None:
        self.num_generated_tokens = 0
        """Tokens of its answers so far; whoever reads them from the engine counts."""
        self._access = access
        self._name = name
        self._key = key
        self._verdict: Verdict | None = None
        self._num_prompt_tokens = 0
        self._num_charged_tokens = 0

    async def admit(self, requests: Sequence[Request]) -> None:
        """Charge what is about to be handed to the engine to the caller's key; call once, before that.

        Raises:
            ApiError: 400, more than the key ever allows; 429, more than it allows now; 503, nobody knows.
        """
        key = self._key
        if key is None:
            return
        answers = [request.params.max_tokens for request in requests if isinstance(request, GenerationRequest)]
        self._num_prompt_tokens = sum(len(request.prompt) for request in requests)
        self._num_charged_tokens = self._num_prompt_tokens + sum(answers)
        _check_never_fits(key, max(answers, default=0), self._num_charged_tokens)
        if not key.is_limited:
            return
        try:
            self._verdict = await self._access.ledger.admit(
                self._name, key, self._num_charged_tokens, self._access.request_timeout_s
            )
        except LedgerUnavailableError as error:
            headers = {"Retry-After": "1"}
            raise ApiError(503, str(error), type="server_error", code="limits_unavailable", headers=headers) from error
        if self._verdict.refused_by is not None:
            raise _too_much(key, self._verdict)

    def settle(self) -> None:
        """End what `admit` began: give back the tokens that were not generated."""
        if self._verdict is not None and self._verdict.lease is not None:
            unused = self._num_charged_tokens - self._num_prompt_tokens - self.num_generated_tokens
            self._access.ledger.settle(self._name, self._verdict.lease, max(0, unused))

    def headers(self) -> dict[str, str]:
        """Return what is left of the key's limits, under OpenAI's names."""
        if self._verdict is None:
            return {}
        return _budget_headers("requests", self._verdict.requests) | _budget_headers("tokens", self._verdict.tokens)


def _check_never_fits(key: ApiKey, max_tokens: int, num_tokens: int) -> None:
    if key.max_tokens is not None and max_tokens > key.max_tokens:
        message = f"max_tokens ({max_tokens}) must be at most {key.max_tokens}, the limit of this API key; lower it"
        raise ApiError(400, message, param="max_tokens", code="key_limit_exceeded")
    if key.tokens_per_minute is not None and num_tokens > key.tokens_per_minute:
        message = (
            f"prompt and max_tokens come to {num_tokens} tokens, more than the {key.tokens_per_minute} a minute of "
            "this API key; shorten the prompt or lower max_tokens"
        )
        raise ApiError(400, message, param="max_tokens", code="key_limit_exceeded")


def _too_much(key: ApiKey, verdict: Verdict) -> ApiError:
    assert verdict.refused_by is not None
    allowed: Any = getattr(key, verdict.refused_by)
    seconds = max(1, math.ceil(verdict.retry_after_s))
    message = f"this API key's limit of {verdict.refused_by} ({allowed}) is reached; try again in {seconds} s"
    headers = {"Retry-After": str(seconds)}
    return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def _budget_headers(what: str, budget: Budget | None) -> dict[str, str]:
    if budget is None:
        return {}
    return {
        f"x-ratelimit-limit-{what}": str(budget.limit),
        f"x-ratelimit-remaining-{what}": str(budget.remaining),
        f"x-ratelimit-reset-{what}": f"{math.ceil(budget.reset_s * 1000)}ms",
    }
