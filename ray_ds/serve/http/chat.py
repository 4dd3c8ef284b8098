"""Chat completions: messages become a prompt by the model's template, and answers messages."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from ray_ds.errors import InputError
from ray_ds.serve.http.access import Caller
from ray_ds.serve.http.answers import Answers
from ray_ds.serve.http.body import CompletionBody, StopString, StreamOptions, make_requests
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.service import ChatPrompts, CompletionService
from ray_ds.serve.requests import GenerationRequest, TokenLogprobs


class ChatMessage(BaseModel):
    """One message; other fields go to the template."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: str
    content: str


class ChatBody(BaseModel):
    """The fields that are understood; others are ignored, as with completions."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    n: int | None = Field(None, ge=1)
    seed: int | None = None
    stop: StopString | list[StopString] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


def parse_chat(data: bytes) -> ChatBody:
    """Return the checked body.

    Raises:
        ApiError: 400, it is no JSON or a field is wrong.
    """
    try:
        return ChatBody.model_validate_json(data)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{path or 'the body'}: {first['msg']}", param=path or None) from None


async def as_completion(
    body: ChatBody, service: CompletionService
) -> tuple[CompletionBody, Sequence[GenerationRequest]]:
    """Return a chat as a completion whose prompt is the rendered messages; an answer may fill what is left.

    Raises:
        ApiError: 400, the model has no chat template, or that refuses the messages, or they are too long.
    """
    if service.chat is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
    prompt = await asyncio.to_thread(_encode, service.chat, [message.model_dump() for message in body.messages])
    left = max(1, service.engine.max_model_len - len(prompt))
    given = body.model_dump(exclude={"messages", "max_tokens", "max_completion_tokens"}, exclude_none=True)
    max_tokens = body.max_completion_tokens or body.max_tokens or left
    completion = CompletionBody.model_validate({**given, "prompt": prompt, "max_tokens": max_tokens})
    return completion, await make_requests(completion, service)


def _encode(chat: ChatPrompts, messages: Sequence[dict[str, Any]]) -> list[int]:
    try:
        return chat.encode_prompt(messages)
    except InputError as error:
        raise ApiError(400, str(error), param="messages") from error


class ChatAnswers(Answers):
    """The answers to one chat request."""

    def __init__(
        self, service: CompletionService, body: CompletionBody, requests: Sequence[GenerationRequest], caller: Caller
    ) -> None:
        super().__init__(service, body, requests, caller)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = {**self._head, "id": f"chat{self._head['id']}", "object": kind}

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprobs], finish_reason: str | None
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "delta" if self.body.stream else "message": message, "finish_reason": finish_reason}
