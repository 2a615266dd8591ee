"""What a front answers while its ranks start: that it lives, and is not ready.

A listening socket without anybody behind it would let clients wait, and a closed one looks like a crash. So somebody
answers from the moment at which the address is taken; the same socket then goes to the front, and no connection that
waits in it is lost.
"""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from moeplace.launch.http_front.wire.errors import ApiError

LIVE = "/livez"
READY = ("/readyz", "/healthz")
_RETRY_AFTER = "5"


async def answer_while_loading(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application: 200 for /livez, 503 for everything else."""
    if scope["type"] != "http":
        return
    status = 200 if scope["path"] == LIVE else 503
    document: dict[str, Any]
    if status == 200:
        document = {"alive": True}
    elif scope["path"] in READY:
        document = {"state": "starting", "serving": False, "reason": "the ranks are starting"}
    else:
        document = ApiError(503, "not serving: the ranks are starting", code="loading").document()
    content = json.dumps(document).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"cache-control", b"no-store"),
        (b"connection", b"close"),  # the next request is for the front
    ]
    if status != 200:
        headers.append((b"retry-after", _RETRY_AFTER.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


@contextmanager
def answering_while_loading(listener: socket.socket, **options: Any) -> Iterator[None]:
    """Answer on a listening socket, in a thread, until the block ends; the socket stays open.

    Args:
        options: of `uvicorn.Config`, such as those of TLS.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            answer_while_loading,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
            **options,
        )
    )
    thread = threading.Thread(target=server.run, args=([listener.dup()],), name="loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
