"""The live page of a service: who serves, what is where, what crosses which tier, what is being re-placed.

GET /dashboard         the page, without any data in it: it needs no token
GET /dashboard/state   what it shows, once a second, behind the token of all other routes
"""

import asyncio
import time
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from moeplace.runtime.counters import TIERS
from moeplace.runtime.service.api import Service

PAGE, STATE = "/dashboard", "/dashboard/state"
_LAST_EVENTS = 30
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
"""Nothing from elsewhere, and nothing sent elsewhere: the page holds a token."""


def dashboard_routes(service: Service) -> list[Route]:
    """The two routes over a service."""
    page = files("moeplace.launch.http_front").joinpath("dashboard.html").read_text(encoding="utf-8")

    async def show(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "X-Frame-Options": "DENY"})

    async def state(request: Request) -> Response:
        digest = request.query_params.get("digest", "")
        document = await asyncio.to_thread(describe, service, known_digest=digest)
        return JSONResponse(document, headers={"Cache-Control": "no-store"})

    return [Route(PAGE, show), Route(STATE, state)]


def describe(service: Service, *, known_digest: str) -> dict[str, Any]:
    """What the page shows now; the placement only if it is another one than the page knows."""
    status, placement = service.status(), service.placement
    names = ("serving", "reason", "changing", "generation", "placement_version", "desired", "active", "waiting")
    sent = status.counters.get("bytes_sent") or {}
    document: dict[str, Any] = {name: getattr(status, name) for name in (*names, "running", "steps", "tokens")}
    document |= {
        "time": time.time(),
        "imbalance": list(status.imbalance_per_layer),
        "layer_ids": list(range(placement.num_layers)) if placement.layer_ids is None else placement.layer_ids.tolist(),
        "bytes_sent": {tier: float(sent.get(tier, 0)) for tier in TIERS},
        "migration": None if status.migration is None else dict(status.migration),
        "events": [
            {"time": event.time, "kind": event.kind, "sentence": event.sentence}
            for event in service.events()[-_LAST_EVENTS:]
        ],
        "placement": None,
    }
    if placement.digest != known_digest:
        document["placement"] = {
            "digest": placement.digest,
            "slots_of_rank": placement.slots_of_rank.tolist(),
            "slot_to_expert": placement.slot_to_expert.tolist(),
        }
    return document
