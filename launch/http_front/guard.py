"""Guard: what every request passes before and after the routes: the bearer token, errors, the count of answers."""

import logging

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeplace.launch.http_front.dashboard import PAGE, STATE
from moeplace.launch.http_front.keys import ANYBODY, Keys
from moeplace.launch.http_front.wire.errors import ApiError, ClientGone
from moeplace.launch.http_front.wire.metrics import FrontMetrics

logger = logging.getLogger(__name__)

HEALTH, READY, LIVE = "/healthz", "/readyz", "/livez"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
REQUESTS = "/v1/requests"
ADMIN = "/admin/"
CLIENT = "moeplace.client"
"""Under which a request's scope says whose token it had."""
ADMINISTRATOR = "administrator"
ROUTES = (
    COMPLETIONS,
    CHAT,
    "/v1/models",
    HEALTH,
    READY,
    LIVE,
    "/metrics",
    *(f"{ADMIN}{name}" for name in ("scale", "status", "place", "drain", "replanning")),
    PAGE,
    STATE,
)
_OPEN = (HEALTH, READY, LIVE, PAGE)
"""Need no token: they say nothing of requests."""
_OTHER = "other"
_CLIENT_GONE = 499
"""The status under which requests are counted whose client did not wait (nginx's number)."""


class Guard:
    """ASGI middleware.

    Args:
        app: what it protects.
        keys: bearer tokens of every route but the health checks and the empty page.
        metrics: where answers are counted.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, metrics: FrontMetrics) -> None:
        self._app, self._metrics, self._keys = app, metrics, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: list[int] = []

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
            await send(message)

        try:
            scope[CLIENT] = self._client_of(scope)
            if scope[CLIENT] is not None:
                await self._app(scope, receive, send_and_note)
            else:
                await _refusal().response()(scope, receive, send_and_note)
        except ClientGone as error:
            logger.info("%s: %s", scope["path"], error)
            status[:] = [_CLIENT_GONE]
        except Exception as error:  # a defect of ours; the routes have answered it
            logger.error("%s: internal error: %s: %s", scope["path"], type(error).__name__, error)
            logger.debug("where it came from", exc_info=True)
        finally:
            self._metrics.http_requests.labels(_route(scope["path"]), str(status[0] if status else _CLIENT_GONE)).inc()

    def _client_of(self, scope: Scope) -> str | None:
        """Who may come in, None = nobody; by the path that routes see, which no header can change."""
        if scope["path"] in _OPEN:
            return ANYBODY
        given = Headers(scope=scope).get("authorization", "")
        if scope["path"].startswith(ADMIN):
            return ADMINISTRATOR if self._keys.opens_administration(given) else None
        return self._keys.client_of(given)


def _route(path: str) -> str:
    """Under which an answer is counted: names that clients give make no series."""
    if path.startswith(f"{REQUESTS}/"):
        return REQUESTS
    return path if path in ROUTES else _OTHER


def _refusal() -> ApiError:
    return ApiError(
        401, "a valid bearer token is needed", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
    )
