"""The gate in front of all routes: no key, no answer; and no answer takes longer than it may.

Without a key only `/health` and `/ping` answer, which balancers and probes ask, and the page's files, the same for
everybody; `/metrics` tells how much an endpoint is used, so Prometheus sends a key too (`authorization` in its scrape
configuration).
"""

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ray_ds.serve.http.access import Access, Caller
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.page import PAGE_FILES

OPEN_PATHS = frozenset({"/health", "/ping", *PAGE_FILES})


def is_open(path: str) -> bool:
    """Tell whether a route answers without a key."""
    return path in OPEN_PATHS


class Gate:
    """ASGI middleware: `request.state.caller` is the `Caller` in every route behind it."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        caller: Caller | None = None
        try:
            async with asyncio.timeout(self._access.request_timeout_s) as deadline:
                caller = await self._identify(scope)
                answer.caller = caller
                scope.setdefault("state", {})["caller"] = caller
                await self._app(scope, receive, answer.send)
        except ApiError as error:
            await error.response()(scope, receive, answer.send)
        except TimeoutError:
            if not deadline.expired():
                raise
            await answer.end(_timed_out(self._access.request_timeout_s), scope, receive)
        finally:
            if caller is not None:
                caller.settle()

    async def _identify(self, scope: Scope) -> Caller:
        if is_open(scope["path"].removeprefix(scope.get("root_path", ""))):
            return Caller(self._access, "", None)
        return await self._access.identify(Headers(scope=scope).get("authorization"))


class _Answer:
    """An answer on its way: adds headers to its start, and knows how to break it off."""

    def __init__(self, send: Send) -> None:
        self.caller: Caller | None = None
        self._send = send
        self._has_started = False
        self._is_event_stream = False

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(self.caller.headers() if self.caller is not None else {})
            self._has_started = True
            self._is_event_stream = headers.get("content-type", "").startswith("text/event-stream")
        await self._send(message)

    async def end(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """End with an error: as the whole answer, or as the last event of a stream; else the connection just closes."""
        if not self._has_started:
            await error.response()(scope, receive, self._send)
        elif self._is_event_stream:
            event = f"data: {error.json()}\n\n"
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})


def _timed_out(limit_s: float) -> ApiError:
    message = f"the request took longer than {limit_s:g} s; ask for fewer tokens or try again later"
    return ApiError(408, message, type="server_error", code="request_timeout")
