import json
from typing import Any

import httpx
import pytest

from ray_ds.serve.requests import GenerationRequest, SamplingParams


def post(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def chunks(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/completions", json={"stream": True, **body})
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def hand_logprobs(teacher, sequence: list[int]) -> list[float]:
    table = teacher._logits(sequence).double().log_softmax(dim=-1)
    return [float(table[place - 1, sequence[place]]) for place in range(1, len(sequence))]


def test_an_echo_has_the_prompts_logprobs_first_and_null_for_its_first_token(taught, teacher, tokenizer) -> None:
    choice = post(taught, prompt="Gø", max_tokens=2, echo=True, logprobs=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:4] == ["<|bos|>", "G", "bytes:\\xc3", "bytes:\\xb8"]
    assert choice["text"].startswith("Gø") and len(logprobs["tokens"]) == 6
    assert logprobs["text_offset"][:5] == [0, 0, 1, 1, 2]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    prompt = [tokenizer.bos_id, *tokenizer.encode("Gø")]
    assert logprobs["token_logprobs"][1:4] == pytest.approx(hand_logprobs(teacher, prompt), abs=1e-4)
    for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert 2 <= len(top) <= 3 and value in top.values()


def test_an_echo_can_be_all_there_is(taught, teacher) -> None:
    content = post(taught, prompt=[3, 70, 80], max_tokens=0, echo=True, logprobs=0)
    choice = content["choices"][0]
    assert choice["text"] == "\x00CM" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(hand_logprobs(teacher, [3, 70, 80]), abs=1e-4)
    assert content["usage"]["completion_tokens"] == 0
    assert post(taught, prompt="Go", max_tokens=0, echo=True)["choices"][0]["text"] == "Go"


def test_a_streams_chunks_make_the_whole(taught) -> None:
    body = {"prompt": ["Go", "Stop"], "max_tokens": 3, "echo": True, "logprobs": 1}
    whole = post(taught, **body)
    parts = chunks(taught, **body, stream_options={"include_usage": True})
    assert parts.pop()["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for part in own for value in part["logprobs"][name]] == values


def test_prompt_logprobs_are_vllms_layout(taught, teacher, tokenizer) -> None:
    choice = post(taught, prompt="Go", max_tokens=1, prompt_logprobs=1)["choices"][0]
    prompt = [tokenizer.bos_id, *tokenizer.encode("Go")]
    first, *others = choice["prompt_logprobs"]
    assert first is None and len(others) == 2 and choice["logprobs"] is None
    for token, place, value in zip(prompt[1:], others, hand_logprobs(teacher, prompt), strict=True):
        assert place[str(token)]["logprob"] == pytest.approx(value, abs=1e-4)
        assert place[str(token)]["decoded_token"] == tokenizer.decode([token])
        ranks = sorted((entry["rank"] or 99, -entry["logprob"]) for entry in place.values())
        assert ranks[0][0] == 1 and ranks == sorted(ranks, key=lambda pair: pair[1])


def test_cached_tokens_are_counted_once_a_prompt(taught) -> None:
    usage = post(taught, prompt=["abc", "defgh"], n=2, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == 4 + 6 and usage["completion_tokens"] == 4
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4 // 2 + 6 // 2}


def test_every_sampling_field_reaches_the_engine(taught, teacher) -> None:
    post(
        taught,
        prompt="Go",
        add_special_tokens=False,
        max_tokens=5,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[9, 8],
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.2,
        logit_bias={"12": -100, "5": 2.5},
        seed=3,
        stop=["a", "b"],
        logprobs=4,
    )
    expected = SamplingParams(
        max_tokens=5,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=frozenset({8, 9}),
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.2,
        logit_bias=((5, 2.5), (12, -100)),
        seed="3/0",
        stop=("a", "b"),
        logprobs=4,
    )
    assert teacher.asked == [GenerationRequest(prompt=(3 + 71, 3 + 111), params=expected)]


def test_defaults_are_vllms(taught, teacher) -> None:
    post(taught, prompt="Go")
    post(taught, prompt="Go", max_tokens=None)
    first, second = teacher.asked
    assert first.params == SamplingParams(max_tokens=16)
    assert second.params == SamplingParams(max_tokens=256 - 3)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("best_of", 2, "ask for n answers and choose"),
        ("suffix", "end", "does not write what comes before"),
        ("guided_json", {}, "not held to a grammar"),
        ("bad_words", ["x"], "logit_bias -100"),
        ("truncate_prompt_tokens", 5, "shorten it"),
        ("return_token_ids", True, "/tokenize"),
    ],
)
def test_what_would_change_the_answer_is_refused_with_the_reason(taught, name, value, reason) -> None:
    response = taught.post("/v1/completions", json={"prompt": "x", name: value})
    error = response.json()["error"]
    assert response.status_code == 400 and reason in error["message"]
    assert error["param"] == name and error["code"] == "unsupported_parameter"


def test_a_full_queue_says_of_what_and_when(taught, teacher) -> None:
    from ray_ds.serve.engine import QueueFullError

    teacher.refusal = QueueFullError("tokens", 7.2)
    response = taught.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 429 and response.headers["retry-after"] == "8"
    assert response.json()["error"]["message"] == "the server has no room for more tokens; try again in 8 s"
