"""The fields that say how answers are sampled, the same for completions and chats, under OpenAI's and vLLM's names."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ray_ds.serve.http.body import Body, Unsupported
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.prompts import check_token_ids
from ray_ds.serve.http.service import CompletionService
from ray_ds.serve.requests import MAX_LOGPROBS, GenerationRequest, SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]

_NO_GRAMMAR = "answers are not held to a grammar; ask for the form in the prompt and check the answer"
_NO_RANKING = "every answer that is sampled is returned; ask for n answers and choose"
_IN_FULL = "the answer's text is what its tokens say, without special tokens and stop strings; leave it out"
_NO_IDS = "answers hold texts, not ids; send the texts to /tokenize"

UNSUPPORTED = {
    "best_of": Unsupported(_NO_RANKING, (1,)),
    "use_beam_search": Unsupported(_NO_RANKING, (False,)),
    "length_penalty": Unsupported(_NO_RANKING, (1.0,)),
    "response_format": Unsupported(_NO_GRAMMAR, ({"type": "text"},)),
    "structured_outputs": Unsupported(_NO_GRAMMAR),
    "guided_json": Unsupported(_NO_GRAMMAR),
    "guided_regex": Unsupported(_NO_GRAMMAR),
    "guided_choice": Unsupported(_NO_GRAMMAR),
    "guided_grammar": Unsupported(_NO_GRAMMAR),
    "bad_words": Unsupported("forbid tokens by logit_bias -100", ([],)),
    "allowed_token_ids": Unsupported("forbid the other tokens by logit_bias -100"),
    "logits_processors": Unsupported("no code runs between logits and sampling; leave it out", ([],)),
    "include_stop_str_in_output": Unsupported(_IN_FULL, (False,)),
    "skip_special_tokens": Unsupported(_IN_FULL, (True,)),
    "truncate_prompt_tokens": Unsupported("a prompt is read whole or refused; shorten it"),
    "return_token_ids": Unsupported(_NO_IDS, (False,)),
    "return_tokens_as_token_ids": Unsupported(_NO_IDS, (False,)),
    "prompt_embeds": Unsupported("a prompt is text or token ids; leave it out"),
}


class StreamOptions(BaseModel):
    """What a stream is to hold beside text."""

    model_config = ConfigDict(strict=True, use_attribute_docstrings=True)
    include_usage: bool = False
    """Whether the last chunk counts tokens."""


class SamplingBody(Body):
    """How answers are sampled. Null is the same as leaving a field out."""

    temperature: float | None = Field(None, ge=0)
    """0 = always the likeliest token; absent = 1."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Choose among the likeliest tokens that together have this probability."""
    top_k: int | None = Field(None, ge=-1)
    """Choose among this many of the likeliest tokens; -1 or 0 = all."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Leave out tokens less likely than this times the likeliest."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Taken off the logit of every token that the answer has."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Taken off a token's logit once for each time that the answer has it."""
    repetition_penalty: float | None = Field(None, gt=0)
    """Logits of the prompt's and the answer's tokens are divided by it where positive, else multiplied."""
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias] | None = None
    """What is added to the logit of a token, by its id."""
    n: int | None = Field(None, ge=1)
    """Answers for each prompt; absent = 1."""
    seed: int | None = None
    """With a seed an answer depends on it, the request and the choice's index alone."""
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: list[TokenId] | None = None
    """Tokens that end the answer beside the model's own."""
    min_tokens: int | None = Field(None, ge=0)
    """Tokens before which nothing ends the answer."""
    ignore_eos: bool | None = None
    """Whether the model's own end-of-text tokens are tokens like others."""
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """How many alternatives each of the prompt's tokens comes with; not with stream."""
    stream: bool | None = None
    """Whether the answer comes as server-sent events while it is written."""
    stream_options: StreamOptions | None = None
    """Only with stream."""

    @property
    def num_answers(self) -> int:
        """Answers for each prompt."""
        return self.n or 1

    @property
    def has_stream_usage(self) -> bool:
        """Tell whether a stream's last chunk is to count tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


def make_requests(
    body: SamplingBody,
    prompts: Sequence[tuple[int, ...]],
    service: CompletionService,
    *,
    field: str,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> list[GenerationRequest]:
    """Return a request for each prompt and each of its `n` answers, in the order of OpenAI's choice indices.

    Args:
        field: where the prompts came from, for messages.
        max_tokens: None = as many as the model has room for.
    Raises:
        ApiError: 400, fields contradict each other, a prompt is too long, or there are too many.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(400, "prompt_logprobs come with whole answers only; leave out stream", param="prompt_logprobs")
    n, max_open = body.num_answers, service.engine.max_open
    if len(prompts) * n > max_open:
        message = f"{len(prompts)} prompts with n = {n} are more than the {max_open} answers held at once"
        raise ApiError(400, message, param="n" if n > 1 else field)
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    check_token_ids([*bias], service.tokenizer, "logit_bias")
    check_token_ids(body.stop_token_ids or [], service.tokenizer, "stop_token_ids")
    requests: list[GenerationRequest] = []
    for prompt in prompts:
        room = _room(len(prompt), max_tokens, service.engine.max_model_len, field)
        if (body.min_tokens or 0) > room:
            raise ApiError(400, f"min_tokens must be at most max_tokens, here {room}; lower it", param="min_tokens")
        for _ in range(n):
            params = SamplingParams(
                max_tokens=room,
                min_tokens=body.min_tokens or 0,
                ignore_eos=bool(body.ignore_eos),
                stop_token_ids=frozenset(body.stop_token_ids or ()),
                temperature=_given(body.temperature, 1.0),
                top_p=_given(body.top_p, 1.0),
                top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
                min_p=_given(body.min_p, 0.0),
                presence_penalty=_given(body.presence_penalty, 0.0),
                frequency_penalty=_given(body.frequency_penalty, 0.0),
                repetition_penalty=_given(body.repetition_penalty, 1.0),
                logit_bias=tuple(sorted(bias.items())),
                seed=None if body.seed is None else f"{body.seed}/{len(requests)}",
                stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
            requests.append(GenerationRequest(prompt=prompt, params=params))
    return requests


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _room(num_prompt: int, max_tokens: int | None, limit: int, field: str) -> int:
    """Return how many tokens an answer may have; refuse a prompt and an answer that do not fit together."""
    wanted = 1 if max_tokens is None else max_tokens
    if num_prompt + wanted > limit:
        message = (
            f"the model holds {limit} tokens; the prompt has {num_prompt} and max_tokens asks for {wanted}, "
            f"together {num_prompt + wanted}. Shorten the prompt or lower max_tokens."
        )
        raise ApiError(400, message, param=field, code="context_length_exceeded")
    return limit - num_prompt if max_tokens is None else max_tokens
