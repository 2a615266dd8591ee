"""Runs an HTTP front: a socket, uvicorn, signals, and a shutdown that finishes what runs."""

import asyncio
import logging
import math
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from moeplace.launch.http_front.access_log import AccessLog
from moeplace.launch.http_front.application import HttpFront
from moeplace.launch.http_front.settings import LOOPBACK, FrontSettings
from moeplace.profiling.errors import InputError, MoeplaceWarning

_BACKLOG = 2048
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOOK = 0.1
"""Seconds between two looks, in the grace before the socket is closed, whether it is to end at once."""
_LAST_WORDS = 5
"""Seconds beyond the drain timeout in which the errors of abandoned requests are written."""


def bind(host: str, port: int, settings: FrontSettings) -> socket.socket:
    """A listening socket.

    Raises:
        InputError: the address is not one of this machine, or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it: the system closes those whose peer takes nothing, even after we have let go of them.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.stall_timeout * 1000))
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    if host not in LOOPBACK and settings.api_key is None and not settings.client_keys:
        warnings.warn(
            f"serving on {host} without a bearer token: whoever reaches it can use it", MoeplaceWarning, stacklevel=2
        )
    return listener


def address_of(listener: socket.socket, settings: FrontSettings) -> str:
    """`http://HOST:PORT`, with the port that it got."""
    host, port = listener.getsockname()[:2]
    scheme = "http" if settings.tls_certificate is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def run_front(
    front: HttpFront, listener: socket.socket, settings: FrontSettings, *, on_ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs.

    After the first signal health checks fail, and `drain_grace` seconds later the socket is closed; requests under way
    have `drain_timeout` seconds then. A second SIGINT ends at once.

    Args:
        settings: times and TLS.
        on_ready: called when requests are answered.
    """
    with _signals_survived():
        FrontServer(front, settings, on_ready=on_ready).run(sockets=[listener])


class FrontServer(uvicorn.Server):
    """uvicorn with a front: it says when requests are answered, and gives those that run their time at the end."""

    def __init__(self, front: HttpFront, settings: FrontSettings, *, on_ready: Callable[[], None]) -> None:
        logging.getLogger("uvicorn").setLevel(
            logging.CRITICAL
        )  # it reports with tracebacks what `Guard` says in one line
        super().__init__(
            uvicorn.Config(
                AccessLog(front.application),
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(settings.drain_timeout) + _LAST_WORDS,
                **settings.tls_options,
            )
        )
        self._front, self._settings, self._on_ready = front, settings, on_ready

    def stop(self) -> None:
        """What the first signal does; may be called from any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._front.announce_end()
        loop = asyncio.get_running_loop()
        ready_to_close = loop.time() + self._settings.drain_grace
        while loop.time() < ready_to_close and not self.force_exit:
            await asyncio.sleep(min(_LOOK, self._settings.drain_grace))
        self._front.refuse_new()
        abandon = loop.call_later(self._settings.drain_timeout, self._front.abandon)
        try:
            await super().shutdown(sockets=sockets)
        finally:
            abandon.cancel()


@contextmanager
def _signals_survived() -> Iterator[None]:
    """uvicorn raises the signals that ended it once more; a clean end is none of theirs."""
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
