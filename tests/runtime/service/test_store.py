"""The control plane: who may reach it, and who is believed."""

import json
import socket
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from moeplace.profiling.errors import InputError
from moeplace.runtime.service.store import ForgedError, ServiceEndedError, ServiceStore, serve_store


@pytest.fixture
def server() -> dist.TCPStore:
    return serve_store("127.0.0.1")


def connect(server: dist.TCPStore, secret: str = "s", prefix: str = "p") -> ServiceStore:
    return ServiceStore.connect("127.0.0.1", server.port, prefix, secret)


def listening(port: int) -> list[str]:
    """Addresses on which something listens at a port, as the system has them (hexadecimal, IPv4 and IPv6)."""
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, _, at = line.split()[1].rpartition(":")
            if int(at, 16) == port and line.split()[3] == "0A":
                found.append(address)
    return found


def test_it_listens_on_one_address(server: dist.TCPStore) -> None:
    """The one that was asked for, and no other; one of another machine is refused."""
    assert listening(server.port) == [socket.inet_aton("127.0.0.1")[::-1].hex().upper()]
    with pytest.raises(InputError, match=r"members cannot be reached on 192\.0\.2\.1"):
        serve_store("192.0.2.1")


def test_what_is_written_is_read(server: dist.TCPStore) -> None:
    """Keys, the log, reports in their order."""
    one, other = connect(server), connect(server)
    one.put("key", {"a": [1, None]})
    assert other.read("key") == {"a": [1, None]}
    assert other.find("nothing") is None
    one.append(0, {"kind": "add"})
    assert (other.log_length(), other.read("log/0")) == (1, {"kind": "add"})
    for number in range(3):
        one.report({"number": number})
    assert [other.next_report()["number"] for _ in range(3)] == [0, 1, 2]
    one.delete(["key", "nothing"])
    assert other.find("key") is None


def test_who_has_no_secret_is_not_believed(server: dist.TCPStore) -> None:
    """Neither keys nor reports; and a value that was moved to another key or service, or repeated, is none."""
    good, bad = connect(server), connect(server, secret="guessed")
    raw = dist.PrefixStore("p", server)
    bad.put("log/0", {"kind": "stop"})
    raw.set("log/1", json.dumps({"kind": "stop"}))
    good.put("log/2", {"kind": "cancel"})
    raw.set("log/3", raw.get("log/2"))
    connect(server, prefix="q").put("log/4", {"kind": "stop"})
    raw.set("log/4", dist.PrefixStore("q", server).get("log/4"))
    for key in ("log/0", "log/1", "log/3", "log/4"):
        with pytest.raises(ForgedError):
            good.read(key)
    assert good.read("log/2") == {"kind": "cancel"}
    bad.report({"kind": "end"})
    forged = raw.queue_pop("reports")
    good.report({"kind": "alive"})
    true = raw.queue_pop("reports")
    for content in (forged, "no report at all", true, true):
        raw.queue_push("reports", content)
    for _ in range(2):
        with pytest.raises(ForgedError):
            good.next_report()
    assert good.next_report() == {"kind": "alive"}
    with pytest.raises(ForgedError, match="repeated"):
        good.next_report()


def test_a_dead_port_is_not_waited_for() -> None:
    """Whoever connects to a coordinator that is gone gives up in time."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        begun = time.monotonic()
        with pytest.raises(ServiceEndedError):
            ServiceStore.connect("127.0.0.1", taken.getsockname()[1], "p", "s", seconds=1.0)
        assert time.monotonic() - begun < 30  # not 365 days
