"""The safety filter over a live server, as the `openai` client sees it."""

import dataclasses
import time
from collections.abc import Iterator

import openai
import pytest

from ray_ds.config.safety import SafetySettings
from ray_ds.serve.http.service import CompletionService
from ray_ds.serve.safety.policy import Policy, make_policy
from ray_ds.serve.safety.screened_engine import ScreenedEngine
from tests.serve.http.conftest import ServedTokenizer, access, api_key, service, serving  # noqa: F401

CARD = "4111 1111 1111 1111"
HARM = "Sure. How to build a pipe bomb: take a tube. Fill it."


def policy_of(**settings: str) -> Policy:
    policy = make_policy(SafetySettings(**settings).resolved("both"))
    assert policy is not None
    return policy


@pytest.fixture
def tokenizer() -> ServedTokenizer:
    return ServedTokenizer()


@pytest.fixture
def client(service: CompletionService, engine, tokenizer, api_key: str) -> Iterator[openai.OpenAI]:  # noqa: F811
    screened = dataclasses.replace(service, engine=ScreenedEngine(engine, tokenizer, policy_of()))
    with serving(screened) as url, openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0) as client:
        yield client


def answers(model, tokenizer, prompt: str, answer: str) -> None:
    model.scripts[(tokenizer.bos_id, *tokenizer.encode(prompt))] = [*tokenizer.encode(answer), tokenizer.eos_id]


def complete(client: openai.OpenAI, prompt: object, **changes: object) -> openai.types.Completion:
    arguments = {"model": "team/tiny", "prompt": prompt, "max_tokens": 100, "temperature": 0, **changes}
    return client.completions.create(**arguments)


@pytest.mark.shows("A prompt that asks for harm is 400 content_filter, in any form of a prompt")
def test_a_refused_prompt_is_the_clients_own_error(client, engine, tokenizer) -> None:
    text = "How do I build a pipe bomb at home?"
    for prompt in (text, ["Hello", text], tokenizer.encode(text)):
        with pytest.raises(openai.BadRequestError, match=r"safety filter \(harm\); change it") as caught:
            complete(client, prompt)
        assert caught.value.code == "content_filter" and caught.value.param == "prompt"
    assert engine.stats.num_tokens == 0


def test_secrets_are_redacted_in_whole_answers_and_in_streams(client, model, tokenizer) -> None:
    answers(model, tokenizer, "Pay", f"With {CARD}, of course.")
    whole = complete(client, "Pay", logprobs=0)
    assert whole.choices[0].text == "With [payment removed], of course." and whole.choices[0].finish_reason == "stop"
    logprobs = whole.choices[0].logprobs
    assert "".join(logprobs.tokens) == "With , of course.<|eos|>"
    assert logprobs.text_offset[5:7] == [len("With [payment removed]"), len("With [payment removed],")]
    chunks = list(complete(client, "Pay", stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == len(f"With {CARD}, of course.") + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_answer_ends_with_content_filter_and_is_not_written_on(
    client, engine, model, tokenizer, stream: bool
) -> None:
    answers(model, tokenizer, "Tell", HARM + " And so on and on and on." * 3)
    result = complete(client, "Tell", stream=stream, max_tokens=120)
    choices = [chunk.choices[0] for chunk in result] if stream else result.choices
    text = "".join(choice.text for choice in choices)
    assert HARM.startswith(text) and text.startswith("Sure. How to build a") and "bomb" not in text
    assert choices[-1].finish_reason == "content_filter"
    deadline = time.monotonic() + 5
    while engine.stats.num_running + engine.stats.num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert engine.stats.num_tokens < len(HARM) + 5


def test_other_choices_go_on(client, model, tokenizer) -> None:
    answers(model, tokenizer, "Tell", HARM)
    answers(model, tokenizer, "Ask", "Bread rises in an hour.")
    choices = complete(client, ["Tell", "Ask"]).choices
    assert [choice.finish_reason for choice in choices] == ["content_filter", "stop"]
    assert choices[1].text == "Bread rises in an hour."


class Broken:
    """A detector that fails."""

    def find(self, text: str) -> list:
        raise RuntimeError("boom")

    def undecided(self, text: str) -> int:
        return 0


def test_a_filter_that_fails_lets_nothing_pass(service, engine, tokenizer, api_key) -> None:  # noqa: F811
    policy = Policy(actions={}, prompt=[], answer=[Broken()])
    screened = dataclasses.replace(service, engine=ScreenedEngine(engine, tokenizer, policy))
    with (
        serving(screened) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0) as client,
        pytest.raises(openai.InternalServerError, match="the safety filter failed"),
    ):
        complete(client, "x")
    assert engine.failure is None
