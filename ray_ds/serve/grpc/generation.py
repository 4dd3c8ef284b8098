"""What answers the gRPC methods: a completion's checks, engine and metrics, without HTTP."""

import json
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import grpc  # type: ignore[import-untyped]

from ray_ds.serve.grpc.messages import GenerateReply, HealthReply
from ray_ds.serve.http.access import Caller
from ray_ds.serve.http.body import parse_body
from ray_ds.serve.http.completions import CompletionBody
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.prompts import encode_prompts
from ray_ds.serve.http.sampling import make_requests
from ray_ds.serve.http.service import CompletionService
from ray_ds.serve.http.submission import submit
from ray_ds.serve.requests import GenerationRequest, Piece

STATUS_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""What HTTP's statuses are called here; all others are INTERNAL."""

Metadata = Iterable[tuple[str, str | bytes]]
"""A call's metadata; `authorization` holds `Bearer KEY`, as in HTTP."""


async def generate(service: CompletionService, request: Any, metadata: Metadata) -> Any:
    """Return the whole answer to a `GenerateRequest`.

    Raises:
        ApiError: as `/v1/completions`.
    """
    replies = [reply async for reply in generate_stream(service, request, metadata)]
    whole = GenerateReply()
    whole.CopyFrom(replies[-1])
    whole.text = "".join(reply.text for reply in replies)
    return whole


async def generate_stream(service: CompletionService, request: Any, metadata: Metadata) -> AsyncGenerator[Any]:
    """Yield the answer to a `GenerateRequest` as it is written; whoever stops listening ends it.

    Raises:
        ApiError: as `/v1/completions`.
    """
    caller = await service.access.identify(_authorization(metadata))
    try:
        async for reply in _answer(service, caller, await _make_request(service, request)):
            yield reply
    finally:
        caller.settle()


async def _answer(service: CompletionService, caller: Caller, generation: GenerationRequest) -> AsyncGenerator[Any]:
    submission = await submit(service, caller, [generation])
    num_tokens = 0
    try:
        async for _, piece in submission.events():
            assert isinstance(piece, Piece)
            num_tokens += piece.num_tokens
            reply = GenerateReply(text=piece.text)
            if piece.finish_reason is not None:
                reply.finish_reason = piece.finish_reason
                reply.prompt_tokens = len(generation.prompt)
                reply.completion_tokens = num_tokens
                reply.cached_tokens = piece.num_cached_tokens
            yield reply
    finally:
        submission.cancel()


def health(service: CompletionService) -> Any:
    """Return a `HealthReply`; like `/health` it needs no key."""
    failure = service.engine.failure
    reply = HealthReply(is_ready=failure is None, model=service.card.model_id, digest=service.card.digest)
    if failure is not None:
        reply.reason = failure
    return reply


def status_code(error: ApiError) -> grpc.StatusCode:
    """Return what an error is called here."""
    return STATUS_CODES.get(error.status, grpc.StatusCode.INTERNAL)


async def _make_request(service: CompletionService, request: Any) -> GenerationRequest:
    fields = {
        field.name: value if isinstance(value, str | int | float) else list(value)
        for field, value in request.ListFields()
    }
    if "prompt_token_ids" in fields:
        if "prompt" in fields:
            raise ApiError(400, "send either prompt or prompt_token_ids", param="prompt")
        fields["prompt"] = fields.pop("prompt_token_ids")
    data = json.dumps(fields).encode()
    if len(data) > service.max_body_bytes:
        raise ApiError(413, f"the request is longer than {service.max_body_bytes} bytes", code="request_too_large")
    body = parse_body(CompletionBody, data, service.card.model_id)
    if body.max_tokens == 0:
        raise ApiError(400, "max_tokens must be at least 1; raise it", param="max_tokens")
    prompts = await encode_prompts(body.prompt, service, field="prompt")
    (generation,) = make_requests(
        body, prompts, service, field="prompt", max_tokens=body.max_tokens, logprobs=None, prompt_logprobs=None
    )
    return generation


def _authorization(metadata: Metadata) -> str | None:
    found = next((value for name, value in metadata if name.lower() == "authorization"), None)
    return found.decode(errors="replace") if isinstance(found, bytes) else found
