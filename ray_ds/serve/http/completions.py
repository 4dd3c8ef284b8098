"""`POST /v1/completions`: a prompt goes on."""

from collections.abc import Sequence
from typing import Literal

from fastapi import Request, Response
from pydantic import BaseModel, Field

from ray_ds.serve.http.answers import Answers, Usage, send_answers
from ray_ds.serve.http.body import Unsupported
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.logprobs import (
    CompletionLogprobs,
    PromptLogprobs,
    completion_logprobs,
    echo_logprobs,
    join_logprobs,
    prompt_logprobs,
)
from ray_ds.serve.http.prompts import Prompt, encode_prompts
from ray_ds.serve.http.sampling import UNSUPPORTED, SamplingBody, make_requests
from ray_ds.serve.http.service import CompletionService
from ray_ds.serve.http.submission import submit
from ray_ds.serve.requests import MAX_LOGPROBS, FinishReason, GenerationRequest, Piece, PromptScores


class CompletionBody(SamplingBody):
    """A prompt, and how it goes on."""

    unsupported = UNSUPPORTED | {"suffix": Unsupported("the model does not write what comes before a text", ("",))}

    prompt: Prompt
    """A text, texts, token ids, or lists of token ids."""
    max_tokens: int | None = Field(16, ge=0)
    """Most tokens of an answer; null = as many as the model has room for. 0 only with echo: the prompt alone."""
    echo: bool | None = None
    """Whether the prompt comes before the answer."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """How many alternatives each token comes with, the prompt's tokens too where it is echoed."""
    add_special_tokens: bool = True
    """Whether a text starts with BOS where documents did in training."""


class CompletionChoice(BaseModel):
    """One answer, or a part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None
    """Where the request asked for them by this name."""


class Completion(BaseModel):
    """All answers, or a chunk of a stream, which has one choice, or none and the usage."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


async def complete(request: Request, body: CompletionBody, service: CompletionService) -> Response:
    """Answer with what the prompts go on with."""
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens: 0 needs echo: true; raise it", param="max_tokens")
    prompts = await encode_prompts(body.prompt, service, field="prompt", add_special_tokens=body.add_special_tokens)
    asked = [count for count in (body.prompt_logprobs, _echo_logprobs(body)) if count is not None]
    requests = make_requests(
        body,
        prompts,
        service,
        field="prompt",
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=max(asked, default=None),
    )
    submission = await submit(service, request.state.caller, requests)
    layout = _Layout(service, body, requests)
    return await send_answers(request, body, Answers(submission, service.card.model_id, body, requests, layout))


def _echo_logprobs(body: CompletionBody) -> int | None:
    """Return how many alternatives an echoed prompt's tokens are asked for with."""
    if not body.echo:
        return None
    # Where nothing is to be written, scoring the prompt is all that the engine can do.
    return 0 if body.logprobs is None and body.max_tokens == 0 else body.logprobs


class _Layout:
    """A `serve.http.answers.Layout`: text, after the prompt where that is echoed."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"
    whole_type = chunk_type = Completion

    def __init__(self, service: CompletionService, body: CompletionBody, requests: Sequence[GenerationRequest]) -> None:
        self._tokenizer = service.tokenizer
        self._body = body
        self._prompts = [request.prompt for request in requests]
        self._echoes = [self._prompt_text(prompt) if body.echo else "" for prompt in self._prompts]

    def opening(self, index: int) -> CompletionChoice | None:
        if not self._echoes[index] or self._body.logprobs is not None:
            return None
        return CompletionChoice(index=index, text=self._echoes[index], logprobs=None, finish_reason=None)

    def scored(self, index: int, scores: PromptScores) -> CompletionChoice | None:
        if not self._body.echo or self._body.logprobs is None:
            return None
        text, logprobs = self._echoes[index], self._echo_logprobs(index, scores)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=None)

    def part(self, index: int, piece: Piece) -> CompletionChoice:
        logprobs = self._logprobs(index, [piece])
        return CompletionChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason)

    def whole(self, index: int, scores: PromptScores | None, pieces: Sequence[Piece]) -> CompletionChoice:
        text = self._echoes[index] + "".join(piece.text for piece in pieces)
        logprobs = self._logprobs(index, pieces)
        if logprobs is not None and scores is not None and self._body.echo:
            logprobs = join_logprobs(self._echo_logprobs(index, scores), logprobs)
        choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=pieces[-1].finish_reason)
        if self._body.prompt_logprobs is not None and scores is not None:
            choice.prompt_logprobs = prompt_logprobs(self._tokenizer, scores.logprobs)
        return choice

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        entries = [entry for piece in pieces for entry in piece.logprobs]
        return completion_logprobs(self._tokenizer, entries, offset=len(self._echoes[index]))

    def _echo_logprobs(self, index: int, scores: PromptScores) -> CompletionLogprobs:
        num_top = self._body.logprobs or 0
        return echo_logprobs(self._tokenizer, self._prompts[index], scores.logprobs, num_top=num_top)

    def _prompt_text(self, prompt: Sequence[int]) -> str:
        return b"".join(map(self._tokenizer.token_bytes, prompt)).decode("utf-8", errors="replace")
