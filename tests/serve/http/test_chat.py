import json

import pytest

GO = [{"role": "user", "content": "Go"}]


def test_a_stream_starts_with_the_role_and_makes_the_whole(taught) -> None:
    body = {"messages": GO, "max_completion_tokens": 4, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = taught.post("/v1/chat/completions", json=body).json()
    response = taught.post("/v1/chat/completions", json={**body, "stream": True})
    parts = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    assert [part["choices"][0]["delta"] for part in parts[:2]] == [{"role": "assistant", "content": ""}] * 2
    for index, choice in enumerate(whole["choices"]):
        own = [part["choices"][0] for part in parts[2:] if part["choices"][0]["index"] == index]
        assert "".join(part["delta"]["content"] for part in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"] == "length"
        assert [entry for part in own for entry in part["logprobs"]["content"]] == choice["logprobs"]["content"]


def test_logprobs_are_openais_layout(taught) -> None:
    body = {"messages": GO, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    choice = taught.post("/v1/chat/completions", json=body).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 3
    for entry in entries:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"} and len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] > entry["top_logprobs"][1]["logprob"]
    written = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert written.decode(errors="replace") == choice["message"]["content"]
    without = taught.post("/v1/chat/completions", json={"messages": GO, "max_tokens": 3}).json()["choices"][0]
    assert without["logprobs"] is None and without["message"] == choice["message"]


def test_an_answer_may_fill_what_is_left(taught, teacher) -> None:
    taught.post("/v1/chat/completions", json={"messages": GO})
    taught.post("/v1/chat/completions", json={"messages": GO, "max_tokens": 5, "max_completion_tokens": 3})
    prompt = b"user: Go"
    assert teacher.asked[0].prompt == tuple(prompt)
    assert [request.params.max_tokens for request in teacher.asked] == [256 - len(prompt), 3]


def test_text_parts_are_lines_and_a_developer_is_the_system(taught, teacher) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    taught.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert bytes(teacher.asked[0].prompt) == b"system: be brief\nuser: one\ntwo"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_what_cannot_be_done_is_refused(taught, fields, param) -> None:
    response = taught.post("/v1/chat/completions", json={"messages": GO, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_neutral_values_are_let_pass(taught) -> None:
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "me",
        "store": False,
        "parallel_tool_calls": True,
        "max_tokens": 1,
    }
    assert taught.post("/v1/chat/completions", json={"messages": GO, **neutral}).status_code == 200
