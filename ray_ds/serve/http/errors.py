"""Every error as OpenAI's error object, so that its clients raise what they should."""

from collections.abc import Mapping
from typing import Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: ErrorType
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


class ApiError(Exception):
    """Ends a request with an error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: ErrorType = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers

    def json(self) -> str:
        """Return the error object; plain ASCII, and nothing that has no UTF-8, since a message may quote anything."""
        message = str(self).encode("utf-8", errors="replace").decode()
        detail = ErrorDetail(message=message, type=self.type, param=self.param, code=self.code)
        return ErrorAnswer(error=detail).model_dump_json(ensure_ascii=True)

    def response(self) -> Response:
        """Return the answer."""
        return Response(self.json(), self.status, self.headers, media_type="application/json")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Answer what the framework refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _on_failure(request: Request, error: Exception) -> Response:
    """Answer our own mistakes; the framework logs them with their traceback."""
    return ApiError(500, "internal error; the server's log says more", type="server_error").response()


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every error as an error object."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_failure)
