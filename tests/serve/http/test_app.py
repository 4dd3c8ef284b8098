import dataclasses
import json
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from ray_ds.serve.client import ask
from ray_ds.serve.http.app import POSTS
from ray_ds.serve.http.service import CompletionService
from tests.serve.http.conftest import Lines, serving

HEADERS = {"Authorization": "Bearer sk-test-0123456789"}


@pytest.fixture
def client(url: str, api_key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=20) as client:
        yield client


def post(url: str, content: bytes | dict, **headers: str) -> httpx.Response:
    data = json.dumps(content).encode() if isinstance(content, dict) else content
    return httpx.post(f"{url}/v1/completions", content=data, headers={**HEADERS, **headers}, timeout=20)


def test_health_is_open_and_says_what_is_served(url) -> None:
    response = httpx.get(f"{url}/health")
    assert response.status_code == 200
    content = response.json()
    assert content["status"] == "ok" and content["digest"] == "0123456789abcdef"
    assert content["model"] == "team/tiny" and content["integer_path"] == "onednn"


def test_health_turns_bad_when_the_engine_fails(url, model) -> None:
    model.breaks = True
    assert post(url, {"prompt": "x"}).status_code == 500
    assert httpx.get(f"{url}/health").status_code == 503
    refused = post(url, {"prompt": "x"})
    assert refused.status_code == 503 and "out of memory" in refused.json()["error"]["message"]


def test_models_are_listed_and_found(client) -> None:
    assert [model.id for model in client.models.list()] == ["team/tiny"]
    assert client.models.retrieve("team/tiny").id == "team/tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_stream_gives_the_text_of_the_whole_answer(client, temperature) -> None:
    arguments = {"model": "team/tiny", "prompt": "Go", "max_tokens": 40, "temperature": temperature, "seed": 3}
    whole = client.completions.create(**arguments)
    chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 10
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert whole.usage.prompt_tokens == 3 and whole.usage.completion_tokens == 40
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_all_forms_of_a_prompt_are_the_same_prompt(client, tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("Go")]
    common = {"model": "team/tiny", "max_tokens": 8, "temperature": 0}
    forms = ["Go", ["Go"], ids, [ids]]
    assert len({client.completions.create(prompt=form, **common).choices[0].text for form in forms}) == 1
    several = client.completions.create(prompt=["Go", "Stop"], n=2, seed=1, **(common | {"temperature": 1}))
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in several.choices}) == 4
    first = client.completions.create(prompt="Go", seed=1, **(common | {"temperature": 1}))
    assert first.choices[0].text == several.choices[0].text


def test_stop_echo_and_logprobs(client, model, tokenizer) -> None:
    prompt = (tokenizer.bos_id, *tokenizer.encode("Q"))
    model.scripts[prompt] = [*tokenizer.encode("one. "), 3 + 256 + 1, 3 + 256 + 2, *tokenizer.encode(" two. three")]
    common = {"model": "team/tiny", "prompt": "Q", "temperature": 0, "max_tokens": 16}
    assert client.completions.create(**common, stop=". t").choices[0].text == "one. 中 two"[:11]
    assert client.completions.create(**common, stop=["zz", " tw"], echo=True).choices[0].text == "Qone. 中"
    logprobs = client.completions.create(**common, logprobs=1).choices[0].logprobs
    assert logprobs.tokens[4:8] == [" ", "bytes:\\xe4\\xb8", "bytes:\\xad", " "]
    assert logprobs.text_offset[4:8] == [4, 5, 5, 6]
    assert logprobs.token_logprobs == pytest.approx([0] * 16, abs=1e-5)


def test_server_sent_events_are_ascii_lines(url, model, tokenizer) -> None:
    model.scripts[(tokenizer.bos_id,)] = [*tokenizer.encode("a\u2028b\n\n中\x85"), 1]
    response = post(url, {"prompt": "", "stream": True, "temperature": 0, "max_tokens": 30})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.content.isascii()
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == "a\u2028b\n\n中\x85"


def test_the_prompt_and_max_tokens_must_fit(client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="team/tiny", prompt="x" * 200, max_tokens=100)
    assert "256" in caught.value.message and "201" in caught.value.message and "301" in caught.value.message
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    assert client.completions.create(model="team/tiny", prompt="x" * 200, max_tokens=55).usage.total_tokens == 256


def test_api_keys(url, client) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "sk-test-0123456789"},
        {"Authorization": "Bearer"},
    ):
        for response in (
            httpx.get(f"{url}/v1/models", headers=headers),
            httpx.post(f"{url}/v1/completions", content=b"{", headers=headers),
        ):
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-other").models.list()


def test_a_full_queue_is_429_and_says_when_to_come_back(url, client, model) -> None:
    model.gate.clear()
    with client.completions.create(model="team/tiny", prompt=["a"] * 8, max_tokens=3, stream=True):
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="team/tiny", prompt="b")
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "queue_full"
        model.gate.set()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(url, engine, model, stream) -> None:
    model.gate.clear()
    body = {"prompt": ["a", "b", "c", "d", "e"], "max_tokens": 200, "stream": stream}
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream("POST", f"{url}/v1/completions", json=body, headers=HEADERS, timeout=0.5) as response,
    ):
        response.read()
    deadline = time.monotonic() + 5
    model.gate.set()
    while engine.stats.num_running + engine.stats.num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert engine.stats.num_tokens < 100
    assert engine.failure is None


BAD_BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe",
    b"[" * 9000,
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "stop": "\\udfff"}',
    b'{"prompt": "x", "user\\ud800": "\\ud800"}',
    b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}",
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "seed": 1.5}',
    b'{"prompt": "x", "prompt": "y"}',
    b'{"prompt": "x", "user": {"a": 1, "a": 1' + b"0" * 5000 + b"}}",
    b'{"prompt": "x", "user": ' + b"[" * 4000 + b"]" * 4000 + b"}",
    *(
        json.dumps(body).encode()
        for body in [
            {},
            {"prompt": None},
            {"prompt": 5},
            {"prompt": True},
            {"prompt": {}},
            {"prompt": []},
            {"prompt": [[]]},
            {"prompt": [None]},
            {"prompt": ["a", 1]},
            {"prompt": [1, "a"]},
            {"prompt": [-1]},
            {"prompt": [5, 10**6]},
            {"prompt": [5, 10**30]},
            {"prompt": [True]},
            {"prompt": ["x"] * 9},
            {"prompt": "x", "n": 9},
            {"prompt": "x", "n": 0},
            {"prompt": "x", "n": 10**30},
            {"prompt": "x", "max_tokens": 0},
            {"prompt": "x", "max_tokens": -1},
            {"prompt": "x", "max_tokens": "5"},
            {"prompt": "x", "max_tokens": 5.0001},
            {"prompt": "x", "max_tokens": 10**30},
            {"prompt": "x", "temperature": -0.1},
            {"prompt": "x", "temperature": "hot"},
            {"prompt": "x", "top_p": 0},
            {"prompt": "x", "top_p": 1.1},
            {"prompt": "x", "top_k": -2},
            {"prompt": "x", "stop": ""},
            {"prompt": "x", "stop": [""]},
            {"prompt": "x", "stop": ["a"] * 17},
            {"prompt": "x", "stop": 5},
            {"prompt": "x", "stream": "yes"},
            {"prompt": "x", "stream_options": {"include_usage": True}},
            {"prompt": "x", "stream": True, "stream_options": 5},
            {"prompt": "x", "logprobs": 21},
            {"prompt": "x", "prompt_logprobs": 1, "stream": True},
            {"prompt": "x", "model": 5},
            {"prompt": "x", "suffix": "y"},
            {"prompt": "x", "best_of": 2},
            {"prompt": "x", "logit_bias": {"five": 1}},
            {"prompt": "x", "logit_bias": {"-5": 1}},
            {"prompt": "x", "logit_bias": {"5": 101}},
            {"prompt": "x", "logit_bias": {"999": 1}},
            {"prompt": "x", "presence_penalty": 2.1},
            {"prompt": "x", "frequency_penalty": -2.1},
            {"prompt": "x", "repetition_penalty": 0},
            {"prompt": "x", "min_p": 1.1},
            {"prompt": "x", "min_tokens": 17},
            {"prompt": "x", "stop_token_ids": [10**30]},
            {"prompt": "x", "response_format": {"type": "json_object"}},
            {"prompt": "x", "use_beam_search": True},
            {"prompt": "x", "truncate_prompt_tokens": 5},
        ]
    ),
]


@pytest.mark.shows("Bad requests get 4xx with an OpenAI error object, never 5xx")
def test_bad_bodies_are_400_with_an_error_object(url, engine) -> None:
    for body in BAD_BODIES:
        response = post(url, body)
        assert response.status_code == 400, (body[:100], response.text)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["type"] == "invalid_request_error"
    assert engine.stats.num_running == engine.stats.num_waiting == 0 and engine.failure is None


BROKEN = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"1",
    b"\xff\xfe",
    b"[" * 9000,
    b'{"a": ' * 1200 + b"1" + b"}" * 1200,
    b'{"user": "\\ud800"}',
    b'{"user": NaN}',
    b'{"user": "\x00"}',
    b'{"model": "a", "model": "a"}',
]


@pytest.mark.parametrize("path", [post.path for post in POSTS])
def test_no_route_takes_what_is_no_clean_json(url, path) -> None:
    for body in BROKEN:
        response = httpx.post(f"{url}{path}", content=body, headers=HEADERS)
        assert response.status_code == 400, (body[:50], response.text)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.post(f"{url}{path}", content=b"{}").status_code == 401
    assert httpx.post(f"{url}{path}", content=b" " * 10_001, headers=HEADERS).status_code == 413
    assert httpx.put(f"{url}{path}", content=b"{}", headers=HEADERS).status_code == 405


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "\x00\x1b\x7f\u2028 tab\t"},
        {"prompt": ""},
        {"prompt": "x", "user": "me", "unheard_of": {"a": [1]}},
        {"prompt": "x", "max_tokens": None, "temperature": None, "stop": None, "n": None, "stream": None, "seed": None},
        {"prompt": "x", "seed": -(10**30)},
        {"prompt": "x", "top_k": -1, "best_of": 1, "suffix": None, "logit_bias": {}, "frequency_penalty": 0.0},
    ],
)
def test_odd_but_valid_bodies_are_answered(url, body) -> None:
    response = post(url, body)
    assert response.status_code == 200, response.text


def test_a_long_body_is_413(url) -> None:
    assert post(url, {"prompt": "x" * 20_000}).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/v1/nope", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)],
)
def test_what_does_not_exist_is_an_error_object(url, method, path, status) -> None:
    response = httpx.request(method, f"{url}{path}", headers=HEADERS)
    assert response.status_code == status and response.json()["error"]["message"]


@pytest.mark.parametrize("model_id", ["other", "\x00", "中", "\U0001f600"])
def test_an_unknown_model_is_404(url, model_id) -> None:
    response = post(url, {"prompt": "x", "model": model_id})
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_a_failure_in_a_stream_is_an_error_of_the_client(client, model) -> None:
    model.gate.clear()
    stream = client.completions.create(model="team/tiny", prompt="x", max_tokens=30, stream=True)
    model.breaks = True
    model.gate.set()
    with pytest.raises(openai.APIError, match="out of memory"):
        list(stream)


@pytest.fixture
def chat_service(service: CompletionService) -> CompletionService:
    return dataclasses.replace(service, chat=Lines())


@pytest.fixture
def chat_url(chat_service: CompletionService) -> Iterator[str]:
    with serving(chat_service) as url:
        yield url


@pytest.mark.shows("A fine-tuned model answers /v1/chat/completions by its own template")
def test_a_chat_is_the_completion_of_its_rendered_messages(chat_url, api_key) -> None:
    messages = [{"role": "user", "content": "Go"}]
    with openai.OpenAI(base_url=f"{chat_url}/v1", api_key=api_key, max_retries=0, timeout=20) as client:
        common = {"model": "team/tiny", "max_tokens": 12, "temperature": 0.9, "seed": 3}
        whole = client.chat.completions.create(messages=messages, **common)
        plain = client.completions.create(prompt=Lines().encode_prompt(messages), **common)
        assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
        assert whole.choices[0].message.content == plain.choices[0].text and whole.usage == plain.usage
        chunks = list(client.chat.completions.create(messages=messages, stream=True, **common))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == plain.choices[0].text
        assert chunks[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError, match="must end with the user's"):
            client.chat.completions.create(messages=[{"role": "assistant", "content": "x"}], model="team/tiny")
    assert ask(chat_url, "Go", max_tokens=12, temperature=0.9, seed=3, api_key=api_key) == plain.choices[0].text


def test_a_model_without_a_template_says_so(client) -> None:
    with pytest.raises(openai.BadRequestError, match="this model has no chat template"):
        client.chat.completions.create(messages=[{"role": "user", "content": "x"}], model="team/tiny")
