"""A completion request's body: read with a limit, checked in full, turned into what the engine takes."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

import pydantic
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.service import CompletionService
from ray_ds.serve.requests import MAX_LOGPROBS, GenerationRequest, SamplingParams

DEFAULT_MAX_TOKENS = 16
"""As in OpenAI's API."""

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Prompt = str | list[str] | list[int] | list[list[int]]


class StreamOptions(BaseModel):
    """What a stream is to hold beside text."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class CompletionBody(BaseModel):
    """The fields that are understood; others are ignored, as clients send many that mean nothing here."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = None
    prompt: Prompt
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    n: int | None = Field(None, ge=1)
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    # Understood by OpenAI, not here: refused unless neutral, for they would change the answer.
    best_of: int | None = None
    suffix: str | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def stop_strings(self) -> tuple[str, ...]:
        """Return the stop strings, however they were given."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body.

    Raises:
        ApiError: 413, it is longer than `max_bytes`.
    """
    data = bytearray()
    async for block in request.stream():
        data += block
        if len(data) > max_bytes:
            raise ApiError(413, f"the body is longer than {max_bytes} bytes", code="request_too_large")
    return bytes(data)


def parse_body(data: bytes) -> CompletionBody:
    """Return the checked body.

    Raises:
        ApiError: 400, it is no JSON or a field is wrong.
    """
    try:
        body = CompletionBody.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise _bad_body(error) from None
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "logprobs of an echoed prompt are not supported; leave out echo", param="echo")
    _refuse_unsupported(body)
    return body


def _bad_body(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if not path:
        return ApiError(400, f"the body must be a JSON object: {first['msg']}")
    if path[0] == "prompt" and first["type"] != "missing":
        return ApiError(400, "prompt must be a string, strings, token ids or lists of token ids", param="prompt")
    return ApiError(400, f"{path[0]}: {first['msg']}", param=path[0])


def _refuse_unsupported(body: CompletionBody) -> None:
    neutral: dict[str, Sequence[Any]] = {
        "best_of": (None, body.n or 1),
        "suffix": (None, ""),
        "logit_bias": (None, {}),
        "presence_penalty": (None, 0),
        "frequency_penalty": (None, 0),
    }
    for name, values in neutral.items():
        if getattr(body, name) not in values:
            raise ApiError(400, f"{name} is not supported; leave it out", param=name, code="unsupported_parameter")


async def make_requests(body: CompletionBody, service: CompletionService) -> list[GenerationRequest]:
    """Return a request for each prompt and each of its `n` answers, in the order of OpenAI's choice indices.

    Raises:
        ApiError: 400, a prompt is empty, too long for the model or holds unknown ids, or there are too many.
    """
    n = body.n or 1
    texts = [body.prompt] if isinstance(body.prompt, str) or _is_ids(body.prompt) else body.prompt
    if not texts:
        raise ApiError(400, "prompt must hold at least one prompt", param="prompt")
    if len(texts) * n > service.engine.max_open:
        message = f"{len(texts)} prompts with n = {n} are more than the {service.engine.max_open} answers held at once"
        raise ApiError(400, message, param="n" if n > 1 else "prompt")
    max_tokens = body.max_tokens or DEFAULT_MAX_TOKENS
    requests: list[GenerationRequest] = []
    for text in texts:
        # Tokenizing a long text takes a while, in which other answers must go on.
        prompt = await asyncio.to_thread(_tokenize, text, service)
        _check_length(len(prompt), max_tokens, service.engine.max_model_len)
        for _ in range(n):
            requests.append(GenerationRequest(prompt=prompt, params=_params(body, max_tokens, len(requests))))
    return requests


def _is_ids(prompt: Prompt) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


def _tokenize(prompt: Any, service: CompletionService) -> tuple[int, ...]:
    """Return a prompt's ids. A text starts with BOS where documents did in training; ids are taken as they are."""
    tokenizer = service.tokenizer
    if isinstance(prompt, str):
        return tuple(tokenizer.encode_prompt(prompt))
    if not prompt:
        raise ApiError(400, "prompt must hold at least one token id", param="prompt")
    unknown = next((token for token in prompt if not 0 <= token < tokenizer.vocab_size), None)
    if unknown is not None:
        raise ApiError(400, f"token id {unknown} is not in 0..{tokenizer.vocab_size - 1}", param="prompt")
    return tuple(prompt)


def _check_length(num_prompt: int, max_tokens: int, limit: int) -> None:
    if num_prompt + max_tokens > limit:
        message = (
            f"the model holds {limit} tokens; the prompt has {num_prompt} and max_tokens asks for {max_tokens}, "
            f"together {num_prompt + max_tokens}. Shorten the prompt or lower max_tokens."
        )
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")


def _params(body: CompletionBody, max_tokens: int, index: int) -> SamplingParams:
    """Return how the answer of one choice is sampled; with a seed it depends on that and the choice's index alone."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
        seed=None if body.seed is None else f"{body.seed}/{index}",
        stop=body.stop_strings(),
        logprobs=body.logprobs,
    )
