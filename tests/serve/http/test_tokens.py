from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support


def test_text_becomes_tokens_and_comes_back(taught, tokenizer) -> None:
    found = taught.post("/tokenize", json={"prompt": "Gø", "return_token_strs": True}).json()
    ids = [tokenizer.bos_id, *tokenizer.encode("Gø")]
    assert found["tokens"] == ids and found["count"] == 4 and found["max_model_len"] == 256
    assert found["token_strs"] == ["<|bos|>", "G", "bytes:\\xc3", "bytes:\\xb8"]
    plain = taught.post("/tokenize", json={"prompt": "Gø", "add_special_tokens": False}).json()
    assert plain["tokens"] == ids[1:] and plain["token_strs"] is None
    assert taught.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "Gø"}


def test_messages_become_the_prompt_of_their_chat(taught, teacher) -> None:
    messages = [{"role": "user", "content": "Go"}]
    taught.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert taught.post("/tokenize", json={"messages": messages}).json()["tokens"] == list(teacher.asked[0].prompt)


def test_a_special_tokens_name_is_text_unless_it_is_all_there_is(taught, tokenizer) -> None:
    def tokens(prompt: str, add_special_tokens: bool) -> list[int]:
        body = {"prompt": prompt, "add_special_tokens": add_special_tokens}
        return taught.post("/tokenize", json=body).json()["tokens"]

    assert tokens("<|eos|>", False) == [tokenizer.eos_id]
    assert tokens("<|eos|>", True) == [tokenizer.bos_id, *tokenizer.encode("<|eos|>")]
    assert tokens("<|eos|> ", False) == tokenizer.encode("<|eos|> ")


def test_lm_evals_remote_tokenizer_works(taught, tokenizer, api_key) -> None:
    url = f"{taught.base_url}/v1/completions"
    assert check_remote_tokenizer_support(url, auth_token=api_key)
    remote = RemoteTokenizer(url, auth_token=api_key)
    assert remote.encode("Go") == tokenizer.encode("Go") and remote.decode(tokenizer.encode("Go")) == "Go"
    assert (remote.bos_token_id, remote.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    messages = [{"role": "user", "content": "Go"}]
    assert remote.apply_chat_template(messages) == str(messages)


def test_bad_bodies_are_400(taught) -> None:
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": 5}),
        ("/detokenize", {"tokens": [999]}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {}),
    ):
        response = taught.post(path, json=body)
        assert response.status_code == 400, (path, body)
        assert response.json()["error"]["type"] == "invalid_request_error"
