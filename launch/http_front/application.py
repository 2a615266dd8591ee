"""HttpFront: the routes of the HTTP front, over a `Service`.

POST /v1/completions, /v1/chat/completions   GET /v1/requests/ID   GET /v1/models   GET /healthz   GET /metrics
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from moeplace.launch.http_front.administration import Permit, admin_routes
from moeplace.launch.http_front.completions.answer import CompletionAnswer, while_connected
from moeplace.launch.http_front.completions.body import CompletionBody, parse_body
from moeplace.launch.http_front.completions.chat import Message, parse_chat_body
from moeplace.launch.http_front.completions.forms import AnswerForm, ChatForm, TextForm
from moeplace.launch.http_front.completions.note import write_note
from moeplace.launch.http_front.completions.run import CompletionRun, EventBridge
from moeplace.launch.http_front.dashboard import dashboard_routes
from moeplace.launch.http_front.fair_queue import FairQueue
from moeplace.launch.http_front.guard import CHAT, CLIENT, COMPLETIONS, HEALTH, LIVE, READY, Guard
from moeplace.launch.http_front.health import HealthCheck
from moeplace.launch.http_front.keys import Keys, owned_name
from moeplace.launch.http_front.requests import RequestRoutes, caller_id, new_id
from moeplace.launch.http_front.settings import FrontSettings
from moeplace.launch.http_front.wire.errors import ApiError, unavailable
from moeplace.launch.http_front.wire.metrics import FrontMetrics
from moeplace.launch.http_front.wire.request_body import parse_json, read_body
from moeplace.profiling.errors import MoeplaceError
from moeplace.runtime.service.api import Service, ServiceStatus

_LONG_BODY = 16384
"""Bytes of a body from which its text is tokenised in a thread: the loop must not wait."""
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class TextCoder(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks; InputError = the template refuses it."""


class HttpFront:
    """See the module.

    Args:
        service: what completes.
        settings: name, limits, bearer token.
        coder: the model's tokenizer; None = it has none: prompts are token ids and texts are empty.
        stop_ids: the model's end-of-sequence ids.
        permit: what the administration allows or forbids.

    Attributes:
        application: the ASGI application.
        metrics: what it counts.
    """

    def __init__(
        self,
        service: Service,
        settings: FrontSettings,
        *,
        coder: TextCoder | None,
        stop_ids: Sequence[int],
        permit: Permit | None = None,
    ) -> None:
        permit = permit or Permit()
        self._service, self._settings, self._stop_ids = service, settings, tuple(stop_ids)
        self._encode = None if coder is None else coder.encode
        self._render = None if coder is None else coder.render_chat
        self._decode: Callable[[Sequence[int]], str] = (lambda token_ids: "") if coder is None else coder.decode
        self._seeds = random.Random(settings.seed)
        self._started = int(time.time())
        self._runs: dict[CompletionRun, str] = {}  # and whose they are
        self._queue = FairQueue(settings.max_concurrent, settings.max_queue)
        self._draining = self._ending = False
        self._bridge: EventBridge | None = None
        self._health_check = HealthCheck(service, patience=settings.patience)
        self.metrics = FrontMetrics(service, self._queue, model=settings.model, precision=settings.precision)
        keys = Keys(settings.api_key, settings.client_keys, settings.admin_key)
        self.application: ASGIApp = Guard(self._routes(permit), keys=keys, metrics=self.metrics)

    def announce_end(self) -> None:
        """Let health checks fail; requests are still taken."""
        self._ending = True

    def refuse_new(self) -> None:
        """Finish what runs, take nothing more."""
        self._draining = self._ending = True

    def abandon(self) -> None:
        """End what still runs with an error; a service that keeps requests goes on with it after the next start."""
        kept = self._settings.keeps_requests
        more = "; ask for the request again by its id" if kept else ""
        for run in list(self._runs):
            run.give_up(f"the server is shutting down{more}", cancel=not kept)
        self._queue.close("the server is shutting down")

    def _routes(self, permit: Permit) -> Starlette:
        application = Starlette(
            routes=[
                Route(COMPLETIONS, self._complete_text, methods=["POST"]),
                Route(CHAT, self._complete_chat, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._model),
                Route(HEALTH, self._health),
                Route(READY, self._health),
                Route(LIVE, self._live),
                Route("/metrics", self._metrics),
                *RequestRoutes(
                    self._service, self._settings, bridge=self._bridge_to_loop, decode=self._decode
                ).routes(),
                *(admin_routes(self._service, self._settings.max_ranks, permit) if self._settings.admin else ()),
                *(dashboard_routes(self._service) if self._settings.dashboard else ()),
            ],
            exception_handlers={
                ApiError: _answer_error,
                HTTPException: _answer_http_error,
                Exception: _answer_defect,
            },
            lifespan=self._lifespan,
        )
        application.router.redirect_slashes = False  # it would send clients to whatever the Host header says
        return application

    @asynccontextmanager
    async def _lifespan(self, application: Starlette) -> AsyncIterator[None]:
        self._bridge = EventBridge(asyncio.get_running_loop())
        yield
        self._bridge.close()
        self._health_check.close()

    def _bridge_to_loop(self) -> EventBridge:
        assert self._bridge is not None  # made at startup
        return self._bridge

    async def _complete_text(self, request: Request) -> Response:
        return await self._complete(request, TextForm(), partial(parse_body, encode=self._encode))

    async def _complete_chat(self, request: Request) -> Response:
        return await self._complete(request, ChatForm(), partial(parse_chat_body, render=self._render))

    async def _complete(self, request: Request, form: AnswerForm, parse: Callable[..., CompletionBody]) -> Response:
        started = time.perf_counter()
        self._require_room(1)
        given, limit = caller_id(request), self._time_limit(request)
        body = await self._read(request, parse)
        self._require_room(body.num_choices)  # others came while it was read
        client = request.scope[CLIENT]
        await self._wait_for_room(request, client, body.num_choices, limit)
        try:
            run, answer = self._make_run(body, form, client, given, started)
        except BaseException:
            self._queue.leave(client, body.num_choices)
            raise
        self._enter(run, client)
        try:
            await run.start()
        except BaseException:
            self._leave(run)
            raise
        if limit is not None:
            run.expire_after(limit, started)
        if body.background and not body.stream:
            return JSONResponse(answer.state(), 202, {"X-Request-Id": answer.caller_id})
        return answer  # type: ignore[return-value]  # Starlette calls what an endpoint returns as an application

    def _make_run(
        self, body: CompletionBody, form: AnswerForm, client: str, given: str | None, started: float
    ) -> tuple[CompletionRun, CompletionAnswer]:
        """A run and its answer. What is in the background ends when it is done, all else when nobody waits for it."""
        created, name = int(time.time()), f"{form.prefix}-{given or new_id()}"

        def leave() -> None:
            self._leave(run)
            self.metrics.request_seconds.observe(time.perf_counter() - started)

        run = CompletionRun(
            self._service,
            self._bridge_to_loop(),
            self.metrics,
            body,
            name=owned_name(client, name),
            decode=self._decode,
            note=write_note(body, form, created=created),
            is_kept=body.background,
            on_done=leave if body.background else None,
        )
        answer = CompletionAnswer(
            run,
            form,
            name=name,
            caller_id=given or name,
            created=created,
            model=self._settings.model,
            stall_timeout=self._settings.stall_timeout,
            on_end=(lambda: None) if body.background else leave,
        )
        return run, answer

    def _require_room(self, choices: int) -> None:
        if self._draining:
            raise unavailable("the server is shutting down")
        self._queue.require_room(choices)

    async def _wait_for_room(self, request: Request, client: str, choices: int, limit: float | None) -> None:
        """Take a place among those that are under way; a client that goes away waits no longer.

        Raises:
            ApiError: 429 or 503, there is none.
        """
        limits = [seconds for seconds in (self._settings.queue_timeout, limit) if seconds is not None]
        started = time.perf_counter()
        if not self._queue.enter_now(client, choices):
            waiting = self._queue.enter(client, choices, timeout=min(limits, default=None))
            await while_connected(request.receive, waiting)
        self.metrics.queue_seconds.observe(time.perf_counter() - started)

    def _time_limit(self, request: Request) -> float | None:
        """Seconds that a request may take: what the server says, or less where its client wants that."""
        given = request.headers.get("x-request-timeout")
        most = self._settings.request_timeout
        if given is None:
            return most
        with suppress(ValueError):
            if 0 < (seconds := float(given)) < float("inf"):
                return seconds if most is None else min(seconds, most)
        raise ApiError(400, "X-Request-Timeout must be a positive number of seconds", param="X-Request-Timeout")

    async def _read(self, request: Request, parse: Callable[..., CompletionBody]) -> CompletionBody:
        """Read and check the body, within the limits."""
        content = await read_body(request, self._settings.max_body_bytes, self._settings.body_timeout)

        def read() -> CompletionBody:
            return parse(
                parse_json(content),
                model=self._settings.model,
                model_stop_ids=self._stop_ids,
                default_seed=seed,
            )

        seed = self._seeds.getrandbits(31)
        body = await asyncio.to_thread(read) if len(content) > _LONG_BODY else read()
        self._check_limits(body)
        return body

    def _check_limits(self, body: CompletionBody) -> None:
        settings = self._settings
        longest = max(len(prompt.token_ids) for prompt in body.prompts)
        if settings.max_prompt_tokens is not None and longest > settings.max_prompt_tokens:
            rule = f"a prompt has {longest} tokens, at most {settings.max_prompt_tokens} are possible"
            raise ApiError(400, rule, param="prompt", code="context_length_exceeded")
        if settings.max_tokens is not None and body.max_tokens > settings.max_tokens:
            rule = f"max_tokens ({body.max_tokens}) must be at most {settings.max_tokens}"
            raise ApiError(400, rule, param="max_tokens")
        if body.num_choices > settings.max_concurrent:
            rule = f"{body.num_choices} completions in one request are too many; at most {settings.max_concurrent}"
            raise ApiError(400, rule, param="n")

    def _enter(self, run: CompletionRun, client: str) -> None:
        self._runs[run] = client
        self.metrics.prompt.inc(run.usage["prompt_tokens"])

    def _leave(self, run: CompletionRun) -> None:
        if run not in self._runs:
            return
        self._queue.leave(self._runs.pop(run), len(run.choices))

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_document()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] != self._settings.model:
            raise ApiError(404, f"the model {request.path_params['model']!r} does not exist", code="model_not_found")
        return JSONResponse(self._model_document())

    def _model_document(self) -> dict[str, object]:
        return {"id": self._settings.model, "object": "model", "created": self._started, "owned_by": "moeplace"}

    async def _health(self, request: Request) -> Response:
        try:
            status = await self._health_check.status()
        except MoeplaceError as error:  # whatever ails it, who asks must hear that it does not serve
            document = {"serving": False, "reason": str(error)}
            return JSONResponse(document, 503, {"Cache-Control": "no-store"})
        serving = status.serving and not self._ending
        document = {
            "serving": serving,
            "state": self._state(status),
            "reason": status.reason or ("the server is shutting down" if self._ending else ""),
            "generation": status.generation,
            "placement_version": status.placement_version,
            "desired": status.desired,
            "active": len(status.active),
            "precision": self._settings.precision,
        }
        return JSONResponse(document, 200 if serving else 503, {"Cache-Control": "no-store"})

    def _state(self, status: ServiceStatus) -> str:
        """One word: starting, ready, changing (ranks or experts; requests are taken), draining, or unavailable."""
        if self._ending:
            return "draining"
        if status.serving:
            return "changing" if status.changing else "ready"
        return "starting" if status.generation == 0 and not status.ended else "unavailable"

    async def _live(self, request: Request) -> Response:
        """Whether there is any use in letting this process go on; a service that is busy has not ended."""
        ended = False
        with suppress(MoeplaceError):
            ended = (await self._health_check.status()).ended
        return JSONResponse({"alive": not ended}, 503 if ended else 200, {"Cache-Control": "no-store"})

    async def _metrics(self, request: Request) -> Response:
        content = await asyncio.to_thread(self.metrics.render)  # asks the service, which may be busy
        return Response(content, headers={"content-type": _METRICS_TYPE})


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, another method."""
    assert isinstance(error, HTTPException)
    return ApiError(
        error.status_code, f"{request.method} {request.scope['path']}: {error.detail}", headers=error.headers
    ).response()


async def _answer_defect(request: Request, error: Exception) -> Response:
    return ApiError(500, "internal error", code="internal_error").response()
