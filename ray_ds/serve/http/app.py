"""The routes: health, the models, and completions and chats as JSON or server-sent events."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from ray_ds.serve.http.answers import Answers
from ray_ds.serve.http.body import make_requests, parse_body, read_body
from ray_ds.serve.http.chat import ChatAnswers, as_completion, parse_chat
from ray_ds.serve.http.errors import ApiError, install_error_handlers
from ray_ds.serve.http.gate import Gate
from ray_ds.serve.http.service import CompletionService, ModelCard

CLIENT_CLOSED_REQUEST = 499
"""What servers log where a client left before its answer; nobody reads it."""


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


def build_app(service: CompletionService) -> FastAPI:
    """Return the ASGI application that serves one model."""
    app = FastAPI(title="ray_ds", docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app)
    app.add_middleware(Gate, access=service.access)

    @app.get("/health")
    async def health() -> Response:
        failure = service.engine.failure
        content = _health(service) | ({"status": "ok"} if failure is None else {"status": "failed", "reason": failure})
        return JSONResponse(content, 200 if failure is None else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        _check_model(model_id, service.card)
        return JSONResponse(_model(service))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse_body(await read_body(request, service.max_body_bytes))
        if body.model is not None:
            _check_model(body.model, service.card)
        requests = await make_requests(body, service)
        await request.state.caller.admit(requests)
        answers = Answers(service, body, requests, request.state.caller)
        return EventStream(answers) if body.stream else await _collect(request, answers)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = parse_chat(await read_body(request, service.max_body_bytes))
        if body.model is not None:
            _check_model(body.model, service.card)
        completion, requests = await as_completion(body, service)
        await request.state.caller.admit(requests)
        answers = ChatAnswers(service, completion, requests, request.state.caller)
        return EventStream(answers) if body.stream else await _collect(request, answers)

    return app


def _check_model(model_id: str, card: ModelCard) -> None:
    if model_id != card.model_id:
        message = f"the model {model_id[:100]!r} does not exist; this endpoint serves {card.model_id!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _health(service: CompletionService) -> dict[str, Any]:
    card, stats = service.card, service.engine.stats
    return {
        "digest": card.digest,
        "model": card.model_id,
        "model_digest": card.model_digest,
        "kind": card.kind,
        "integer_path": card.integer_path,
        "has_chat_template": service.chat is not None,
        "max_model_len": service.engine.max_model_len,
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "num_tokens": stats.num_tokens,
    }


def _model(service: CompletionService) -> dict[str, Any]:
    return {
        "id": service.card.model_id,
        "object": "model",
        "created": service.card.created,
        "owned_by": "ray_ds",
        "max_model_len": service.engine.max_model_len,
    }


async def _collect(request: Request, answers: Answers) -> Response:
    """Return the whole answer, unless the client leaves before it is there."""
    work = asyncio.ensure_future(answers.collect())
    left = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(work.result()) if work.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        answers.cancel()
        work.cancel()
        left.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
