"""EngineClient: requests to a running engine's HTTP server, each with a timeout, every failure one sentence."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from moeplace.profiling.errors import InputError, MoeplaceError

_MOST_ANSWER = 2**28
"""Bytes of an answer that are read: 100,000 tokens of 61 layers x 8 experts, as base64."""


class EngineUnreachableError(MoeplaceError):
    """The engine does not answer, or answers with an error; it may again later."""


class EngineClient:
    """Talks to one server.

    Attributes:
        url: of the server, without a path.
        timeout: seconds of each request.
    """

    def __init__(self, url: str, *, timeout: float, api_key: str = "") -> None:
        """Args: `api_key` is sent as a bearer token; "" = none.

        Raises:
            InputError: `url` is no HTTP address.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"URL ({url}) must be the address of a server, such as http://127.0.0.1:30000")
        self.url, self.timeout = url.rstrip("/"), timeout
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The answer to a POST of a JSON body.

        Raises:
            EngineUnreachableError: there is none, it is too long, or its status is an error's.
        """
        data = b"" if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                content: bytes = answer.read(_MOST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(300).decode(errors="replace").split())
            raise EngineUnreachableError(f"{self.url}{path} answers {error.code}: {said or error.reason}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise EngineUnreachableError(f"{self.url}{path} does not answer: {reason}") from error
        if len(content) > _MOST_ANSWER:
            raise EngineUnreachableError(f"{self.url}{path} answers more than {_MOST_ANSWER} bytes")
        return content
