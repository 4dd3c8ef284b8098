"""Continuous batching: one thread owns the model and answers many requests at once, a token each a step."""

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ray_ds.serve.requests import Emit, EngineStats, Failure, FinishReason, GenerationRequest, Piece, TokenLogprobs
from ray_ds.serve.sampler import draw_tokens, token_logprobs
from ray_ds.serve.scheduler import RunningAnswer, Scheduler

PREFILL_TOKENS = 512
"""Prompt tokens a step reads at most of one prompt, so that a long prompt delays running answers by little.

Where a prompt is cut depends on the prompt alone, never on what else runs."""

logger = logging.getLogger(__name__)


class SlotModel(Protocol):
    """A decoder with a cache of `num_slots` sequences of at most `max_len` tokens."""

    num_slots: int
    max_len: int

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """Add tokens to the sequence in `slot`; return the logits (V,) that follow the last one."""

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Add one token to each sequence; return the logits (B, V) that follow."""

    def clear(self, slot: int) -> None:
        """Forget the sequence in `slot`."""


class TokenTable(Protocol):
    """What the engine asks of a tokenizer."""

    vocab_size: int
    stop_ids: frozenset[int]
    """End an answer."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one id stands for."""


class QueueFullError(Exception):
    """The engine has as much as it may hold."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        """Say what there is too much of, and when there may be room again."""
        super().__init__(reason, retry_after_s)
        self.reason = reason
        self.retry_after_s = retry_after_s


class EngineStoppedError(Exception):
    """The engine has failed or was closed; the message says why."""


class Engine:
    """Answers requests on a thread of its own, which alone touches the model's tensors."""

    def __init__(self, model: SlotModel, tokenizer: TokenTable, *, max_queued: int) -> None:
        """Prepare; `start` starts.

        Args:
            max_queued: requests that may wait for a slot.
        """
        self.max_model_len = model.max_len
        self.max_open = model.num_slots + max_queued
        """Requests it holds at most, running or waiting."""
        self._model = model
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(model.num_slots)
        self._wake = threading.Condition()
        self._inbox: list[RunningAnswer] = []
        self._num_open = 0
        self._num_steps = 0
        self._num_tokens = 0
        self._stopped: str | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after its current step; requests that are still open fail."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def failure(self) -> str | None:
        """Why the engine takes no requests any more; None while it does."""
        return self._stopped

    @property
    def stats(self) -> EngineStats:
        """What the engine is doing now."""
        with self._wake:
            running = len(self._scheduler.running)
            return EngineStats(
                num_running=running,
                num_waiting=self._num_open - running,
                num_waiting_tokens=0,
                num_cached_tokens=0,
                num_cache_tokens=self._model.num_slots * self.max_model_len,
                prefill_tokens_per_s=0.0,
                decode_tokens_per_s=0.0,
                num_steps=self._num_steps,
                num_tokens=self._num_tokens,
                num_prompt_tokens=0,
                num_prefix_hits=0,
                num_preemptions=0,
            )

    def submit(self, requests: Sequence[tuple[GenerationRequest, Emit]]) -> list[RunningAnswer]:
        """Take all of the requests or none; return what `cancel` wants.

        Raises:
            QueueFullError: they are more than the queue has room for.
            EngineStoppedError: the engine has stopped.
        """
        answers = [RunningAnswer(request, emit) for request, emit in requests]
        with self._wake:
            if self._stopped is not None or self._is_closing:
                raise EngineStoppedError(self._stopped or "the engine is shutting down")
            if self._num_open + len(answers) > self.max_open:
                raise QueueFullError("requests", 1.0)
            self._num_open += len(answers)
            self._inbox += answers
            self._wake.notify()
        return answers

    def cancel(self, answers: Sequence[RunningAnswer]) -> None:
        """Drop answers nobody waits for; their slots are free before the next step. Finished ones are left alone."""
        with self._wake:
            for answer in answers:
                answer.is_cancelled = True
            self._wake.notify()

    def _run(self) -> None:
        """Step while there is work, wait while there is none."""
        reason = "the engine was shut down"
        try:
            while self._receive():
                self._step()
        except Exception as error:  # whatever it is, it must reach those who wait: this is the thread's last frame
            logger.exception("engine failed")
            reason = f"the engine failed: {type(error).__name__}: {error}"
        with self._wake:
            self._stopped = reason
            answers = [*self._scheduler.running, *self._scheduler.waiting, *self._inbox]
        for answer in answers:
            answer.emit(Failure(message=reason))

    def _receive(self) -> bool:
        """Wait for work and take it in; return False when the engine is to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._is_closing or self._inbox or self._num_open)
            self._scheduler.add(self._inbox)
            self._inbox = []
            for answer in [*self._scheduler.running, *self._scheduler.waiting]:
                if answer.is_cancelled:
                    self._release(answer)
            self._scheduler.admit()
            return not self._is_closing

    def _release(self, answer: RunningAnswer) -> None:
        """Give an answer's place to others. Call with the lock held."""
        if answer.slot >= 0:
            self._model.clear(answer.slot)
        self._scheduler.release(answer)
        self._num_open -= 1

    @torch.inference_mode()
    def _step(self) -> None:
        """Read a part of new prompts, then give every answer whose prompt is read its next token."""
        decoding = [answer for answer in self._scheduler.running if answer.is_prefilled]
        self._prefill([answer for answer in self._scheduler.running if not answer.is_prefilled])
        if decoding:
            slots = [answer.slot for answer in decoding]
            logits = self._model.decode(slots, [answer.last_token for answer in decoding])  # (B, V)
            self._advance(decoding, logits)
        self._num_steps += 1

    def _prefill(self, answers: Sequence[RunningAnswer]) -> None:
        """Read prompts in order until about `PREFILL_TOKENS` are read."""
        budget = PREFILL_TOKENS
        for answer in answers:
            while budget > 0 and not answer.is_prefilled:
                start = answer.num_prefilled
                tokens = answer.request.prompt[start : start + PREFILL_TOKENS]
                logits = self._model.prefill(answer.slot, tokens)  # (V,)
                answer.num_prefilled += len(tokens)
                budget -= len(tokens)
                if answer.is_prefilled:
                    self._advance([answer], logits[None])

    def _advance(self, answers: Sequence[RunningAnswer], logits: Tensor) -> None:
        """Sample one token for each row of `logits` (B, V) and send what it makes certain."""
        # A model may have more rows than its tokenizer has tokens; those were never trained.
        logits = logits[:, : self._tokenizer.vocab_size]
        is_finite = logits.isfinite().all(dim=-1).tolist()
        params = [answer.request.params for answer in answers]
        tokens = draw_tokens(logits, params, [answer.random.random() for answer in answers])
        for row, answer in enumerate(answers):
            if is_finite[row]:
                self._send(answer, tokens[row], logits[row])
            else:
                self._end(answer, Failure(message="the model gave logits that are not finite numbers"))

    def _send(self, answer: RunningAnswer, token: int, logits: Tensor) -> None:
        """Append a token to an answer; end it where a rule says so."""
        params = answer.request.params
        answer.last_token = token
        answer.num_sampled += 1
        answer.num_unsent += 1
        self._num_tokens += 1
        reason: FinishReason | None = None
        text = ""
        if token in self._tokenizer.stop_ids:
            reason = "stop"
        else:
            if params.logprobs is not None:
                logprob, top = token_logprobs(logits, token, params.logprobs)
                offset = answer.text.num_chars
                answer.unsent_logprobs.append(TokenLogprobs(token=token, logprob=logprob, top=top, text_offset=offset))
            text = answer.text.push(self._tokenizer.token_bytes(token))
            if answer.text.is_stopped:
                reason = "stop"
            elif answer.num_sampled == params.max_tokens:
                reason = "length"
        if reason is not None:
            text += answer.text.finish()
        if text or reason is not None:
            piece = answer.take_piece(text, reason)
            if reason is None:
                answer.emit(piece)
            else:
                self._end(answer, piece)

    def _end(self, answer: RunningAnswer, last: Piece | Failure) -> None:
        """Free an answer's slot, then send its last event."""
        with self._wake:
            self._release(answer)
        answer.emit(last)
