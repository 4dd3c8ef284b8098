"""A replica's gRPC methods, under the names that Serve's proxy calls.

Serve's gRPC proxy listens on every interface, without TLS, and has no setting for either (ray 2.60,
`serve/_private/grpc_util.py`): the API key is all that keeps strangers out, and only a terminator in front hides it.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from ray.serve.grpc_util import RayServegRPCContext

from ray_ds.serve.grpc.generation import generate, generate_stream, health, status_code
from ray_ds.serve.http.errors import ApiError
from ray_ds.serve.http.service import CompletionService

SERVICER_FUNCTION = "ray_ds.serve.grpc.messages.add_generation_servicer"
"""What Serve's `gRPCOptions.grpc_servicer_functions` is told."""


class GrpcMethods:
    """The methods of `ray_ds.Generation`; a deployment inherits them."""

    _service: CompletionService

    async def Generate(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        """Return the whole answer."""
        try:
            return await generate(self._service, request, grpc_context.invocation_metadata())
        except ApiError as error:
            raise _refused(error, grpc_context) from None

    async def GenerateStream(self, request: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        """Yield the answer as it is written."""
        try:
            async with aclosing(generate_stream(self._service, request, grpc_context.invocation_metadata())) as replies:
                async for reply in replies:
                    yield reply
        except ApiError as error:
            raise _refused(error, grpc_context) from None

    def Health(self, request: Any) -> Any:
        """Say what is served and whether it works."""
        return health(self._service)


def _refused(error: ApiError, context: RayServegRPCContext) -> RuntimeError:
    """Say in the call's status what was wrong; return what to raise, which Serve pickles and ends the call with."""
    context.set_code(status_code(error))
    context.set_details(str(error))
    context.set_trailing_metadata([(name.lower(), value) for name, value in (error.headers or {}).items()])
    return RuntimeError(str(error))
