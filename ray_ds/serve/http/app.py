"""The routes, and what happens to every request before its route: the gate, the body's length, its fields."""

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from ray_ds import __version__
from ray_ds.serve.http import status
from ray_ds.serve.http.body import Body, parse_body, read_body
from ray_ds.serve.http.chat import ChatBody, ChatChunk, ChatCompletion, answer_chat
from ray_ds.serve.http.completions import Completion, CompletionBody, complete
from ray_ds.serve.http.embeddings import EmbeddingAnswer, EmbeddingBody, embed
from ray_ds.serve.http.errors import install_error_handlers
from ray_ds.serve.http.gate import Gate, is_open
from ray_ds.serve.http.openapi import describe, install_openapi
from ray_ds.serve.http.page import add_page
from ray_ds.serve.http.predict import PredictBody, Prediction, predict
from ray_ds.serve.http.service import CompletionService
from ray_ds.serve.http.tokens import (
    DetokenizeBody,
    DetokenizedText,
    TokenizeBody,
    TokenizerInfo,
    Tokens,
    detokenize,
    tokenize,
    tokenizer_info,
)

Ask = Callable[[Request, CompletionService], Awaitable[Response]]
Answer = Callable[[Request, Any, CompletionService], Awaitable[Response]]


class Get(NamedTuple):
    """A route without a body."""

    path: str
    handler: Ask
    answer: type[BaseModel] | None
    """None = plain text."""
    errors: tuple[int, ...] = ()
    path_parameter: str | None = None


class Post(NamedTuple):
    """A route with a JSON body."""

    path: str
    handler: Answer
    body: type[Body]
    answer: type[BaseModel]
    chunk: type[BaseModel] | None = None
    uses_engine: bool = True


GETS = (
    Get("/health", status.health, status.Health),
    Get("/ping", status.health, status.Health),
    Get("/version", status.version, status.Version),
    Get("/metrics", status.metrics, None),
    Get("/v1/models", status.list_models, status.ModelList),
    Get("/v1/models/{model_id:path}", status.get_model, status.Model, errors=(404,), path_parameter="model_id"),
    Get("/tokenizer_info", tokenizer_info, TokenizerInfo),
)
POSTS = (
    Post("/v1/completions", complete, CompletionBody, Completion, chunk=Completion),
    Post("/v1/chat/completions", answer_chat, ChatBody, ChatCompletion, chunk=ChatChunk),
    Post("/v1/embeddings", embed, EmbeddingBody, EmbeddingAnswer),
    Post("/predict", predict, PredictBody, Prediction),
    Post("/tokenize", tokenize, TokenizeBody, Tokens, uses_engine=False),
    Post("/detokenize", detokenize, DetokenizeBody, DetokenizedText, uses_engine=False),
)


def build_app(service: CompletionService) -> FastAPI:
    """Return the ASGI application that serves one model."""
    app = FastAPI(title="ray_ds", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    install_error_handlers(app)
    app.add_middleware(Gate, access=service.access)
    for get in GETS:
        _add_get(app, get, service)
    for post in POSTS:
        _add_post(app, post, service)
    add_page(app)
    install_openapi(app, [*(post.body for post in POSTS), ChatChunk])
    return app


def _add_get(app: FastAPI, get: Get, service: CompletionService) -> None:
    needs_key = service.access.keys is not None and not is_open(get.path)

    async def route(request: Request) -> Response:
        return await get.handler(request, service)

    documented = describe(answer=get.answer, errors=get.errors, needs_key=needs_key, path_parameter=get.path_parameter)
    app.get(get.path, name=get.handler.__name__, description=get.handler.__doc__, **documented)(route)


def _add_post(app: FastAPI, post: Post, service: CompletionService) -> None:
    async def route(request: Request) -> Response:
        data = await read_body(request, service.max_body_bytes)
        body = parse_body(post.body, data, service.card.model_id)
        return await post.handler(request, body, service)

    documented = describe(
        answer=post.answer,
        body=post.body,
        errors=(400, 404, 413, 429, 500, 503) if post.uses_engine else (400, 404, 413),
        chunk=post.chunk,
        needs_key=service.access.keys is not None,
    )
    app.post(post.path, name=post.handler.__name__, description=post.handler.__doc__, **documented)(route)
