"""Keys, limits and the time limit, seen by the `openai` client through a live server."""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from ray_ds.config.keys import ApiKey
from ray_ds.serve.http.access import Access
from ray_ds.serve.http.service import CompletionService
from ray_ds.serve.keys import KeyRing, hash_api_key
from ray_ds.serve.limits import LedgerUnavailableError, LocalLedger
from tests.serve.http.conftest import serving

KEY = "sk-limited"


def limited(service: CompletionService, **limits: int) -> CompletionService:
    keys = KeyRing({"limited": ApiKey(sha256=hash_api_key(KEY), **limits)}, None)
    access = Access(keys=keys, ledger=LocalLedger(), request_timeout_s=60)
    return dataclasses.replace(service, access=access)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=20)


def complete(client: openai.OpenAI, **changes: object) -> openai.types.Completion:
    return client.completions.create(**{"model": "team/tiny", "prompt": "Go", "max_tokens": 5, **changes})


@pytest.mark.shows("Without a valid key nothing answers but /health, /ping and the page's files")
def test_every_route_but_health_wants_a_key(url: str) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/nothing")):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"api-key": "sk-test-0123456789"}):
            response = httpx.request(method, f"{url}{path}", headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_key_that_is_no_ascii_is_a_wrong_key(url: str) -> None:
    headers = {b"Authorization": "Bearer 中\xff".encode()}
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401


def test_requests_per_minute(service: CompletionService) -> None:
    with serving(limited(service, requests_per_minute=2)) as url, client_of(url) as client:
        raw = client.completions.with_raw_response.create(model="team/tiny", prompt="Go", max_tokens=5)
        assert raw.headers["x-ratelimit-limit-requests"] == "2"
        assert raw.headers["x-ratelimit-remaining-requests"] == "1"
        assert 29_000 <= int(raw.headers["x-ratelimit-reset-requests"].removesuffix("ms")) <= 30_000
        assert "x-ratelimit-limit-tokens" not in raw.headers
        complete(client)
        with pytest.raises(
            openai.RateLimitError, match=r"limit of requests_per_minute \(2\).*try again in 30 s"
        ) as caught:
            complete(client)
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "30"
        assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"
        assert client.models.list().data, "what computes nothing is not counted"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_per_minute_are_those_of_the_prompt_and_of_what_was_written(
    service: CompletionService, model, tokenizer, stream: bool
) -> None:
    model.scripts[(tokenizer.bos_id, *tokenizer.encode("Go"))] = [*tokenizer.encode("abcd"), tokenizer.eos_id]
    with serving(limited(service, tokens_per_minute=100)) as url, client_of(url) as client:
        for _ in range(3):
            answer = complete(client, max_tokens=80, temperature=0, stream=stream)
            if stream:
                list(answer)
            time.sleep(0.05)  # the bucket is settled after the last byte
        raw = client.completions.with_raw_response.create(model="team/tiny", prompt="Go", max_tokens=1)
        assert int(raw.headers["x-ratelimit-remaining-tokens"]) == pytest.approx(100 - 3 * (3 + 5) - 4, abs=3)
        with pytest.raises(openai.RateLimitError, match="tokens_per_minute"):
            complete(client, max_tokens=97)
        with pytest.raises(openai.BadRequestError, match="come to 101 tokens, more than the 100 a minute"):
            complete(client, max_tokens=98)


def test_the_largest_max_tokens(service: CompletionService) -> None:
    with serving(limited(service, max_tokens=10)) as url, client_of(url) as client:
        assert complete(client, max_tokens=10).usage.completion_tokens <= 10
        with pytest.raises(openai.BadRequestError, match=r"max_tokens \(11\) must be at most 10") as caught:
            complete(client, max_tokens=11)
        assert caught.value.code == "key_limit_exceeded" and caught.value.param == "max_tokens"


def test_parallel_requests_end_with_their_stream_even_if_it_is_left(service: CompletionService, model) -> None:
    model.gate.clear()
    with serving(limited(service, max_parallel_requests=1)) as url, client_of(url) as client:
        with complete(client, stream=True, max_tokens=50):
            with pytest.raises(openai.RateLimitError, match="max_parallel_requests") as caught:
                complete(client)
            assert caught.value.response.headers["retry-after"] == "1"
        model.gate.set()
        deadline = time.monotonic() + 5
        while True:
            try:
                complete(client)
                break
            except openai.RateLimitError:
                assert time.monotonic() < deadline
                time.sleep(0.02)


def test_a_key_deleted_from_the_file_is_refused_a_second_later(service: CompletionService, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'alice = {{sha256 = "{hash_api_key(KEY)}"}}\n')
    access = Access(keys=KeyRing({}, file), ledger=LocalLedger(), request_timeout_s=60)
    with serving(dataclasses.replace(service, access=access)) as url, client_of(url) as client:
        client.models.list()
        file.write_text("")
        time.sleep(1.1)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


class Unreachable:
    """A ledger whose actor is gone."""

    async def admit(self, *_: object) -> None:
        raise LedgerUnavailableError("the limits of API keys cannot be checked now; try again in 1 s")


def test_limits_that_cannot_be_checked_let_nobody_pass(service: CompletionService) -> None:
    service = limited(service, requests_per_minute=5)
    access = dataclasses.replace(service.access, ledger=Unreachable())
    with serving(dataclasses.replace(service, access=access)) as url, client_of(url) as client:
        with pytest.raises(openai.InternalServerError, match="cannot be checked now") as caught:
            complete(client)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"


@pytest.fixture
def hurried(service: CompletionService) -> Iterator[str]:
    access = Access(keys=None, ledger=LocalLedger(), request_timeout_s=0.3)
    with serving(dataclasses.replace(service, access=access)) as url:
        yield url


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends_with_an_error_and_frees_its_slot(
    hurried: str, engine, model, stream: bool
) -> None:
    model.gate.clear()
    with client_of(hurried) as client:
        started = time.monotonic()
        with pytest.raises(openai.APIError, match=r"the request took longer than 0\.3 s; ask for"):
            answer = complete(client, max_tokens=200, stream=stream)
            for _ in answer:
                pass
        assert time.monotonic() - started < 3
    model.gate.set()
    deadline = time.monotonic() + 5
    while engine.stats.num_running + engine.stats.num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert engine.stats.num_tokens < 150


def test_a_body_that_never_ends_is_cut_off(hurried: str) -> None:
    def slowly() -> Iterator[bytes]:
        for _ in range(20):
            yield b" "
            time.sleep(0.1)

    response = httpx.post(f"{hurried}/v1/completions", content=slowly(), timeout=20)
    assert response.status_code == 408 and response.json()["error"]["code"] == "request_timeout"


def test_a_refusal_is_quick(service: CompletionService) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "Go", "max_tokens": 5}
    times = []
    with serving(limited(service, requests_per_minute=1)) as url, httpx.Client(base_url=url, headers=headers) as client:
        assert client.post("/v1/completions", json=body).status_code == 200
        for _ in range(30):
            started = time.perf_counter()
            assert client.post("/v1/completions", json=body).status_code == 429
            times.append(time.perf_counter() - started)
    print(f"refused in {statistics.median(times) * 1e3:.1f} ms, {max(times) * 1e3:.1f} ms at most")
    assert min(times) < 0.02
