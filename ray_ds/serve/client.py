"""Asking an endpoint, with the standard library alone."""

import http.client
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from ray_ds.errors import ClusterError

HEALTH_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 300.0
"""Longest silence of an endpoint that is answering."""


def generate(
    url: str,
    prompt: str,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int | None = None,
    api_key: str | None = None,
    model: str | None = None,
) -> str:
    """Return what the model behind an endpoint writes after `prompt`.

    Args:
        url: the endpoint's address without `/v1`, such as `http://127.0.0.1:8000`.
        model: its id; None = whatever is served there.
    Raises:
        ClusterError: nothing answers there, or it refuses; the message holds its reason.
    """
    body = _body(prompt, max_tokens, temperature, seed, model)
    with _post(url, body, api_key) as response:
        content = _read_json(url, response.read())
    return str(content["choices"][0]["text"])


def ask(
    url: str,
    question: str,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int | None = None,
    api_key: str | None = None,
    model: str | None = None,
) -> str:
    """Return the answer to a user's question where the model has a chat template, else what it writes after it.

    Raises:
        ClusterError: as `generate`.
    """
    if not (read_health(url) or {}).get("has_chat_template"):
        return generate(
            url,
            question,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            api_key=api_key,
            model=model,
        )
    body = _body(question, max_tokens, temperature, seed, model)
    body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    with _post(url, body, api_key, route="/v1/chat/completions") as response:
        content = _read_json(url, response.read())
    return str(content["choices"][0]["message"]["content"])


def generate_stream(
    url: str,
    prompt: str,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int | None = None,
    api_key: str | None = None,
    model: str | None = None,
) -> Iterator[str]:
    """Yield the same text as `generate` piece by piece as it is written."""
    body = {**_body(prompt, max_tokens, temperature, seed, model), "stream": True}
    with _post(url, body, api_key) as response:
        for line in response:
            data = line.strip().removeprefix(b"data: ")
            if data == b"[DONE]":
                return
            if data:
                yield str(_read_json(url, data)["choices"][0]["text"])
    raise _refused(url, "the stream ended early")


def read_health(url: str) -> Mapping[str, Any] | None:
    """Return what `/health` says, or None where nothing healthy answers."""
    try:
        with _open(urllib.request.Request(f"{url}/health"), HEALTH_TIMEOUT_S) as response:
            content = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError):
        return None
    return content if isinstance(content, dict) else None


def is_taken_by_another(host: str, port: int) -> bool:
    """Tell whether something other than a Ray Serve proxy listens on a port, as seen from here."""
    try:
        socket.create_connection((host, port), timeout=HEALTH_TIMEOUT_S).close()
    except OSError:
        return False
    try:
        with _open(urllib.request.Request(f"http://{host}:{port}/-/healthz"), HEALTH_TIMEOUT_S) as response:
            return bool(response.read() != b"success")
    except (OSError, http.client.HTTPException):
        return True


def is_endpoint_alive(facts: Mapping[str, Any]) -> bool:
    """Tell whether the endpoint with these facts (`url`, `digest`) still serves what it was made for."""
    health = read_health(str(facts["url"]))
    return health is not None and health.get("digest") == facts["digest"]


def _body(prompt: str, max_tokens: int, temperature: float, seed: int | None, model: str | None) -> dict[str, Any]:
    content = {"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "seed": seed, "model": model}
    return {name: value for name, value in content.items() if value is not None}


def _post(
    url: str, body: Mapping[str, Any], api_key: str | None, route: str = "/v1/completions"
) -> http.client.HTTPResponse:
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(f"{url}{route}", json.dumps(body).encode(), headers)
    try:
        return _open(request, ANSWER_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        raise _refused(url, _error_message(error)) from error
    except (OSError, http.client.HTTPException) as error:
        reason = f"no answer: {error}"
        raise ClusterError(
            f"endpoint {url}", reason, "must be up", "run the serve step, or check the address"
        ) from error


def _open(request: urllib.request.Request, timeout_s: float) -> http.client.HTTPResponse:
    """Send a request past any `http_proxy`, which could not reach a cluster's addresses."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    response: http.client.HTTPResponse = opener.open(request, timeout=timeout_s)
    return response


def _read_json(url: str, data: bytes) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(data)
    if "error" in content:
        raise _refused(url, content["error"]["message"])
    return content


def _error_message(error: urllib.error.HTTPError) -> str:
    data = error.read()
    try:
        return f"{error.code}: {json.loads(data)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code}: {data[:200].decode(errors='replace')}"


def _refused(url: str, reason: str) -> ClusterError:
    return ClusterError(f"endpoint {url}", reason, "must accept the request", "change the request as it says")
