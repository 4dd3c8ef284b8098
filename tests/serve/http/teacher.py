"""An engine that answers at once, by the book: the likeliest token each time, scored in one plain pass."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ray_ds.serve.engine import QueueFullError, TokenTable
from ray_ds.serve.requests import (
    Embedding,
    EmbeddingRequest,
    Emit,
    EngineStats,
    GenerationRequest,
    Piece,
    PromptScores,
    Request,
    TokenLogprobs,
)
from ray_ds.serve.text_stream import TextStream

STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    num_waiting_tokens=70,
    num_cached_tokens=48,
    num_cache_tokens=64,
    prefill_tokens_per_s=100.0,
    decode_tokens_per_s=10.0,
    num_steps=9,
    num_tokens=50,
    num_prompt_tokens=400,
    num_prefix_hits=100,
    num_preemptions=4,
)


class TeacherEngine:
    """A `serve.http.service.ServingEngine` whose model is a function of the sequence."""

    max_model_len = 256
    max_open = 8
    failure = None
    stats = STATS

    def __init__(self, logits: Callable[[Sequence[int]], Tensor], tokenizer: TokenTable) -> None:
        """Take a model.

        Args:
            logits: returns (T, V) for a sequence of T tokens.
        """
        self._logits = logits
        self._tokenizer = tokenizer
        self.asked: list[Request] = []
        """Everything it was asked, in order."""
        self.refusal: QueueFullError | None = None
        """What it answers instead, where set."""

    def submit(self, requests: Sequence[tuple[Any, Emit]]) -> list[Any]:
        if self.refusal is not None:
            raise self.refusal
        for request, emit in requests:
            self.asked.append(request)
            if isinstance(request, EmbeddingRequest):
                emit(Embedding(values=embedding_of(request.prompt)))
            else:
                self._answer(request, emit)
        return [request for request, _ in requests]

    def cancel(self, answers: Sequence[Any]) -> None:
        pass

    def _answer(self, request: GenerationRequest, emit: Emit) -> None:
        params, sequence = request.params, list(request.prompt)
        if params.prompt_logprobs is not None:
            emit(PromptScores(logprobs=tuple(self._score(sequence, 0, params.prompt_logprobs)[1:])))
        common = {"num_cached_tokens": len(sequence) // 2}
        stream = TextStream()
        for _ in range(params.max_tokens):
            sequence.append(int(self._logits(sequence)[-1].argmax()))
            text = stream.push(self._tokenizer.token_bytes(sequence[-1]))
            start = len(request.prompt)
            logprobs = self._score(sequence, start, params.logprobs)[-1:] if params.logprobs is not None else ()
            is_last = len(sequence) - start == params.max_tokens
            reason = "stop" if sequence[-1] in self._tokenizer.stop_ids else "length" if is_last else None
            text += stream.finish() if reason is not None else ""
            emit(Piece(text=text, num_tokens=1, logprobs=tuple(logprobs), finish_reason=reason, **common))
            if reason is not None:
                return
        emit(Piece(text="", num_tokens=0, finish_reason="length", **common))

    def _score(self, sequence: Sequence[int], start: int, num_top: int) -> list[TokenLogprobs]:
        """Score the tokens from `start` on; the first of all has no score, and a place only."""
        logprobs = self._logits(sequence).float().log_softmax(dim=-1)
        text, scored = TextStream(), []
        for place, token in enumerate(sequence[start:], start=start):
            row = logprobs[place - 1] if place else logprobs[0] * math.nan
            values, tokens = row.topk(num_top)
            top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
            scored.append(TokenLogprobs(token=token, logprob=float(row[token]), top=top, text_offset=text.num_chars))
            text.push(self._tokenizer.token_bytes(token))
        return scored


def embedding_of(prompt: Sequence[int]) -> tuple[float, ...]:
    """Return a vector of length 1 that a prompt can be told by."""
    angle = math.fmod(sum((place + 1) * token for place, token in enumerate(prompt)), 1000)
    return (math.cos(angle), math.sin(angle), 0.0)
