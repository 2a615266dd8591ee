"""Keys: the bearer tokens of a front: who may come in, who they are, and who may change the service."""

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from moeplace.profiling.errors import InputError
from moeplace.profiling.files import require_file

KEY_VARIABLE, ADMIN_KEY_VARIABLE = "MOEPLACE_API_KEY", "MOEPLACE_ADMIN_KEY"
ANYBODY = "anybody"
"""The client where no token is needed, or all have the same."""


class Keys:
    """See the module. Tokens are kept as digests of one length, and compared in a time that tells nothing.

    Args:
        api_key: of a client without a name; None = there is none.
        clients: name -> token.
        admin_key: of the administration; None = every token opens it.
    """

    def __init__(self, api_key: str | None, clients: Mapping[str, str], admin_key: str | None) -> None:
        named = {**({} if api_key is None else {ANYBODY: api_key}), **clients}
        self._clients = {name: _digest(token) for name, token in named.items()}
        self._admin = None if admin_key is None else _digest(admin_key)

    def client_of(self, authorization: str) -> str | None:
        """Whose token a header has; None = nobody's."""
        if not self._clients:
            return ANYBODY
        given = _token_digest(authorization)
        found = [name for name, expected in self._clients.items() if hmac.compare_digest(given, expected)]
        return found[0] if found else None

    def opens_administration(self, authorization: str) -> bool:
        """Whether a header has the token of the administration."""
        if self._admin is None:
            return self.client_of(authorization) is not None
        return hmac.compare_digest(_token_digest(authorization), self._admin)


def owned_name(client: str, name: str) -> str:
    """The name under which the service knows a client's request: clients with names meet only requests of their own.

    A blank ends the client's name: no id that is given has one, so nobody can name the request of another.
    """
    return name if client == ANYBODY else f"{client} {name}"


def read_api_key(path: str | Path | None, variable: str = KEY_VARIABLE) -> str | None:
    """The bearer token: the first line of a file, or else an environment variable, or none.

    Raises:
        InputError: the file is missing or empty, or the token cannot be sent in a header.
    """
    if path is None:
        key = os.environ.get(variable)
        return None if key is None else _check(key, variable)
    return _check((_read_lines(path) or [""])[0].strip(), str(path))


def read_client_keys(path: str | Path | None) -> dict[str, str]:
    """Name -> token, from a file with a line `NAME TOKEN` for each client; empty lines and those with # do not count.

    Raises:
        InputError: a line is none, or two have the same name or token.
    """
    found: dict[str, str] = {}
    for number, line in enumerate([] if path is None else _read_lines(path), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise InputError(f"{path} line {number} must be a client's name and its token")
        if words[0] == ANYBODY:
            raise InputError(f"{path} line {number}: the name {ANYBODY!r} is that of clients without a name")
        if words[0] in found or words[1] in found.values():
            raise InputError(f"{path} line {number} repeats a name or a token")
        found[words[0]] = _check(words[1], f"{path} line {number}")
    if path is not None and not found:
        raise InputError(f"{path} names no client")
    return found


def _read_lines(path: str | Path) -> list[str]:
    try:
        return require_file(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file: {error}") from error


def _check(key: str, source: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{source} must hold a bearer token of printable ASCII characters without blanks")
    return key


def _token_digest(authorization: str) -> bytes:
    """Of the token of a header; of nothing that anybody could have where the scheme is another one (RFC 7235)."""
    kind, _, token = authorization.partition(" ")
    return _digest(token.strip()) if kind.lower() == "bearer" else b""


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
