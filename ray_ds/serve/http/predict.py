"""`POST /predict`: a text in, a text out, for those who need no more."""

from fastapi import Request, Response
from pydantic import BaseModel, Field

from ray_ds.serve.http.answers import send_whole
from ray_ds.serve.http.body import Body
from ray_ds.serve.http.chat import ChatMessage, encode_messages
from ray_ds.serve.http.prompts import encode_prompts
from ray_ds.serve.http.sampling import SamplingBody, make_requests
from ray_ds.serve.http.service import CompletionService
from ray_ds.serve.http.submission import Submission, submit
from ray_ds.serve.requests import Piece


class PredictBody(Body):
    """A text."""

    text: str
    """A user's message where the model has a chat template, else what the model is to go on with."""
    max_tokens: int = Field(64, ge=1)
    """Most tokens of the prediction."""


class Prediction(BaseModel):
    """What the model writes, always the likeliest token."""

    prediction: str


async def predict(request: Request, body: PredictBody, service: CompletionService) -> Response:
    """Answer with what the model makes of a text."""
    if service.chat is not None:
        prompt = await encode_messages([ChatMessage(role="user", content=body.text)], service)
    else:
        (prompt,) = await encode_prompts(body.text, service, field="text")
    sampling = SamplingBody.model_validate({"temperature": 0.0})
    requests = make_requests(
        sampling, [prompt], service, field="text", max_tokens=body.max_tokens, logprobs=None, prompt_logprobs=None
    )
    return await send_whole(request, _Prediction(await submit(service, request.state.caller, requests)))


class _Prediction:
    """A `serve.http.answers.Collectable`: one text."""

    def __init__(self, submission: Submission) -> None:
        self._submission = submission
        self.cancel = self._submission.cancel

    async def collect(self) -> Prediction:
        events = [event async for _, event in self._submission.events()]
        return Prediction(prediction="".join(event.text for event in events if isinstance(event, Piece)))
