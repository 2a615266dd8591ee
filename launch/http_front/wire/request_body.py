"""The body of a request, within limits of kind, size and time; and its JSON."""

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from moeplace.launch.http_front.wire.errors import ApiError, ClientGone

_MOST_SKIPPED = 64 << 20
"""Bytes of an oversized body that are read to be thrown away."""


async def read_body(request: Request, limit: int, timeout: float) -> bytes:
    """The body of a JSON request.

    Raises:
        ApiError: 415, it is said to be something else; 413, it is longer than `limit` bytes; 408, it takes longer than
            `timeout` seconds.
        ClientGone: the client closed the connection.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # what a web page may send without asking is refused with everything else
        raise ApiError(415, "the content type must be application/json")
    declared = request.headers.get("content-length", "0")
    content = bytearray()
    skipped = 0
    try:
        async with asyncio.timeout(timeout):
            async for piece in request.stream():
                if len(content) + len(piece) > limit or int(declared) > limit:
                    # Not kept. Closing while a client still sends resets the connection, and the answer with it.
                    skipped += len(piece)
                    if skipped > _MOST_SKIPPED:
                        break
                else:
                    content += piece
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {timeout:g} s", headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise ClientGone("the client closed the connection before its request was complete") from error
    if skipped:
        rule = f"the body is longer than {limit} bytes"
        raise ApiError(413, rule, code="body_too_large", headers={"Connection": "close"})
    return bytes(content)


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ApiError: 400, it is none.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object")
    return document
