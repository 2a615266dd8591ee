"""Errors of the HTTP front, in the form that OpenAI's clients expect.

{"error": {"message": "...", "type": "invalid_request_error", "param": "max_tokens", "code": null}}
"""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_SERVER_ERRORS = 500


class ClientGone(Exception):
    """The client closed the connection, or takes nothing of what waits for it."""


class ApiError(Exception):
    """A request that gets no answer, and why.

    Args:
        status: HTTP status.
        message: one sentence.
        param: the field at fault.
        code: a short name for programs.
        headers: additional headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        """The error object."""
        kind = "server_error" if self.status >= _SERVER_ERRORS else _TYPES.get(self.status, "invalid_request_error")
        values = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {name: None if value is None else _printable(value) for name, value in values.items()}}

    def response(self) -> JSONResponse:
        """The error object as an answer."""
        return JSONResponse(self.document(), self.status, self.headers)


def _printable(text: str) -> str:
    """What a client sent may hold half of a surrogate pair, which no answer can."""
    return text.encode("utf-8", "backslashreplace").decode()


def overloaded(message: str, *, seconds: int = 1) -> ApiError:
    """Too much at once: the client may try again in so many seconds."""
    return ApiError(429, message, code="overloaded", headers={"Retry-After": str(seconds)})


def unavailable(reason: str, *, code: str = "unavailable") -> ApiError:
    """The service takes no requests now."""
    return ApiError(503, f"not serving: {reason}", code=code, headers={"Retry-After": "1"})
