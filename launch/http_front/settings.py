"""FrontSettings: what the HTTP front offers and what it refuses."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeplace.launch.http_front.keys import ADMIN_KEY_VARIABLE, KEY_VARIABLE
from moeplace.profiling.errors import InputError
from moeplace.profiling.files import require_file

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class FrontSettings:
    """See the module.

    Attributes:
        model: name of the model, as clients give it.
        api_key: what clients must send as a bearer token; None = nothing.
        client_keys: the same for several clients by name, who share the service fairly.
        admin_key: what the administration wants instead; None = every token opens it.
        admin: whether there is an administration; needs a token.
        dashboard: whether there is a live page.
        max_ranks: most ranks that clients may ask for; None = as many as there can be.
        max_body_bytes: of a request's body.
        max_prompt_tokens: of one prompt; None = what the service can hold.
        max_tokens: most tokens of a completion that may be asked for; None = what the service can hold.
        max_concurrent: completions under way at once; every prompt counts `n` times.
        max_queue: completions that may wait for that.
        queue_timeout: seconds that a request may wait there; None = as long as its client does.
        request_timeout: seconds from a request's head to the end of its answer; None = no limit.
        body_timeout: seconds that a client has to send a body.
        stall_timeout: seconds that a client may go without taking any of what waits for it.
        drain_grace: seconds after a signal in which requests are still taken, while health checks say that no more
            should be sent: load balancers need a while.
        drain_timeout: seconds that requests under way then have to finish.
        tls_certificate, tls_key: files in PEM format; None = no TLS.
        seed: of the seeds of requests that bring none.
        keeps_requests: the service keeps what a shutdown interrupts, for the one that is started after it.
        patience: seconds that the health check waits for the service.
        precision: "exact", or what is not, for the health check to say.

    Raises:
        InputError: a value is out of range.
    """

    model: str
    api_key: str | None = None
    client_keys: Mapping[str, str] = field(default_factory=dict)
    admin_key: str | None = None
    admin: bool = False
    dashboard: bool = False
    max_ranks: int | None = None
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_concurrent: int = 256
    max_queue: int = 1024
    queue_timeout: float | None = None
    request_timeout: float | None = None
    body_timeout: float = 30.0
    stall_timeout: float = 60.0
    drain_grace: float = 0.0
    drain_timeout: float = 30.0
    tls_certificate: str | None = None
    tls_key: str | None = None
    seed: int = 0
    keeps_requests: bool = False
    patience: float = 2.0
    precision: Any = "exact"

    def __post_init__(self) -> None:
        if not self.model:
            raise InputError("the model's name is empty; clients need one")
        if self.admin and self.api_key is None and not self.client_keys and self.admin_key is None:
            sources = f"--admin-key-file, {ADMIN_KEY_VARIABLE}, --api-key-file or {KEY_VARIABLE}"
            raise InputError(f"--admin needs a bearer token: {sources}")
        if self.max_queue < 0:
            raise InputError(f"max_queue ({self.max_queue}) must be at least 0")
        for name in ("queue_timeout", "request_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} ({value}) must be a positive number of seconds")
        for name in ("max_body_bytes", "max_prompt_tokens", "max_tokens", "max_concurrent", "max_ranks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} ({value}) must be at least 1")
        for name in ("body_timeout", "stall_timeout", "drain_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} ({getattr(self, name)}) must be a positive number of seconds")
        if not 0 <= self.drain_grace < float("inf"):
            raise InputError(f"drain_grace ({self.drain_grace}) must be a number of seconds, 0 or more")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise InputError("TLS needs both files, --tls-certificate and --tls-key")
        if self.tls_certificate is not None:
            check_tls_files(self.tls_certificate, str(self.tls_key))

    @property
    def tls_options(self) -> dict[str, Any]:
        """Options of uvicorn."""
        if self.tls_certificate is None:
            return {}
        return {"ssl_certfile": self.tls_certificate, "ssl_keyfile": str(self.tls_key)}


def check_tls_files(certificate: str, key: str) -> None:
    """Whether a certificate and a key can be read and belong together.

    Raises:
        InputError: they do not.
    """
    for path in (certificate, key):
        require_file(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")  # never ask a terminal
    except (ssl.SSLError, OSError) as error:
        raise InputError(f"{certificate} and {key} cannot be used for TLS: {error}") from error


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `:PORT` (loopback) or `[IPv6]:PORT`; port 0 = any free one.

    Raises:
        InputError: it is none of these.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise InputError(f"the address {text!r} must have an IPv6 host in brackets, [HOST]:PORT")
    if not colon or not port.isdecimal() or not port.isascii() or int(port) > 65535:
        raise InputError(f"the address {text!r} must be HOST:PORT with a port in 0..65535")
    return host or LOOPBACK[0], int(port)
