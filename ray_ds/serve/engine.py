"""The engine's thread: it alone touches the model; others hand it requests and take their events."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ray_ds.serve.answer import Answer
from ray_ds.serve.core import BlockModel, EngineCore
from ray_ds.serve.core import TokenTable as TokenTable
from ray_ds.serve.requests import EmbeddingRequest, Emit, EngineStats, Event, Failure, Request

STEP_TOKENS = 512
"""Tokens that a step computes, about, so that a long prompt delays running answers by little."""
UNKNOWN_RETRY_S = 1.0
"""What a refused client is told to wait while nothing was measured yet."""

logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """The engine has as much to do as it may hold."""

    def __init__(self, reason: Literal["requests", "tokens"], retry_after_s: float) -> None:
        """Say what is too much.

        Args:
            reason: `requests`, there would be more than `max_open`; `tokens`, more prompt tokens would wait than
                `max_queued_tokens`.
            retry_after_s: when there should be room, by the speed of the last seconds.
        """
        super().__init__(f"too many {reason} wait; there should be room in {retry_after_s:.1f} s")
        self.reason = reason
        self.retry_after_s = retry_after_s


class UnfitRequestError(ValueError):
    """A request that the model could never answer."""


class EngineStoppedError(Exception):
    """The engine has failed or was closed; the message says why."""


class Engine:
    """Answers requests on a thread of its own."""

    def __init__(
        self,
        model: BlockModel,
        tokenizer: TokenTable,
        *,
        max_running: int,
        max_queued: int,
        max_queued_tokens: int | None = None,
        step_tokens: int = STEP_TOKENS,
        cuts_anywhere: bool = True,
        reuses_prefixes: bool = True,
    ) -> None:
        """Prepare; `start` starts.

        Args:
            max_running: answers that are written at a time.
            max_queued: requests that may wait beside them.
            max_queued_tokens: prompt tokens that may be still to compute when another request is taken; None = any
                number. A request that finds none is always taken.
            step_tokens, cuts_anywhere: as in `Scheduler`.
            reuses_prefixes: whether the cache is searched for the beginnings of prompts.
        """
        self.max_model_len = min(model.max_len, model.num_blocks * model.block_size)
        """Tokens of the longest request, prompt and answer."""
        self.max_open = max_running + max_queued
        """Requests it holds at most, running or waiting."""
        self._vocab_size = tokenizer.vocab_size
        self._max_queued_tokens = max_queued_tokens
        self._core = EngineCore(
            model,
            tokenizer,
            self._end,
            max_running=max_running,
            step_tokens=step_tokens,
            cuts_anywhere=cuts_anywhere,
            reuses_prefixes=reuses_prefixes,
        )
        self._wake = threading.Condition()
        self._inbox: list[Answer] = []
        self._num_open = 0
        self._count()
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
        """What the engine is doing, as of the last step's end, and who came since."""
        with self._wake:
            new = sum(answer.num_prompt for answer in self._inbox)
            return replace(
                self._stats,
                num_waiting=self._stats.num_waiting + len(self._inbox),
                num_waiting_tokens=self._stats.num_waiting_tokens + new,
            )

    def submit(self, requests: Sequence[tuple[Request, Emit]]) -> list[Answer]:
        """Take all of the requests or none; return what `cancel` wants.

        Raises:
            UnfitRequestError: one is longer than `max_model_len`, or names a token that there is not.
            QueueFullError: they are more than the queue has room for.
            EngineStoppedError: the engine has stopped.
        """
        for request, _ in requests:
            self._check(request)
        answers = [Answer(request, emit) for request, emit in requests]
        with self._wake:
            if self._stopped is not None or self._is_closing:
                raise EngineStoppedError(self._stopped or "the engine is shutting down")
            self._check_room(answers)
            self._num_open += len(answers)
            self._inbox += answers
            self._wake.notify()
        return answers

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Drop answers nobody waits for; their blocks are free before the next step. Finished ones are left alone."""
        with self._wake:
            for answer in answers:
                answer.is_cancelled = True
            self._wake.notify()

    def _check(self, request: Request) -> None:
        """Refuse what would wait for ever or break the step that it is in."""
        params = None if isinstance(request, EmbeddingRequest) else request.params
        biased = [token for token, _ in params.logit_bias] if params else []
        unknown = next((token for token in (*request.prompt, *biased) if not 0 <= token < self._vocab_size), None)
        if unknown is not None:
            raise UnfitRequestError(f"token ({unknown}) must be below {self._vocab_size}; use the model's tokenizer")
        max_tokens = params.max_tokens if params else 0
        if not 0 < len(request.prompt) <= self.max_model_len - max_tokens:
            raise UnfitRequestError(
                f"prompt ({len(request.prompt)} tokens) and max_tokens ({max_tokens}) must be at least 1 token and at "
                f"most max_model_len ({self.max_model_len}) together; shorten the prompt or lower max_tokens"
            )

    def _check_room(self, answers: Sequence[Answer]) -> None:
        """Refuse what the queue has no room for. Call with the lock held."""
        excess = self._num_open + len(answers) - self.max_open
        if excess > 0:
            raise QueueFullError("requests", excess * self._time_between_ends())
        waiting = self._stats.num_waiting_tokens + sum(answer.num_prompt for answer in self._inbox)
        if self._max_queued_tokens is not None and waiting > 0:
            excess = waiting + sum(answer.num_prompt for answer in answers) - self._max_queued_tokens
            if excess > 0:
                speed = self._stats.prefill_tokens_per_s
                raise QueueFullError("tokens", excess / speed if speed else UNKNOWN_RETRY_S)

    def _time_between_ends(self) -> float:
        """Return the seconds after which one more answer should have ended, if all are as long as they may be."""
        stats = self._stats
        num_answers = stats.num_running + stats.num_waiting
        if not (num_answers and stats.prefill_tokens_per_s and stats.decode_tokens_per_s):
            return UNKNOWN_RETRY_S
        to_read = stats.num_waiting_tokens / stats.prefill_tokens_per_s
        return (to_read + self._num_unwritten / stats.decode_tokens_per_s) / num_answers

    def _count(self) -> None:
        """Note what the engine is doing. Call with the lock held, on the engine's thread or before it starts."""
        core, scheduler = self._core, self._core.scheduler
        answers = [*scheduler.running, *scheduler.waiting]
        self._num_unwritten = sum(own.params.max_tokens - own.num_sampled for own in answers if own.params)
        self._stats = EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_waiting_tokens=sum(answer.num_prompt_missing for answer in answers),
            num_cached_tokens=sum(answer.num_computed for answer in scheduler.running),
            num_cache_tokens=core.pool.num_blocks * core.pool.block_size,
            prefill_tokens_per_s=core.reading.per_s,
            decode_tokens_per_s=core.writing.per_s,
            num_steps=core.num_steps,
            num_tokens=core.num_tokens,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_prefix_hits=scheduler.num_prefix_hits,
            num_preemptions=scheduler.num_preemptions,
        )

    def _run(self) -> None:
        """Step while there is work, wait while there is none."""
        reason = "the engine was shut down"
        try:
            while self._receive():
                self._core.step()
        except Exception as error:  # whatever it is, it must reach those who wait: this is the thread's last frame
            logger.exception("engine failed")
            reason = f"the engine failed: {type(error).__name__}: {error}"
        with self._wake:
            self._stopped = reason
            answers = [*self._core.scheduler.running, *self._core.scheduler.waiting, *self._inbox]
        for answer in answers:
            answer.emit(Failure(message=reason))

    def _receive(self) -> bool:
        """Wait for work and take it in; return False when the engine is to end."""
        scheduler = self._core.scheduler
        with self._wake:
            self._count()
            self._wake.wait_for(lambda: self._is_closing or self._inbox or self._num_open)
            scheduler.add(self._inbox)
            self._inbox = []
            for answer in [*scheduler.running, *scheduler.waiting]:
                if answer.is_cancelled:
                    scheduler.release(answer)
                    self._num_open -= 1
            self._count()
            return not self._is_closing

    def _end(self, answer: Answer, last: Event) -> None:
        """Count an answer as ended, its blocks being free, and send its last event."""
        with self._wake:
            self._num_open -= 1
        answer.emit(last)
