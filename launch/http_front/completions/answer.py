"""The answer to a completion request: one JSON document, or server-sent events as tokens come."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from moeplace.launch.http_front.completions.forms import AnswerForm
from moeplace.launch.http_front.completions.run import Choice, CompletionRun
from moeplace.launch.http_front.wire.errors import ApiError, ClientGone

_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy must pass pieces on as they come
)


class CompletionAnswer:
    """Writes a run's answer. An ASGI application for this one request.

    Args:
        form: what its objects look like.
        name: `id` of the answer.
        caller_id: name under which the client can ask again, in the header.
        model: name of the model.
        stall_timeout: seconds that the client may go without taking anything.
        on_end: called when all is written, or nobody is there to read it.

    Attributes:
        caller_id: see above.
    """

    def __init__(
        self,
        run: CompletionRun,
        form: AnswerForm,
        *,
        name: str,
        caller_id: str,
        created: int,
        model: str,
        stall_timeout: float,
        on_end: Callable[[], None],
    ) -> None:
        self._run, self._form, self.caller_id = run, form, caller_id
        self._stall_timeout, self._on_end = stall_timeout, on_end
        self._head = {
            "id": name,
            "object": form.piece_object if run.body.stream else form.whole_object,
            "created": created,
            "model": model,
        }
        self._begun: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._stall_timeout):
                    await send(message)
            except TimeoutError as error:
                raise ClientGone(f"nothing was taken for {self._stall_timeout:g} s") from error

        work = self._stream(send_in_time) if self._run.body.stream else self._whole(scope, receive, send_in_time)
        try:
            with self._run:
                await while_connected(receive, work)
        finally:
            self._on_end()

    async def _whole(self, scope: Scope, receive: Receive, send: Callable[[Message], Awaitable[None]]) -> None:
        await self._run.wait_until_done()
        if self._run.error is not None:
            await self._failure().response()(scope, receive, send)
            return
        content = json.dumps(self.document()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, self._id_header()]})
        await send({"type": "http.response.body", "body": content})

    def document(self) -> dict[str, Any]:
        """The answer as far as it has come."""
        choices = [self._choice(choice, choice.finish_reason) for choice in self._run.choices]
        return {**self._head, "choices": choices, "usage": self._run.usage}

    def state(self) -> dict[str, Any]:
        """The answer as far as it has come, how it stands, and what went wrong."""
        run, status = self._run, "in_progress"
        if run.error is not None:
            status = "cancelled" if self._is_given_up else "failed"
        elif run.is_done:
            status = "completed"
        return {**self.document(), "status": status, **(self._failure().document() if run.error is not None else {})}

    async def _stream(self, send: Callable[[Message], Awaitable[None]]) -> None:
        headers = [*_STREAM_HEADERS, self._id_header()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        ended: set[int] = set()
        while True:
            for (
                choice
            ) in self._run.choices:  # one piece of all that has gathered: a slow reader gets fewer, longer ones
                reason = choice.finish_reason
                if choice.error is None and choice.index not in ended and (reason or any(choice.pieces)):
                    await send(self._event(self._chunk([self._choice(choice, reason)])))
                    if reason is not None:
                        ended.add(choice.index)
            if len(ended) == len(self._run.choices) or self._run.error is not None:
                break
            await self._run.wait()
        if self._run.error is not None:
            await send(self._event(self._failure().document()))
        else:
            if self._run.body.include_usage:
                await send(self._event({**self._head, "choices": [], "usage": self._run.usage}))
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "choices": choices}
        return {**chunk, "usage": None} if self._run.body.include_usage else chunk

    def _choice(self, choice: Choice, reason: str | None) -> dict[str, Any]:
        text, tokens = choice.take_text(), self._run.take_texts(choice)
        if self._run.body.stream:
            shown = self._form.piece(text, tokens, first=choice.index not in self._begun)
            self._begun.add(choice.index)
        else:
            shown = self._form.whole(text, tokens)
        document = {"index": choice.index, **shown, "finish_reason": reason}
        if self._run.body.return_token_ids:
            document["token_ids"] = choice.take_ids()
        return document

    def _failure(self) -> ApiError:
        """The first choice that failed speaks for the request: half an answer is none."""
        if self._run.is_expired:
            return ApiError(504, f"the completion ended early: {self._run.error}", code="deadline_exceeded")
        return ApiError(
            503 if self._is_given_up else 500, f"the completion ended early: {self._run.error}", code="failed"
        )

    @property
    def _is_given_up(self) -> bool:
        return any(choice.finish_reason == "cancelled" for choice in self._run.choices)

    def _id_header(self) -> tuple[bytes, bytes]:
        return (b"x-request-id", self.caller_id.encode())

    def _event(self, document: dict[str, Any]) -> Message:
        """A server-sent event; its id, where one is wanted, says what the client has once it has this event."""
        mark = f"id: {write_position(self._run.choices)}\n" if self._run.body.include_event_ids else ""
        content = f"{mark}data: {json.dumps(document)}\n\n".encode()
        return {"type": "http.response.body", "body": content, "more_body": True}


def write_position(choices: Sequence[Choice]) -> str:
    """How much of each choice has been taken: characters, token ids, and tokens with log-probabilities."""
    return ",".join(f"{choice.taken_text}:{choice.taken_ids}:{choice.taken_shown}" for choice in choices)


def skip_to_position(choices: Sequence[Choice], position: str) -> None:
    """Give out only what follows a position.

    Raises:
        ApiError: 400, it is none of these choices.
    """
    parts = [re.fullmatch(r"(\d{1,9}):(\d{1,9}):(\d{1,9})", part, re.ASCII) for part in position.split(",")]
    known = [tuple(map(int, part.groups())) for part in parts if part is not None]
    if len(known) != len(parts) or len(parts) != len(choices):
        raise ApiError(400, "Last-Event-ID must be the id of an event of the same request")
    for choice, position_of_choice in zip(choices, known, strict=True):
        choice.taken_text, choice.taken_ids, choice.taken_shown = position_of_choice


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end, or until the client is gone.

    Raises:
        ClientGone: it is.
    """
    worker, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone("the client closed the connection")
        worker.result()
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
