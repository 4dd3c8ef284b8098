"""Requests on their way through the engine: their events come from its thread to the event loop."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence

from ray_ds.serve.engine import EngineStoppedError, QueueFullError, UnfitRequestError
from ray_ds.serve.http.access import Caller
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.metrics import RequestTimer
from ray_ds.serve.http.service import CompletionService
from ray_ds.serve.requests import Embedding, Emit, Event, Failure, FinishReason, Piece, Request
from ray_ds.serve.safety.policy import ContentRefusedError


async def submit(service: CompletionService, caller: Caller, requests: Sequence[Request]) -> "Submission":
    """Charge requests to the caller's limits and hand them to the engine.

    Raises:
        ApiError: as `Caller.admit` and `Submission`.
    """
    await caller.admit(requests)
    return Submission(service, caller, requests)


class Submission:
    """The requests of one call, all in the engine or none."""

    def __init__(self, service: CompletionService, caller: Caller, requests: Sequence[Request]) -> None:
        """Hand the requests, which the caller's limits have admitted, to the engine.

        Raises:
            ApiError: 400, a prompt does not fit or is refused; 429, the engine has no room; 503, it has stopped.
        """
        self._caller = caller
        self._engine = service.engine
        self._timers = [RequestTimer(service.metrics) for _ in requests]
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        try:
            self._running = self._engine.submit(
                [(request, self._emitter(loop, index)) for index, request in enumerate(requests)]
            )
        except QueueFullError as error:
            wait = math.ceil(max(1.0, error.retry_after_s))
            message = f"the server has no room for more {error.reason}; try again in {wait} s"
            headers = {"Retry-After": str(wait)}
            raise ApiError(429, message, type="rate_limit_error", code="queue_full", headers=headers) from None
        except UnfitRequestError as error:
            raise ApiError(400, str(error), param="prompt") from None
        except ContentRefusedError as error:
            raise ApiError(400, str(error), param="prompt", code="content_filter") from None
        except EngineStoppedError as error:
            raise ApiError(503, str(error), type="server_error", code="engine_stopped") from None

    def _emitter(self, loop: asyncio.AbstractEventLoop, index: int) -> Emit:
        def emit(event: Event) -> None:
            # A closed loop means that nobody can be waiting any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return emit

    def cancel(self) -> None:
        """Free what the requests hold in the engine; finished ones hold nothing."""
        self._engine.cancel(self._running)
        for timer in self._timers:
            timer.end("abort")

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield (index of the request, event) as they come, until every request has its last.

        Raises:
            ApiError: 500, the engine could not finish one.
        """
        num_open = len(self._timers)
        while num_open:
            index, event = await self._queue.get()
            timer = self._timers[index]
            if isinstance(event, Failure):
                timer.end("error")
                raise ApiError(500, event.message, type="server_error", code="engine_failure")
            finish_reason: FinishReason | None = "stop" if isinstance(event, Embedding) else None
            if isinstance(event, Piece):
                timer.add_tokens(event.num_tokens)
                self._caller.num_generated_tokens += event.num_tokens
                finish_reason = event.finish_reason
            if finish_reason is not None:
                timer.end(finish_reason)
                num_open -= 1
            yield index, event
