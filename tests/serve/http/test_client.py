import pytest

from ray_ds.errors import ClusterError
from ray_ds.serve.client import generate, generate_stream, is_endpoint_alive


def test_the_client_asks_and_streams_the_same(url, api_key) -> None:
    arguments = {"max_tokens": 30, "temperature": 0.8, "seed": 4, "api_key": api_key}
    whole = generate(url, "Why 中?", **arguments)
    pieces = list(generate_stream(url, "Why 中?", **arguments))
    assert "".join(pieces) == whole and len(pieces) > 5


def test_a_proxy_of_the_environment_is_passed_by(url, api_key, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert generate(url, "x", api_key=api_key, model="team/tiny")


def test_what_the_server_refuses_is_said(url, model, api_key) -> None:
    with pytest.raises(ClusterError, match=r"\(401: missing or wrong API key.*\) must accept the request"):
        generate(url, "x")
    with pytest.raises(ClusterError, match="404: the model 'other' does not exist"):
        generate(url, "x", api_key=api_key, model="other")
    model.breaks = True
    with pytest.raises(ClusterError, match="out of memory"):
        list(generate_stream(url, "x", api_key=api_key))


def test_an_endpoint_is_alive_while_it_serves_its_digest(url) -> None:
    assert is_endpoint_alive({"url": url, "digest": "0123456789abcdef"})
    assert not is_endpoint_alive({"url": url, "digest": "0123456789abcdee"})
