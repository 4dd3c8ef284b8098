"""Answers to one HTTP request, whole or as server-sent events; what they look like is a layout's matter."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.sampling import SamplingBody
from ray_ds.serve.http.submission import Submission
from ray_ds.serve.requests import GenerationRequest, Piece, PromptScores

CLIENT_CLOSED_REQUEST = 499
"""What servers log where a client left before its answer; nobody reads it."""


class PromptTokensDetails(BaseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int
    """Those that were found in the cache and not computed."""


class Usage(BaseModel):
    """Tokens of all prompts and answers of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Layout(Protocol):
    """How one API writes choices, each by its index."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    @property
    def whole_type(self) -> type[BaseModel]:
        """What whole answers are."""

    @property
    def chunk_type(self) -> type[BaseModel]:
        """What the chunks of a stream are."""

    def opening(self, index: int) -> BaseModel | None:
        """Return what a stream starts a choice with, if it needs nothing of the engine."""

    def scored(self, index: int, scores: PromptScores) -> BaseModel | None:
        """Return what a stream says when the prompt's log-probabilities are there."""

    def part(self, index: int, piece: Piece) -> BaseModel:
        """Return what a stream says of a piece."""

    def whole(self, index: int, scores: PromptScores | None, pieces: Sequence[Piece]) -> BaseModel:
        """Return a choice that is not streamed."""


class Answers:
    """The answers to one HTTP request: all of its prompts, `n` times each."""

    def __init__(
        self,
        submission: Submission,
        model_id: str,
        body: SamplingBody,
        requests: Sequence[GenerationRequest],
        layout: Layout,
    ) -> None:
        self._submission = submission
        self._layout = layout
        self._num_choices = len(requests)
        self._num_answers = body.num_answers
        self._has_stream_usage = body.has_stream_usage
        self._num_prompt_tokens = sum(len(request.prompt) for request in requests[:: body.num_answers])
        self._num_completion_tokens = 0
        self._num_cached_tokens = 0
        self._head: dict[str, Any] = {
            "id": f"{layout.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_id,
        }

    def cancel(self) -> None:
        """Free what is left in the engine."""
        self._submission.cancel()

    async def _events(self) -> AsyncIterator[tuple[int, Piece | PromptScores]]:
        """Yield what the engine says, counted."""
        async for index, event in self._submission.events():
            assert isinstance(event, Piece | PromptScores)
            if isinstance(event, Piece):
                self._num_completion_tokens += event.num_tokens
                if event.finish_reason is not None and index % self._num_answers == 0:
                    self._num_cached_tokens += event.num_cached_tokens
            yield index, event

    async def collect(self) -> BaseModel:
        """Return the whole answer."""
        scores: dict[int, PromptScores] = {}
        pieces: list[list[Piece]] = [[] for _ in range(self._num_choices)]
        async for index, event in self._events():
            if isinstance(event, Piece):
                pieces[index].append(event)
            else:
                scores[index] = event
        layout = self._layout
        choices = [layout.whole(index, scores.get(index), own) for index, own in enumerate(pieces)]
        return layout.whole_type(object=layout.whole_object, **self._head, choices=choices, usage=self._usage())

    async def server_sent_events(self) -> AsyncIterator[str]:
        """Yield the answer as `data:` lines, then `[DONE]`; an error ends the stream as an error object."""
        no_usage: dict[str, Any] = {"usage": None} if self._has_stream_usage else {}
        try:
            async for choice in self._stream_choices():
                yield self._data([choice], **no_usage)
        except ApiError as error:
            yield f"data: {error.json()}\n\n"
            return
        if self._has_stream_usage:
            yield self._data([], usage=self._usage())
        yield "data: [DONE]\n\n"

    async def _stream_choices(self) -> AsyncIterator[BaseModel]:
        layout = self._layout
        openings = [layout.opening(index) for index in range(self._num_choices)]
        for choice in filter(None, openings):
            yield choice
        async for index, event in self._events():
            if isinstance(event, Piece):
                yield layout.part(index, event)
            elif (echo := layout.scored(index, event)) is not None:
                yield echo

    def _data(self, choices: Sequence[BaseModel], **usage: Usage | None) -> str:
        layout = self._layout
        chunk = layout.chunk_type(object=layout.chunk_object, **self._head, choices=choices, **usage)
        # ASCII, since some clients take U+2028 and U+0085 for the end of a line.
        return f"data: {chunk.model_dump_json(ensure_ascii=True, exclude_unset=True)}\n\n"

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_completion_tokens,
            total_tokens=self._num_prompt_tokens + self._num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._num_cached_tokens),
        )


class EventStream(StreamingResponse):
    """A stream whose answers end with it, also where the client leaves before the first line."""

    def __init__(self, answers: Answers) -> None:
        super().__init__(
            answers.server_sent_events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; then, whatever ended it, free what is left."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def send_answers(request: Request, body: SamplingBody, answers: Answers) -> Response:
    """Return the answers as they were asked for: streamed, or whole unless the client leaves before they are there."""
    return EventStream(answers) if body.stream else await send_whole(request, answers)


class Collectable(Protocol):
    """Work in the engine that ends in one JSON object."""

    async def collect(self) -> BaseModel:
        """Return it."""

    def cancel(self) -> None:
        """Free what is left in the engine."""


async def send_whole(request: Request, answers: Collectable) -> Response:
    """Return the whole answer, unless the client leaves before it is there."""
    work = asyncio.ensure_future(answers.collect())
    left = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        return json_response(work.result()) if work.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        answers.cancel()
        work.cancel()
        left.cancel()


def json_response(content: BaseModel, status: int = 200) -> Response:
    """Return JSON with the fields that were set, null ones among them."""
    return Response(content.model_dump_json(exclude_unset=True), status, media_type="application/json")


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
