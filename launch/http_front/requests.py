"""Requests that were made before: asked again by id, after a connection was lost or the server was started again.

GET /v1/requests/ID                 the answer as far as it has come, with a `status`
GET /v1/requests/ID?stream=true     the same as server-sent events, from the start or from Last-Event-ID on
POST /v1/requests/ID/cancel         end it
"""

import asyncio
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moeplace.launch.http_front.completions.answer import CompletionAnswer, skip_to_position
from moeplace.launch.http_front.completions.note import FORMS, Recalled, recall
from moeplace.launch.http_front.completions.run import CompletionRun, EventBridge
from moeplace.launch.http_front.guard import CLIENT, REQUESTS
from moeplace.launch.http_front.keys import owned_name
from moeplace.launch.http_front.settings import FrontSettings
from moeplace.launch.http_front.wire.errors import ApiError
from moeplace.runtime.service.api import Service

_ID = re.compile(r"[\x21-\x7e]{1,200}")
_NO_STORE = {"Cache-Control": "no-store"}


def caller_id(request: Request) -> str | None:
    """The name that a client gives its request; None = it gives none.

    Raises:
        ApiError: 400, it is too long or has blanks or control characters.
    """
    given = request.headers.get("x-request-id")
    if given is not None and not _ID.fullmatch(given):
        raise ApiError(400, "X-Request-Id must be 1 to 200 visible ASCII characters", param="X-Request-Id")
    return given


def new_id() -> str:
    """A name that nobody can guess, for a request whose client gave none."""
    return secrets.token_hex(12)


class RequestRoutes:
    """See the module.

    Args:
        service: what knows the requests.
        bridge: to the event loop, once there is one.
        decode: token ids -> text.
    """

    def __init__(
        self,
        service: Service,
        settings: FrontSettings,
        *,
        bridge: Callable[[], EventBridge],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._service, self._settings, self._bridge, self._decode = service, settings, bridge, decode

    def routes(self) -> list[Route]:
        """Ids may hold slashes."""
        return [
            Route(f"{REQUESTS}/{{name:path}}/cancel", self._cancel, methods=["POST"]),
            Route(f"{REQUESTS}/{{name:path}}", self._show, methods=["GET"]),
        ]

    async def _show(self, request: Request) -> Response:
        given = request.path_params["name"]
        name, recalled = await self._recall(request)
        wish = request.query_params.get("stream", "false").lower()
        if wish not in ("true", "false"):
            raise ApiError(400, f"stream ({wish}) must be true or false", param="stream")
        run = self._run(owned_name(request.scope[CLIENT], name), recalled, stream=wish == "true")
        answer = self._answer(run, recalled, name, given)
        if not run.body.stream:
            run.show(recalled.records)
            return JSONResponse(answer.state(), headers={**_NO_STORE, "X-Request-Id": given})
        position = request.headers.get("last-event-id")
        if position:
            skip_to_position(run.choices, position)
        await asyncio.to_thread(run.follow, recalled.records)
        return answer  # type: ignore[return-value]  # Starlette calls what an endpoint returns as an application

    async def _cancel(self, request: Request) -> Response:
        given = request.path_params["name"]
        _, recalled = await self._recall(request)

        def cancel() -> None:
            for record in recalled.records:
                self._service.cancel(record.request.request_id, ticket=record.ticket)

        await asyncio.to_thread(cancel)
        return JSONResponse({"id": given, "object": "request.cancellation"}, 202)

    async def _recall(self, request: Request) -> tuple[str, Recalled]:
        """One of the client's own, by the id of its answer or by what the client called it."""
        given, client = request.path_params["name"], request.scope[CLIENT]

        def look() -> tuple[str, Recalled] | None:
            for name in (given, *(f"{form.prefix}-{given}" for form in FORMS)):
                if (recalled := recall(owned_name(client, name), self._service.find)) is not None:
                    return name, recalled
            return None

        found = None if " " in given else await asyncio.to_thread(look)  # see `owned_name`
        if found is None:
            raise ApiError(404, f"no request {given!r} is known", code="request_not_found")
        return found

    def _run(self, name: str, recalled: Recalled, *, stream: bool) -> CompletionRun:
        body = replace(recalled.body, stream=stream, include_usage=stream, include_event_ids=stream)
        return CompletionRun(self._service, self._bridge(), None, body, name=name, decode=self._decode, is_kept=True)

    def _answer(self, run: CompletionRun, recalled: Recalled, name: str, given: str) -> CompletionAnswer:
        settings = self._settings
        return CompletionAnswer(
            run,
            recalled.form,
            name=name,
            caller_id=given,
            created=recalled.created,
            model=settings.model,
            stall_timeout=settings.stall_timeout,
            on_end=lambda: None,
        )
