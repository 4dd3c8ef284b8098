"""`POST /v1/embeddings`: texts as vectors of length 1, whose inner product says how alike they are."""

import array
import base64
import sys
from collections.abc import Sequence
from typing import ClassVar, Literal

from fastapi import Request, Response
from pydantic import BaseModel

from ray_ds.serve.http.answers import send_whole
from ray_ds.serve.http.body import Body, Unsupported
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.prompts import Prompt, encode_prompts
from ray_ds.serve.http.service import CompletionService
from ray_ds.serve.http.submission import Submission, submit
from ray_ds.serve.requests import Embedding, EmbeddingRequest


class EmbeddingBody(Body):
    """What is to become vectors."""

    unsupported: ClassVar = {
        "dimensions": Unsupported("the model's vectors have one length and mean nothing when cut; leave it out"),
        "truncate_prompt_tokens": Unsupported("a text is read whole or refused; shorten it"),
    }

    input: Prompt
    """A text, texts, token ids, or lists of token ids."""
    encoding_format: Literal["float", "base64"] = "float"
    """Numbers, or the bytes of little-endian fp32 numbers in base64."""


class EmbeddingData(BaseModel):
    """One text's vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    """A vector for each text, in the texts' order."""

    object: Literal["list"]
    data: list[EmbeddingData]
    model: str
    usage: EmbeddingUsage


async def embed(request: Request, body: EmbeddingBody, service: CompletionService) -> Response:
    """Answer with a vector for each text."""
    prompts = await encode_prompts(body.input, service, field="input")
    limit, max_open = service.engine.max_model_len, service.engine.max_open
    if len(prompts) > max_open:
        message = f"{len(prompts)} inputs are more than the {max_open} held at once; send fewer"
        raise ApiError(400, message, param="input")
    longest = max(map(len, prompts))
    if longest > limit:
        message = f"the model holds {limit} tokens; an input has {longest}; shorten it"
        raise ApiError(400, message, param="input", code="context_length_exceeded")
    requests = [EmbeddingRequest(prompt=prompt) for prompt in prompts]
    submission = await submit(service, request.state.caller, requests)
    return await send_whole(request, _Vectors(submission, service.card.model_id, body, prompts))


class _Vectors:
    """A `serve.http.answers.Collectable`: the vectors of one request."""

    def __init__(
        self, submission: Submission, model_id: str, body: EmbeddingBody, prompts: Sequence[tuple[int, ...]]
    ) -> None:
        self._submission = submission
        self._model_id = model_id
        self._encoding_format = body.encoding_format
        self._num_tokens = sum(map(len, prompts))
        self.cancel = self._submission.cancel

    async def collect(self) -> EmbeddingAnswer:
        vectors: dict[int, Sequence[float]] = {}
        async for index, event in self._submission.events():
            assert isinstance(event, Embedding)
            vectors[index] = event.values
        return EmbeddingAnswer(
            object="list",
            data=[
                EmbeddingData(object="embedding", index=index, embedding=self._encoded(vectors[index]))
                for index in range(len(vectors))
            ],
            model=self._model_id,
            usage=EmbeddingUsage(prompt_tokens=self._num_tokens, total_tokens=self._num_tokens),
        )

    def _encoded(self, values: Sequence[float]) -> list[float] | str:
        if self._encoding_format == "float":
            return list(values)
        numbers = array.array("f", values)
        if sys.byteorder == "big":
            numbers.byteswap()
        return base64.b64encode(numbers.tobytes()).decode()
