"""The administration of a service over HTTP: more or fewer ranks, and what became of that.

POST /admin/scale {"ranks": 4, "leaving": [2]}     GET /admin/status
"""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moeplace.launch.http_front.wire.errors import ApiError, unavailable
from moeplace.launch.http_front.wire.request_body import parse_json, read_body
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.service.api import Service

_MOST_BYTES = 4096
_BODY_TIMEOUT = 10.0
_LAST_EVENTS = 100


def admin_routes(service: Service, max_ranks: int | None = None) -> list[Route]:
    """The two routes over a service, of which nobody may ask for more than `max_ranks`."""

    async def scale(request: Request) -> Response:
        document = parse_json(await read_body(request, _MOST_BYTES, _BODY_TIMEOUT))
        ranks, leaving = _ranks_and_leaving(document)
        if max_ranks is not None and ranks > max_ranks:
            raise ApiError(400, f"ranks ({ranks}) must be at most {max_ranks}, as --max-ranks says", param="ranks")
        try:
            await asyncio.to_thread(service.scale, ranks, leaving=leaving)
        except InputError as error:
            raise ApiError(400, str(error)) from error
        except MoeplaceError as error:
            raise unavailable(str(error)) from error
        return JSONResponse(await asyncio.to_thread(_describe, service), 202)  # members need a while

    async def status(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(_describe, service))

    return [Route("/admin/scale", scale, methods=["POST"]), Route("/admin/status", status)]


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
