import math

import openai
import pytest

from tests.serve.http.teacher import embedding_of


@pytest.fixture
def client(taught, api_key):
    with openai.OpenAI(base_url=f"{taught.base_url}/v1", api_key=api_key, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_all_forms_of_an_input_have_its_vector(client, tokenizer, encoding) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("Go")]
    for form in ("Go", ["Go"], ids, [ids]):
        found = client.embeddings.create(model="team/tiny", input=form, **encoding)
        (data,) = found.data
        if encoding.get("encoding_format") != "base64":
            assert data.embedding == pytest.approx(embedding_of(ids), abs=1e-6)
        assert found.usage.prompt_tokens == found.usage.total_tokens == 3


def test_vectors_are_in_the_order_of_the_texts(client, tokenizer) -> None:
    texts = ["one", "two", "three"]
    found = client.embeddings.create(model="team/tiny", input=texts).data
    assert [data.index for data in found] == [0, 1, 2]
    for text, data in zip(texts, found, strict=True):
        assert data.embedding == pytest.approx(embedding_of([0, *tokenizer.encode(text)]), abs=1e-6)
        assert math.hypot(*data.embedding) == pytest.approx(1)


@pytest.mark.parametrize(
    "body",
    [
        {"input": "x", "dimensions": 2},
        {"input": []},
        {"input": ["x"] * 9},
        {"input": "x" * 300},
        {"input": [999]},
        {"input": "x", "encoding_format": "hex"},
        {},
    ],
)
def test_bad_inputs_are_400(taught, body) -> None:
    response = taught.post("/v1/embeddings", json=body)
    assert response.status_code == 400 and response.json()["error"]["message"]
