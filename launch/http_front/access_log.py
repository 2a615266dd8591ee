"""AccessLog: a line for every answer, with the caller's id of the request."""

import logging
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("moeplace.access")

REQUEST_ID = "x-request-id"
_LONGEST_ID = 128
_NO_ANSWER = 499
"""As in the metrics: the client did not wait."""


class AccessLog:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, sent = time.perf_counter(), 0
        status, answered_id = _NO_ANSWER, None

        async def send_and_note(message: Message) -> None:
            nonlocal status, sent, answered_id
            if message["type"] == "http.response.start":
                status, answered_id = message["status"], Headers(raw=list(message["headers"])).get(REQUEST_ID)
            await send(message)
            sent += len(message.get("body", b""))

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            asked_id = Headers(scope=scope).get(REQUEST_ID, "")[:_LONGEST_ID]
            self._write(scope, status, time.perf_counter() - started, sent, asked_id or answered_id or "-")

    @staticmethod
    def _write(scope: Scope, status: int, seconds: float, sent: int, request_id: str) -> None:
        """What clients sent is shown with its blanks and control characters escaped: a line stays a line."""
        client = scope["client"][0] if scope.get("client") else "-"
        path, shown_id = (
            text.encode("unicode_escape").decode().replace(" ", "\\x20") for text in (scope["path"], request_id)
        )
        fields = {
            "client": client,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 6),
            "bytes": sent,
            "request_id": request_id,
        }
        line = f"{client} {scope['method']} {path} {status} {seconds:.3f}s {sent}B id={shown_id}"
        logger.info("%s", line, extra={"fields": fields})
