"""Answers on their way from the engine's thread to the event loop, and what they look like in JSON."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray_ds.serve.engine import EngineStoppedError, QueueFullError
from ray_ds.serve.http.access import Caller
from ray_ds.serve.http.body import CompletionBody
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.service import CompletionService, ServingTokenizer
from ray_ds.serve.requests import Emit, Event, Failure, GenerationRequest, Piece, TokenLogprobs

RETRY_AFTER_S = 1
"""What a refused client is told to wait; answers end, and slots are freed, many times a second."""


class Answers:
    """The answers to one HTTP request: all of its prompts, `n` times each."""

    def __init__(
        self, service: CompletionService, body: CompletionBody, requests: Sequence[GenerationRequest], caller: Caller
    ) -> None:
        """Hand the requests, which the caller's limits have admitted, to the engine.

        Raises:
            ApiError: 429, the engine has no room for them; 503, it has stopped.
        """
        self.service = service
        self.body = body
        self._caller = caller
        self.num_choices = len(requests)
        self.num_prompt_tokens = sum(len(request.prompt) for request in requests[:: body.n or 1])
        self.num_completion_tokens = 0
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.card.model_id,
        }
        self._echoes = [_echo(service.tokenizer, request) if body.echo else "" for request in requests]
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        try:
            self._running = service.engine.submit(
                [(request, self._emitter(loop, index)) for index, request in enumerate(requests)]
            )
        except QueueFullError:
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            message = f"the server holds {service.engine.max_open} answers already; try again in {RETRY_AFTER_S} s"
            raise ApiError(429, message, type="rate_limit_error", code="queue_full", headers=headers) from None
        except EngineStoppedError as error:
            raise ApiError(503, str(error), type="server_error", code="engine_stopped") from None

    def _emitter(self, loop: asyncio.AbstractEventLoop, index: int) -> Emit:
        def emit(event: Event) -> None:
            # A closed loop means that nobody can be waiting any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return emit

    def cancel(self) -> None:
        """Free what the answers hold in the engine; finished ones hold nothing."""
        self.service.engine.cancel(self._running)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (choice index, piece) as they come.

        Raises:
            ApiError: 500, the engine could not finish an answer.
        """
        num_open = self.num_choices
        while num_open:
            index, event = await self._queue.get()
            if isinstance(event, Failure):
                raise ApiError(500, event.message, type="server_error", code="engine_failure")
            assert isinstance(event, Piece), "completions ask for nothing else"
            self.num_completion_tokens += event.num_tokens
            self._caller.num_generated_tokens += event.num_tokens
            num_open -= event.finish_reason is not None
            yield index, event

    async def collect(self) -> dict[str, Any]:
        """Return the whole completion."""
        pieces: list[list[Piece]] = [[] for _ in range(self.num_choices)]
        async for index, piece in self.pieces():
            pieces[index].append(piece)
        choices = [
            self._choice(
                index,
                self._echoes[index] + "".join(piece.text for piece in own),
                [entry for piece in own for entry in piece.logprobs],
                own[-1].finish_reason,
            )
            for index, own in enumerate(pieces)
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def server_sent_events(self) -> AsyncIterator[str]:
        """Yield the completion as `data:` lines, then `[DONE]`; an error ends the stream as an error object."""
        options = self.body.stream_options
        has_usage = options is not None and options.include_usage
        no_usage = {"usage": None} if has_usage else {}
        try:
            for index, echo in enumerate(self._echoes):
                if echo:
                    yield _event({**self._head, "choices": [self._choice(index, echo, (), None)], **no_usage})
            async for index, piece in self.pieces():
                choice = self._choice(index, piece.text, piece.logprobs, piece.finish_reason)
                yield _event({**self._head, "choices": [choice], **no_usage})
        except ApiError as error:
            yield _event(error.body())
            return
        if has_usage:
            yield _event({**self._head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprobs], finish_reason: str | None
    ) -> dict[str, Any]:
        wanted = self.body.logprobs is not None
        return {
            "index": index,
            "text": text,
            "logprobs": _logprobs(self.service.tokenizer, logprobs) if wanted else None,
            "finish_reason": finish_reason,
        }

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
        }


def _event(content: dict[str, Any]) -> str:
    # ASCII, since some clients take U+2028 and U+0085 for the end of a line.
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def _echo(tokenizer: ServingTokenizer, request: GenerationRequest) -> str:
    return b"".join(map(tokenizer.token_bytes, request.prompt)).decode("utf-8", errors="replace")


def _logprobs(tokenizer: ServingTokenizer, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Return log-probabilities in the shape of OpenAI's completions API."""
    return {
        "tokens": [_token_text(tokenizer, entry.token) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{_token_text(tokenizer, token): value for token, value in entry.top} for entry in entries],
        "text_offset": [entry.text_offset for entry in entries],
    }


def _token_text(tokenizer: ServingTokenizer, token: int) -> str:
    """Return a token's text; the bytes of a part of a character are written as OpenAI does, `bytes:\\xe4\\xb8`."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode() if data else f"<|{token}|>"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
