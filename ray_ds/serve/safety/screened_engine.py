"""An engine behind the safety filter: whichever route a request comes by, nothing goes in or out past it."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ray_ds.serve.engine import TokenTable
from ray_ds.serve.requests import Emit, EngineStats, Event, Failure, Piece, Request
from ray_ds.serve.safety.policy import Policy
from ray_ds.serve.safety.screen import OutputScreen

logger = logging.getLogger(__name__)


class AnsweringEngine(Protocol):
    """What is asked of the engine behind; `serve.engine.Engine` is one."""

    max_model_len: int
    max_open: int

    @property
    def failure(self) -> str | None:
        """As `Engine.failure`."""

    @property
    def stats(self) -> EngineStats:
        """As `Engine.stats`."""

    def submit(self, requests: Sequence[tuple[Any, Emit]]) -> Sequence[Any]:
        """As `Engine.submit`."""

    def cancel(self, answers: Sequence[Any]) -> None:
        """As `Engine.cancel`."""


class ScreenedEngine:
    """Takes the same requests as the engine behind it."""

    def __init__(self, engine: AnsweringEngine, tokenizer: TokenTable, policy: Policy) -> None:
        self.max_model_len = engine.max_model_len
        self.max_open = engine.max_open
        self._engine = engine
        self._tokenizer = tokenizer
        self._policy = policy

    @property
    def failure(self) -> str | None:
        """Why the engine takes no requests any more; None while it does."""
        return self._engine.failure

    @property
    def stats(self) -> EngineStats:
        """What the engine is doing now."""
        return self._engine.stats

    def submit(self, requests: Sequence[tuple[Request, Emit]]) -> Sequence[Any]:
        """Hand all of the requests to the engine or none; return what `cancel` wants.

        Raises:
            ContentRefusedError: a prompt holds what must not go in.
            QueueFullError, EngineStoppedError: as the engine.
        """
        for prompt in {request.prompt for request, _ in requests}:
            data = b"".join(map(self._tokenizer.token_bytes, prompt))
            self._policy.check_prompt(data.decode("utf-8", errors="replace"))
        screened = [_ScreenedAnswer(emit, self._policy.new_screen()) for _, emit in requests]
        answers = self._engine.submit(
            [(request, answer.emit) for (request, _), answer in zip(requests, screened, strict=True)]
        )
        for answer, handle in zip(screened, answers, strict=True):
            answer.cancel_by(lambda handle=handle: self._engine.cancel([handle]))  # type: ignore[misc]
        return answers

    def cancel(self, answers: Sequence[Any]) -> None:
        """Drop answers nobody waits for."""
        self._engine.cancel(answers)


class _ScreenedAnswer:
    """One answer between the engine's thread and whoever asked."""

    def __init__(self, emit: Emit, screen: OutputScreen | None) -> None:
        self._emit = emit
        self._screen = screen
        self._lock = threading.Lock()
        self._cancel: Callable[[], None] | None = None
        self._has_ended = False

    def cancel_by(self, cancel: Callable[[], None]) -> None:
        """Say how the engine is told to stop; it is told at once where the screen has ended the answer already."""
        with self._lock:
            self._cancel = cancel
            is_late = self._has_ended
        if is_late:
            cancel()

    def emit(self, event: Event) -> None:
        """Pass on what may pass."""
        if self._has_ended:
            return
        if not isinstance(event, Piece) or self._screen is None:
            self._emit(event)
            return
        try:
            piece: Piece | Failure | None = self._screen.take(event)
        except Exception:  # a detector of one's own may raise anything, and the engine's thread must live
            logger.exception("the safety filter failed")
            piece = Failure(message="the safety filter failed; the server's log says more")
        if piece is None:
            return
        if event.finish_reason is None and (isinstance(piece, Failure) or piece.finish_reason is not None):
            self._end()
        self._emit(piece)

    def _end(self) -> None:
        """End the answer in the engine, which goes on writing it otherwise."""
        with self._lock:
            self._has_ended = True
            cancel = self._cancel
        if cancel is not None:
            cancel()
