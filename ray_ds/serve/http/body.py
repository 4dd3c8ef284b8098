"""Request bodies: read with a limit, parsed as strict JSON, checked in full before anything is done."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import pydantic
from fastapi import Request
from pydantic import BaseModel, ConfigDict

from ray_ds.serve.http.errors import ApiError


class Unsupported(NamedTuple):
    """A field of OpenAI's or vLLM's that would change the answer and is not understood here."""

    reason: str
    """Why, and what to do instead."""
    neutral: Sequence[Any] = ()
    """Values beside null that ask for nothing, and are let pass."""


class Body(BaseModel):
    """A request. Fields that nobody knows are ignored, as clients send many that mean nothing here."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow", use_attribute_docstrings=True)
    unsupported: ClassVar[Mapping[str, Unsupported]] = {}
    """Fields that are refused rather than ignored."""

    model: str | None = None
    """The served model's id; absent = whatever is served."""


AnyBody = TypeVar("AnyBody", bound=Body)


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


def parse_body(kind: type[AnyBody], data: bytes, served_model: str) -> AnyBody:
    """Return the checked body.

    Args:
        served_model: the only id that the field `model` may name.
    Raises:
        ApiError: 400, it is no JSON, has a field twice, or a field is wrong or unsupported; 404, it names another
            model.
    """
    try:
        body = kind.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise _bad_body(error) from None
    _refuse_doubles(data)
    for name, field in kind.unsupported.items():
        value = (body.model_extra or {}).get(name)
        if value is not None and value not in field.neutral:
            message = f"{name} is not supported: {field.reason}"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    check_model(body.model, served_model)
    return body


def check_model(model_id: str | None, served_model: str) -> None:
    """Refuse the id of a model that is not served.

    Raises:
        ApiError: 404.
    """
    if model_id is not None and model_id != served_model:
        message = f"the model {model_id[:100]!r} does not exist; this endpoint serves {served_model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _bad_body(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return ApiError(400, f"the body must be a JSON object: {first['msg']}")
    field = str(first["loc"][0])
    if field in ("prompt", "input") and first["type"] != "missing":
        return ApiError(400, f"{field} must be a string, strings, token ids or lists of token ids", param=field)
    path = ".".join(str(part) for part in first["loc"])
    return ApiError(400, f"{path}: {first['msg']}", param=field)


def _refuse_doubles(data: bytes) -> None:
    """Refuse JSON that names a field twice: which one counts would depend on who reads it.

    Args:
        data: valid JSON, so that numbers of any length need not be read.
    """
    json.loads(data, object_pairs_hook=_refuse_double_names, parse_int=str, parse_float=str)


def _refuse_double_names(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ApiError(400, f"the field {name[:100]!r} is there twice; leave one out", param=name[:100])
        seen.add(name)
