"""The HTTP front under load: many streams at once, alone and among slow readers, disconnects and oversized bodies.

    python benchmarks/http_streams.py [--streams 200] [--max-tokens 64] [--ranks 1] [--json F]

Starts `moeplace serve --http` with the shipped model and asks it from this process. Every stream must end with the
tokens that the same prompt gets alone (greedy, ignore_eos). Exit code 1 if one did not, or if the server was not as
before at the end: healthy, nothing in flight, memory given back.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

SHIPPED = Path(__file__).resolve().parent.parent / "launch" / "data" / "tiny-moe"
MOST_BODY = 64 << 10
PATIENCE = 300.0


@dataclass
class Streams:
    """What well-behaved clients saw.

    Attributes:
        errors: one sentence each.
        changed: streams whose tokens were not those of the prompt alone.
        tokens: in all.
        first: seconds to the first piece.
        gaps: seconds between pieces.
        seconds: from the first request to the last answer.
    """

    errors: list[str] = field(default_factory=list)
    changed: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        return {
            "errors": len(self.errors),
            "first_error": self.errors[0] if self.errors else None,
            "changed": self.changed,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "seconds_to_first_token": _spread(self.first),
            "seconds_between_pieces": _spread(self.gaps),
        }


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    return {
        "median": statistics.median(ordered),
        "p95": ordered[int(0.95 * (len(ordered) - 1))],
        "p99": ordered[int(0.99 * (len(ordered) - 1))],
        "worst": ordered[-1],
    }


class Server:
    """The server process."""

    def __init__(self, model: str, streams: int, ranks: int, *options: str) -> None:
        """With a place in the batch for each of `streams`, and more options of `serve`."""
        command = [sys.executable, "-m", "moeplace.launch.cli", "serve", model, "--http", "127.0.0.1:0"]
        command += ["--max-sequences", str(streams), "--max-concurrent", str(4 * streams), "--stall-timeout", "5"]
        command += ["--max-body-bytes", str(MOST_BODY), "--dtype", "float32"]
        if ranks > 1:
            command += ["--ranks", str(ranks)]
        command += options
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        found = re.search(r"http://\S+", self.process.stdout.readline())
        if found is None:
            raise SystemExit("http_streams: the server did not start")
        self.url = found[0]
        self.port = int(self.url.rpartition(":")[2])

    @property
    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def samples(self) -> dict[str, float]:
        """Metrics without histograms, labels as in the text format."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text)
        return {
            f"{s.name}{{{','.join(s.labels.values())}}}": s.value
            for family in families
            if family.type != "histogram"
            for s in family.samples
            if not s.name.endswith("_created")
        }

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        return self.process.returncode


def _body(index: int, max_tokens: int, *, stream: bool) -> dict[str, Any]:
    prompt = [(17 * index + 31 * position) % 4000 + 1 for position in range(4 + index % 29)]
    options = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"prompt": prompt, "max_tokens": max_tokens, "stream": stream, **options}


async def _read_stream(client: httpx.AsyncClient, body: dict[str, Any], seen: Streams) -> list[int]:
    tokens: list[int] = []
    last, done = time.perf_counter(), False
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code}: {(await answer.aread())[:200]!r}")
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line:
                document = json.loads(line.removeprefix("data: "))
                if "error" in document:
                    raise RuntimeError(document["error"]["message"])
                now = time.perf_counter()
                (seen.gaps if tokens else seen.first).append(now - last)
                last = now
                tokens += document["choices"][0]["token_ids"]
    if not done:
        raise RuntimeError("the stream broke off")
    return tokens


async def _good(client: httpx.AsyncClient, body: dict[str, Any], expected: list[int], seen: Streams) -> None:
    try:
        tokens = await _read_stream(client, body, seen)
    except (httpx.HTTPError, RuntimeError, ValueError) as error:
        seen.errors.append(f"{type(error).__name__}: {error}")
        return
    seen.tokens += len(tokens)
    seen.changed += tokens != expected


async def _open(server: Server, body: dict[str, Any], **options: int) -> tuple[asyncio.StreamReader, Any]:
    """A bare connection with a small receive buffer, the request sent."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    writer.write(f"{head}{len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    return reader, writer


async def _slow(server: Server, index: int, stop: asyncio.Event) -> None:
    """Takes 64 bytes now and then until all others have finished; every other one takes nothing at all."""
    reader, writer = await _open(server, _body(index, 400, stream=True))
    with suppress(ConnectionError):
        while not stop.is_set():
            if index % 2 and not await reader.read(64):
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.2)
    writer.transport.abort()


async def _disconnect(server: Server, index: int, stop: asyncio.Event) -> None:
    """Comes and goes: at once, after the head, after some tokens, in the middle of a body."""
    turn = 0
    while not stop.is_set():
        reader, writer = await _open(server, _body(index, 400, stream=bool(turn % 2)))
        with suppress(ConnectionError, TimeoutError):
            if turn % 3:
                await asyncio.wait_for(reader.read(100 * (turn % 3)), 0.3)
        writer.transport.abort()
        turn += 1
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.1)


async def _oversized(client: httpx.AsyncClient, seen: Streams, stop: asyncio.Event) -> None:
    """Sends bodies of 4 MiB, whole or in pieces, and wants to be told that they are too long."""
    headers = {"content-type": "application/json"}
    turn = 0
    while not stop.is_set():

        async def pieces() -> Any:
            for _ in range(64):
                yield b" " * 65536

        content: Any = pieces() if turn % 2 else b" " * (4 << 20)
        try:
            answer = await client.post("/v1/completions", content=content, headers=headers)
            if answer.status_code != 413:
                seen.errors.append(f"an oversized body got status {answer.status_code}")
        except httpx.HTTPError as error:
            seen.errors.append(f"an oversized body got {type(error).__name__}: {error}")
        turn += 1
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.2)


async def run_streams(
    server: Server,
    expected: list[list[int]],
    max_tokens: int,
    rounds: int,
    bad: list[Coroutine[Any, Any, None]],
    stop: Any,
) -> Streams:
    """All streams at once, `rounds` times, beside what `bad` does until they are done."""
    seen = Streams()
    background = [asyncio.ensure_future(work) for work in bad]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    start = time.perf_counter()
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=limits) as client:
        for _ in range(rounds):
            bodies = [_body(index, max_tokens, stream=True) for index in range(len(expected))]
            await asyncio.gather(*(_good(client, body, e, seen) for body, e in zip(bodies, expected, strict=True)))
    seen.seconds = time.perf_counter() - start
    stop.set()
    await asyncio.gather(*background)
    return seen


async def answers_alone(server: Server, streams: int, max_tokens: int) -> list[list[int]]:
    """What each prompt gets when it is asked alone."""
    found = []
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        for index in range(streams):
            answer = await client.post("/v1/completions", json=_body(index, max_tokens, stream=False))
            found.append(answer.raise_for_status().json()["choices"][0]["token_ids"])
    return found


async def _measure(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    expected = await answers_alone(server, args.streams, args.max_tokens)
    memory = [server.resident_bytes]
    quiet = await run_streams(server, expected, args.max_tokens, args.rounds, [], asyncio.Event())
    memory.append(server.resident_bytes)
    stop = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        big = Streams()
        bad = [_slow(server, index, stop) for index in range(args.slow)]
        bad += [_disconnect(server, index, stop) for index in range(args.disconnects)]
        bad += [_oversized(client, big, stop) for _ in range(args.oversized)]
        disturbed = await run_streams(server, expected, args.max_tokens, args.rounds, bad, stop)
    disturbed.errors += big.errors
    memory.append(server.resident_bytes)
    return {"quiet": quiet.figures(), "disturbed": disturbed.figures(), "resident_bytes": memory}


def _settled(server: Server) -> dict[str, float]:
    """Metrics once nothing is in flight any more."""
    deadline = time.monotonic() + 30
    while True:
        samples = server.samples()
        busy = ("moeplace_completions_in_flight{}", "moeplace_requests{waiting}", "moeplace_requests{running}")
        if not any(samples[name] for name in busy) or time.monotonic() > deadline:
            return samples
        time.sleep(0.1)


def add_stream_arguments(parser: argparse.ArgumentParser, *, ranks: int, rounds: int) -> None:
    """Streams, and where they go; with the defaults given."""
    parser.add_argument("--streams", type=int, default=200, metavar="N", help="well-behaved streams at once")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens of each")
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help="how often all streams run")
    parser.add_argument("--ranks", type=int, default=ranks, metavar="R", help="ranks behind the front")
    parser.add_argument("--json", metavar="F", help="write the figures to F")


def main() -> int:
    parser = argparse.ArgumentParser(description="The HTTP front under load, on the shipped model.")
    parser.add_argument("--model", default=str(SHIPPED), metavar="MODEL")
    add_stream_arguments(parser, ranks=1, rounds=2)
    parser.add_argument("--slow", type=int, default=20, metavar="N", help="slow readers beside them")
    parser.add_argument("--disconnects", type=int, default=20, metavar="N", help="clients that come and go")
    parser.add_argument("--oversized", type=int, default=4, metavar="N", help="clients with oversized bodies")
    args = parser.parse_args()
    server = Server(args.model, args.streams + args.slow + args.disconnects, args.ranks)
    try:
        result = asyncio.run(_measure(server, args))
        samples = _settled(server)
        healthy = httpx.get(f"{server.url}/healthz", timeout=PATIENCE).status_code == 200
    finally:
        code = server.stop()
    result["conditions"] = {
        **{name: getattr(args, name) for name in vars(args) if name not in ("json", "model")},
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }
    result |= {"healthy": healthy, "exit_code": code, "metrics": samples}
    in_flight = samples["moeplace_completions_in_flight{}"]
    runs = [result["quiet"], result["disturbed"]]
    good = healthy and code == 0 and not in_flight and not any(run["errors"] or run["changed"] for run in runs)
    text = json.dumps(result, indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
