"""What is served and how it does: health, version, models, metrics."""

from typing import Literal

from fastapi import Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel

from ray_ds import __version__
from ray_ds.serve.http.answers import json_response
from ray_ds.serve.http.body import check_model
from ray_ds.serve.http.service import CompletionService


class Health(BaseModel):
    """What `/health` says, with status 503 once the engine has failed."""

    status: Literal["ok", "failed"]
    reason: str | None
    """Why it has failed."""
    digest: str
    model: str
    model_digest: str
    kind: str
    integer_path: str | None
    has_chat_template: bool
    max_model_len: int
    num_running: int
    num_waiting: int
    num_tokens: int


class Version(BaseModel):
    """Of this package."""

    version: str


class Model(BaseModel):
    """OpenAI's model object, with vLLM's `max_model_len`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """The one model that is served."""

    object: Literal["list"]
    data: list[Model]


async def health(request: Request, service: CompletionService) -> Response:
    """Answer with what is served and whether it works."""
    card, stats, failure = service.card, service.engine.stats, service.engine.failure
    content = Health(
        status="ok" if failure is None else "failed",
        reason=failure,
        digest=card.digest,
        model=card.model_id,
        model_digest=card.model_digest,
        kind=card.kind,
        integer_path=card.integer_path,
        has_chat_template=service.chat is not None,
        max_model_len=service.engine.max_model_len,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_tokens=stats.num_tokens,
    )
    return json_response(content, 200 if failure is None else 503)


async def version(request: Request, service: CompletionService) -> Response:
    """Answer with the package's version."""
    return json_response(Version(version=__version__))


async def metrics(request: Request, service: CompletionService) -> Response:
    """Answer with this replica's figures for Prometheus."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def list_models(request: Request, service: CompletionService) -> Response:
    """Answer with the served model, in a list."""
    return json_response(ModelList(object="list", data=[_model(service)]))


async def get_model(request: Request, service: CompletionService) -> Response:
    """Answer with the served model."""
    check_model(request.path_params["model_id"], service.card.model_id)
    return json_response(_model(service))


def _model(service: CompletionService) -> Model:
    return Model(
        id=service.card.model_id,
        object="model",
        created=service.card.created,
        owned_by="ray_ds",
        max_model_len=service.engine.max_model_len,
    )
