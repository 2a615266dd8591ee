"""The administration of a service over HTTP: other ranks, another placement, and what became of that.

POST /admin/scale {"ranks": 4, "leaving": [2]}     POST /admin/drain {"member": 2}     GET /admin/status
POST /admin/place (a placement file)               POST /admin/replanning {"allowed": false}
"""

import asyncio
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moeplace.launch.http_front.wire.errors import ApiError, unavailable
from moeplace.launch.http_front.wire.request_body import parse_json, read_body
from moeplace.placement.placement_file import load_placement
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.service.api import Service

_MOST_BYTES = 4096
_MOST_PLACEMENT_BYTES = 64 << 20
_BODY_TIMEOUT = 10.0
_LAST_EVENTS = 100


class Permit:
    """What the administration allows.

    Attributes:
        replanning: whether the service may be re-placed by itself.
    """

    def __init__(self) -> None:
        self.replanning = True


def admin_routes(service: Service, max_ranks: int | None, permit: Permit) -> list[Route]:
    """The routes over a service, of which nobody may ask for more than `max_ranks`."""
    administration = _Administration(service, max_ranks, permit)
    posts = {
        "scale": administration.scale,
        "place": administration.place,
        "drain": administration.drain,
        "replanning": administration.allow_replanning,
    }
    routes = [Route(f"/admin/{name}", endpoint, methods=["POST"]) for name, endpoint in posts.items()]
    return [*routes, Route("/admin/status", administration.status)]


class _Administration:
    def __init__(self, service: Service, max_ranks: int | None, permit: Permit) -> None:
        self._service, self._max_ranks, self._permit = service, max_ranks, permit

    async def status(self, request: Request) -> Response:
        return await self._answer(200)

    async def scale(self, request: Request) -> Response:
        ranks, leaving = _ranks_and_leaving(parse_json(await read_body(request, _MOST_BYTES, _BODY_TIMEOUT)))
        if self._max_ranks is not None and ranks > self._max_ranks:
            rule = f"ranks ({ranks}) must be at most {self._max_ranks}, as --max-ranks says"
            raise ApiError(400, rule, param="ranks")
        return await self._do(partial(self._service.scale, ranks, leaving=leaving))

    async def drain(self, request: Request) -> Response:
        """One rank fewer: the member that is named hands over what it has, and goes."""
        member = _only(parse_json(await read_body(request, _MOST_BYTES, _BODY_TIMEOUT)), "member")
        if not _is_count(member):
            raise ApiError(400, "member must be the number of a member", param="member")

        def leave() -> None:
            self._service.scale(self._service.status().desired - 1, leaving=[member])

        return await self._do(leave)

    async def place(self, request: Request) -> Response:
        content = await read_body(request, _MOST_PLACEMENT_BYTES, _BODY_TIMEOUT)

        def replace() -> None:
            with tempfile.NamedTemporaryFile(prefix="moeplace-") as file:
                file.write(content)
                file.flush()
                try:
                    placement = load_placement(file.name)
                except InputError as error:
                    raise type(error)(str(error).replace(file.name, "the body")) from error
            self._service.replace(placement)

        return await self._do(replace)

    async def allow_replanning(self, request: Request) -> Response:
        allowed = _only(parse_json(await read_body(request, _MOST_BYTES, _BODY_TIMEOUT)), "allowed")
        if not isinstance(allowed, bool):
            raise ApiError(400, "allowed must be true or false", param="allowed")
        self._permit.replanning = allowed
        return await self._answer(200)

    async def _do(self, action: Callable[[], None]) -> Response:
        try:
            await asyncio.to_thread(action)
        except InputError as error:
            raise ApiError(400, str(error)) from error
        except MoeplaceError as error:
            raise unavailable(str(error)) from error
        return await self._answer(202)  # members need a while

    async def _answer(self, status: int) -> Response:
        document = await asyncio.to_thread(_describe, self._service)
        return JSONResponse({**document, "replanning_allowed": self._permit.replanning}, status)


def _only(document: dict[str, Any], name: str) -> Any:
    """The one field that a body may have."""
    unknown = sorted(set(document) - {name})
    if unknown:
        raise ApiError(400, f"unknown field {unknown[0]!r}", param=unknown[0])
    return document.get(name)


def _ranks_and_leaving(document: dict[str, Any]) -> tuple[int, list[int] | None]:
    unknown = sorted(set(document) - {"ranks", "leaving"})
    if unknown:
        raise ApiError(400, f"unknown field {unknown[0]!r}", param=unknown[0])
    ranks, leaving = document.get("ranks"), document.get("leaving")
    if not _is_count(ranks):
        raise ApiError(400, "ranks must be a number of ranks", param="ranks")
    if leaving is not None and not (isinstance(leaving, list) and all(_is_count(member) for member in leaving)):
        raise ApiError(400, "leaving must be a list of members", param="leaving")
    return int(ranks or 0), leaving


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _describe(service: Service) -> dict[str, Any]:
    status = service.status()
    names = ("serving", "reason", "generation", "placement_version", "placement_digest")
    states = ("desired", "allocated", "active", "routable", "waiting", "running")
    events = [
        {"time": event.time, "kind": event.kind, "sentence": event.sentence}
        for event in service.events()[-_LAST_EVENTS:]
    ]
    return {**{name: getattr(status, name) for name in (*names, *states)}, "events": events}
