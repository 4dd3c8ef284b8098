"""`POST /v1/chat/completions`: messages become a prompt by the model's template, and the answer a message."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field

from ray_ds.errors import InputError
from ray_ds.serve.http.answers import Answers, Usage, send_answers
from ray_ds.serve.http.body import Unsupported
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.logprobs import ChatLogprobs, PromptLogprobs, chat_logprobs, prompt_logprobs
from ray_ds.serve.http.sampling import UNSUPPORTED, SamplingBody, make_requests
from ray_ds.serve.http.service import ChatPrompts, CompletionService, ServingTokenizer
from ray_ds.serve.http.submission import submit
from ray_ds.serve.requests import MAX_LOGPROBS, FinishReason, Piece, PromptScores

_NO_TOOLS = "answers are text and call nothing; describe the tools in a message and read the answer"
_TEMPLATE = "the model's own template writes the prompt, up to where the answer begins; use /v1/completions for another"


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message; other fields go to the template."""

    model_config = ConfigDict(strict=True, extra="allow", use_attribute_docstrings=True)
    role: str
    """A role of the model's template; `developer` is `system` where the template knows none."""
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    """A text, or parts that make one, a line each."""


class ChatBody(SamplingBody):
    """Messages, and how the next one is written."""

    unsupported = UNSUPPORTED | {
        "tools": Unsupported(_NO_TOOLS, ([],)),
        "tool_choice": Unsupported(_NO_TOOLS, ("none", "auto")),
        "functions": Unsupported(_NO_TOOLS, ([],)),
        "function_call": Unsupported(_NO_TOOLS, ("none", "auto")),
        "modalities": Unsupported("answers are text; leave it out", (["text"],)),
        "audio": Unsupported("answers are text; leave it out"),
        "chat_template": Unsupported(_TEMPLATE),
        "chat_template_kwargs": Unsupported(_TEMPLATE, ({},)),
        "documents": Unsupported(_TEMPLATE, ([],)),
        "add_generation_prompt": Unsupported(_TEMPLATE, (True,)),
        "continue_final_message": Unsupported(_TEMPLATE, (False,)),
        "echo": Unsupported(_TEMPLATE, (False,)),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    """The conversation so far."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """Most tokens of an answer; absent = as many as the model has room for."""
    max_tokens: int | None = Field(None, ge=1)
    """The older name of `max_completion_tokens`."""
    logprobs: bool | None = None
    """Whether each token comes with its log-probability."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """How many alternatives each token comes with; only with logprobs."""


class AnswerMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None


class ChatCompletion(BaseModel):
    """All answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new in a message: its role comes first, alone."""

    role: Literal["assistant"] | None = None
    content: str


class ChatChunkChoice(BaseModel):
    """A part of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """A chunk of a stream: a part of one choice, or none and the usage."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


async def answer_chat(request: Request, body: ChatBody, service: CompletionService) -> Response:
    """Answer with the conversation's next message."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    prompt = await encode_messages(body.messages, service)
    requests = make_requests(
        body,
        [prompt],
        service,
        field="messages",
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=body.top_logprobs or 0 if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    submission = await submit(service, request.state.caller, requests)
    layout = _Layout(service.tokenizer, body)
    return await send_answers(request, body, Answers(submission, service.card.model_id, body, requests, layout))


async def encode_messages(messages: Sequence[ChatMessage], service: CompletionService) -> tuple[int, ...]:
    """Return messages as the prompt that an answer follows.

    Raises:
        ApiError: 400, the model has no chat template, or that refuses the messages.
    """
    if service.chat is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
    return await asyncio.to_thread(_encode, service.chat, messages)


def _encode(chat: ChatPrompts, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
    try:
        return tuple(chat.encode_prompt([_plain(message, chat.template.source) for message in messages]))
    except InputError as error:
        raise ApiError(400, str(error), param="messages") from error


def _plain(message: ChatMessage, template: str) -> Mapping[str, Any]:
    """Return a message as templates read it: its content one string, its role one that the template may know."""
    fields = message.model_dump()
    if not isinstance(message.content, str):
        fields["content"] = "\n".join(part.text for part in message.content)
    if message.role == "developer" and "developer" not in template:
        fields["role"] = "system"
    return fields


class _Layout:
    """A `serve.http.answers.Layout`: messages."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    whole_type = ChatCompletion
    chunk_object = "chat.completion.chunk"
    chunk_type = ChatChunk

    def __init__(self, tokenizer: ServingTokenizer, body: ChatBody) -> None:
        self._tokenizer = tokenizer
        self._body = body

    def opening(self, index: int) -> ChatChunkChoice:
        delta = Delta(role="assistant", content="")
        return ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)

    def scored(self, index: int, scores: PromptScores) -> None:
        return None

    def part(self, index: int, piece: Piece) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=index,
            delta=Delta(content=piece.text),
            logprobs=self._logprobs([piece]),
            finish_reason=piece.finish_reason,
        )

    def whole(self, index: int, scores: PromptScores | None, pieces: Sequence[Piece]) -> ChatChoice:
        text = "".join(piece.text for piece in pieces)
        choice = ChatChoice(
            index=index,
            message=AnswerMessage(role="assistant", content=text),
            logprobs=self._logprobs(pieces),
            finish_reason=pieces[-1].finish_reason,
        )
        if scores is not None:
            choice.prompt_logprobs = prompt_logprobs(self._tokenizer, scores.logprobs)
        return choice

    def _logprobs(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._tokenizer, [entry for piece in pieces for entry in piece.logprobs])
