"""The `openai` package's clients, which refuse any answer that is not exactly as OpenAI documents it."""

import asyncio
from collections.abc import Iterator

import openai
import pytest

MODEL = "team/tiny"
MESSAGES = [{"role": "user", "content": "Go"}]


@pytest.fixture
def client(taught, api_key) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{taught.base_url}/v1", api_key=api_key, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def test_whole_answers_are_valid(client) -> None:
    common = {"model": MODEL, "max_tokens": 3, "seed": 1}
    completion = client.completions.create(prompt="Go", logprobs=2, n=2, **common)
    assert len(completion.choices[0].logprobs.top_logprobs) == 3
    assert completion.usage.prompt_tokens_details.cached_tokens == 1
    chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, n=2, **common)
    assert [choice.message.role for choice in chat.choices] == ["assistant"] * 2
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    assert len(client.embeddings.create(model=MODEL, input=["a", "b"], encoding_format="float").data) == 2
    assert client.models.list().data[0].id == client.models.retrieve(MODEL).id == MODEL


def test_a_chats_stream_is_valid(client) -> None:
    common = {"model": MODEL, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    *parts, last = client.chat.completions.create(messages=MESSAGES, logprobs=True, **common)
    assert last.usage.completion_tokens == 3 and parts[0].choices[0].delta.role == "assistant"


def test_nulls_that_openai_sends_and_its_types_leave_out(taught, api_key) -> None:
    """An echo's first token has no log-probability, an unfinished chunk no reason: strict validation knows neither."""
    with openai.OpenAI(base_url=f"{taught.base_url}/v1", api_key=api_key, max_retries=0) as client:
        common = {"model": MODEL, "prompt": "Go", "max_tokens": 3, "logprobs": 1}
        whole = client.completions.create(echo=True, **common).choices[0].logprobs
        assert whole.token_logprobs[0] is None and whole.top_logprobs[0] is None
        parts = list(client.completions.create(stream=True, **common))
        assert [part.choices[0].finish_reason for part in parts] == [None, None, "length"]


def test_the_async_client_works(client) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(
            base_url=client.base_url, api_key=client.api_key, max_retries=0, _strict_response_validation=True
        ) as other:
            whole = await other.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4)
            stream = await other.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4, stream=True)
            parts = [part.choices[0].delta.content async for part in stream]
            await other.embeddings.create(model=MODEL, input="a", encoding_format="float")
            return whole.choices[0].message.content, "".join(parts)

    whole, streamed = asyncio.run(ask())
    assert whole == streamed


def test_errors_are_the_clients_own(client, teacher) -> None:
    from ray_ds.serve.engine import EngineStoppedError, QueueFullError

    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-other").embeddings.create(model=MODEL, input="a")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 300)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    teacher.refusal = QueueFullError("requests", 0.1)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt="x")
    teacher.refusal = EngineStoppedError("out of memory")
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        client.completions.create(model=MODEL, prompt="x")
