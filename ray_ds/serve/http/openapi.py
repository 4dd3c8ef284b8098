"""The OpenAPI document: routes read their own bodies, so what they take and answer is described here."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ray_ds.serve.http.errors import ErrorAnswer

KEY_SCHEME = "api_key"
ERRORS = {
    400: "The request is wrong; the message says what to change.",
    404: "The endpoint serves another model.",
    413: "The body is too long.",
    429: "There is no room for more requests now; `Retry-After` says when to come back.",
    500: "The engine could not finish.",
    503: "The engine has stopped.",
}
_TEMPLATE = "#/components/schemas/{model}"


def describe(
    *,
    answer: type[BaseModel] | None,
    body: type[BaseModel] | None = None,
    errors: Sequence[int] = (),
    chunk: type[BaseModel] | None = None,
    needs_key: bool = False,
    path_parameter: str | None = None,
) -> Mapping[str, Any]:
    """Return what FastAPI's route decorators are told for the document.

    Args:
        answer: None = plain text.
        chunk: what each event of a stream holds; told as `itemSchema`, as FastAPI tells streams.
        errors: keys of `ERRORS`.
    """
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}} if answer is None else {}
    if chunk is not None:
        text = f"JSON of a {chunk.__name__}, or of an ErrorAnswer where the engine fails; in the last event `[DONE]`."
        event = {
            "type": "object",
            "properties": {"data": {"type": "string", "description": text}},
            "required": ["data"],
        }
        content["text/event-stream"] = {"itemSchema": event}
    success: dict[str, Any] = {"description": "The answer.", "content": content}
    if answer is not None:
        success["model"] = answer
    responses: dict[int, dict[str, Any]] = {200: success}
    responses |= {status: {"model": ErrorAnswer, "description": ERRORS[status]} for status in errors}
    extra: dict[str, Any] = {}
    if needs_key:
        responses[401] = {"model": ErrorAnswer, "description": "The API key is missing or wrong."}
        extra["security"] = [{KEY_SCHEME: []}]
    if body is not None:
        schema = {"$ref": _TEMPLATE.format(model=body.__name__)}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if path_parameter is not None:
        extra["parameters"] = [{"name": path_parameter, "in": "path", "required": True, "schema": {"type": "string"}}]
    return {"responses": responses, "openapi_extra": extra}


def install_openapi(app: FastAPI, models: Sequence[type[BaseModel]]) -> None:
    """Make `/openapi.json` say what the routes take, too.

    Args:
        models: bodies of requests and chunks of streams.
    """
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(get_openapi(title=app.title, version=app.version, routes=app.routes))
            _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_TEMPLATE)
            components = document.setdefault("components", {})
            components["schemas"] = definitions["$defs"] | components.get("schemas", {})
            components["securitySchemes"] = {KEY_SCHEME: {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]
