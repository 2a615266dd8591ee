"""CompletionRun: the choices of one HTTP request, in flight on a service.

The service's thread posts events; the event loop takes them, turns tokens into text and wakes whoever writes the
answer. What waits for a slow reader is the text of its own request, which `max_tokens` bounds.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from moeplace.launch.http_front.completions.body import CompletionBody, Prompt
from moeplace.launch.http_front.completions.text_stream import Decode, TextStream
from moeplace.launch.http_front.completions.token_texts import TokenTexts
from moeplace.launch.http_front.wire.errors import ApiError, unavailable
from moeplace.launch.http_front.wire.metrics import FrontMetrics
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.service.api import FinishReason, RequestRecord, Service, TokenEvent

Take = Callable[[TokenEvent, float], None]


class EventBridge:
    """Brings events from the service's thread to the event loop: all that have gathered in one call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._posted: list[tuple[Take, TokenEvent, float]] = []
        self._aside = ThreadPoolExecutor(1, "front-aside")

    def aside(self, call: Callable[[], object]) -> None:
        """From the loop: call what may wait for the service, in a thread and in order."""
        self._aside.submit(call)

    def close(self) -> None:
        """The loop ends; what was put aside is still called."""
        self._aside.shutdown(wait=False)

    def post(self, take: Take, event: TokenEvent) -> None:
        """From any thread: `take(event, now)` will be called in the loop."""
        with self._lock:
            self._posted.append((take, event, time.perf_counter()))
            if len(self._posted) > 1:
                return
        with suppress(RuntimeError):  # the loop has ended: nobody is left to hear of it
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
        for take, event, moment in posted:
            take(event, moment)


@dataclass(eq=False)
class Choice:
    """One completion.

    Attributes:
        index: its place in the answer.
        prompt: what it continues.
        request: what the service completes; None = no token is wanted.
        text: how its tokens become text.
        pieces: text that no writer has taken yet.
        token_ids: all so far, the stopping one included.
        logprobs: of the tokens, where they are wanted.
        taken_text, taken_ids, taken_shown: characters, token ids and tokens with log-probabilities that a writer has
            taken, or that the client had before.
        ticket: the service's name for it, once it is known there.
        shown, shown_characters: tokens that were looked at for that, and the characters of their texts.
        finish_reason: None = it goes on.
        error: why there will be no more, where it failed or was given up.
    """

    index: int
    prompt: Prompt
    request: Request | None
    text: TextStream
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    taken_text: int = 0
    taken_ids: int = 0
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    taken_shown: int = 0
    shown: int = 0
    shown_characters: int = 0
    ticket: str = ""
    finish_reason: FinishReason | None = None
    error: str | None = None
    last_moment: float = 0.0
    _given_text: int = 0

    def take_text(self) -> str:
        """What has gathered since the last call, without what the client has."""
        text = "".join(self.pieces)
        self.pieces.clear()
        known = max(self.taken_text - self._given_text, 0)
        self._given_text += len(text)
        self.taken_text = max(self.taken_text, self._given_text)
        return text[known:]

    def take_ids(self) -> list[int]:
        """Token ids since the last call."""
        new, self.taken_ids = self.token_ids[self.taken_ids :], max(self.taken_ids, len(self.token_ids))
        return new

    def take_texts(self, decode: Decode) -> TokenTexts:
        """Tokens with their log-probabilities since the last call."""
        start, end = self.shown, min(max(self.shown, self.taken_shown), len(self.token_ids))
        known = TokenTexts(self.token_ids[start:end], self.logprobs[start:end], self.shown_characters, decode)
        texts = TokenTexts(self.token_ids[end:], self.logprobs[end:], known.next_offset, decode)
        self.shown, self.shown_characters = len(self.token_ids), texts.next_offset
        self.taken_shown = max(self.taken_shown, self.shown)
        return texts


class CompletionRun:
    """See the module. A context: what has not finished at its end is cancelled, unless it is kept.

    Args:
        metrics: where tokens and ends are counted; None = nowhere.
        name: prefix of the names under which the service knows the choices.
        note: kept by the service with every choice.
        is_kept: whether it goes on when nobody waits for its answer.
        on_done: called, in the loop, when every choice has finished.

    Attributes:
        choices: prompts in order, each with its `n` completions.
        is_expired: whether what had not finished was given up because it took too long.
    """

    _deadline: asyncio.TimerHandle | None

    def __init__(
        self,
        service: Service,
        bridge: EventBridge,
        metrics: FrontMetrics | None,
        body: CompletionBody,
        *,
        name: str,
        decode: Decode,
        note: str = "",
        is_kept: bool = False,
        on_done: Callable[[], None] | None = None,
    ) -> None:
        self._service, self._bridge, self._metrics = service, bridge, metrics
        self._news, self._on_done = asyncio.Event(), on_done
        self.body, self._decode = body, decode
        self.is_kept, self._is_submitted = is_kept, False
        self._unwanted: list[Choice] = []
        self.is_expired, self._deadline = False, None
        try:
            self.choices = [_make_choice(body, index, name, decode, note) for index in range(body.num_choices)]
        except (InputError, OverflowError) as error:
            raise ApiError(400, str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_kept:
            self.give_up("the client went away")

    @property
    def is_done(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def error(self) -> str | None:
        """Of the first choice that has one."""
        return next((choice.error for choice in self.choices if choice.error is not None), None)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far; a prompt counts once, however often it is completed."""
        prompt = sum(len(prompt.token_ids) for prompt in self.body.prompts)
        completion = sum(len(choice.token_ids) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def take_texts(self, choice: Choice) -> TokenTexts | None:
        """Tokens of a choice with their log-probabilities since the last call; None = they are not wanted."""
        return None if self.body.logprobs is None else choice.take_texts(self._decode)

    async def start(self) -> None:
        """Give all choices to the service, or none. The service is called in a thread: it may be busy.

        Raises:
            ApiError: 400, one can never fit; 503, the service takes none.
        """
        now = time.perf_counter()
        for choice in self.choices:
            choice.last_moment = now
            if choice.request is None:
                self._finish(choice, "length")
        try:
            await asyncio.to_thread(self._submit)
        except InputError as error:
            self.give_up("another prompt of the same request was refused")
            raise ApiError(400, str(error), param="prompt", code="context_length_exceeded") from error
        except MoeplaceError as error:
            self.give_up("the service takes no requests")
            raise unavailable(str(error)) from error
        finally:
            self._is_submitted = True
            for choice in self._unwanted:
                self._cancel(choice)

    def follow(self, records: Sequence[RequestRecord]) -> None:
        """Take what came of choices that the service knows already, and hear of what is still to come; in a thread."""
        for choice, record in zip(self.choices, records, strict=True):
            choice.ticket, self._is_submitted = record.ticket, True
            self._service.follow(record.request.request_id, self._listener(choice))

    def show(self, records: Sequence[RequestRecord]) -> None:
        """Take what came of choices that the service knows already, and nothing more."""
        for choice, record in zip(self.choices, records, strict=True):
            choice.ticket, self._is_submitted = record.ticket, True
            name = record.request.request_id
            self._take(
                choice, TokenEvent(name, record.token_ids, record.finish_reason, record.error, record.logprobs), 0.0
            )

    def _submit(self) -> None:
        for choice in self.choices:
            if choice.request is not None:
                choice.ticket = self._service.submit(choice.request, self._listener(choice))

    def expire_after(self, seconds: float, started: float) -> None:
        """Give up what has not finished so many seconds after `started`, a moment of `time.perf_counter`."""

        def expire() -> None:
            if not self.is_done:
                self.is_expired = True
                self.give_up(f"it took longer than {seconds:g} s")

        self._deadline = asyncio.get_running_loop().call_later(started + seconds - time.perf_counter(), expire)

    async def wait(self) -> None:
        """Until something new has come since the last call."""
        await self._news.wait()
        self._news.clear()

    async def wait_until_done(self) -> None:
        """Until every choice has finished."""
        while not self.is_done:
            await self.wait()

    def give_up(self, reason: str, *, cancel: bool = True) -> None:
        """End what has not finished; without `cancel` for those who wait here alone."""
        for choice in self.choices:
            if choice.finish_reason is None:
                choice.error = reason
                self._finish(choice, "cancelled")
                if cancel:
                    self._cancel(choice)

    def _cancel(self, choice: Choice) -> None:
        """By its ticket, once that is known: others may use its name."""
        request, ticket = choice.request, choice.ticket
        if not self._is_submitted:  # a stop string came first
            self._unwanted.append(choice)
        elif request is not None and ticket:
            self._bridge.aside(lambda: self._service.cancel(request.request_id, ticket=ticket))

    def _listener(self, choice: Choice) -> Callable[[TokenEvent], None]:
        def take(event: TokenEvent, moment: float) -> None:
            self._take(choice, event, moment)

        return lambda event: self._bridge.post(take, event)

    def _take(self, choice: Choice, event: TokenEvent, moment: float) -> None:
        """In the loop: one event of the service."""
        if choice.finish_reason is not None:
            return  # a stop string came before, or nobody wants it any more
        if event.token_ids:
            first = not choice.token_ids
            if self._metrics is not None:
                self._metrics.saw_tokens(len(event.token_ids), moment - choice.last_moment, first=first)
            choice.last_moment = moment
        choice.token_ids += event.token_ids
        choice.logprobs += event.logprobs
        visible = event.token_ids[:-1] if event.finish_reason == "stop" else event.token_ids
        choice.pieces.append(choice.text.add(visible))
        if event.finish_reason is not None and not choice.text.stopped:
            choice.pieces.append(choice.text.finish())
        if choice.text.stopped:
            self._finish(choice, "stop")
            if event.finish_reason is None:
                self._cancel(choice)
        elif event.finish_reason is not None:
            if event.finish_reason in ("cancelled", "failed"):
                choice.error = event.error or "the service ended the request"
            self._finish(choice, event.finish_reason)
        self._news.set()

    def _finish(self, choice: Choice, reason: FinishReason) -> None:
        choice.finish_reason = reason
        if self._metrics is not None:
            self._metrics.completions.labels(reason).inc()
        self._news.set()
        if self.is_done:
            if self._deadline is not None:
                self._deadline.cancel()
            if self._on_done is not None:
                self._on_done()


def _make_choice(body: CompletionBody, index: int, name: str, decode: Decode, note: str) -> Choice:
    prompt = body.prompts[index // body.n]
    request = None
    if body.max_tokens:
        sampling = body.sampling_of(index)
        request = Request(
            f"{name}-{index}", prompt.token_ids, body.max_tokens, sampling, body.stop_ids, body.logprobs, note
        )
    choice = Choice(index, prompt, request, TextStream(decode, body.stops, prompt=prompt.token_ids))
    if body.echo:
        choice.pieces.append(decode(prompt.token_ids) if prompt.text is None else prompt.text)
    return choice
