"""What streams go through while a server runs: a re-placement, a rank that is killed, and the one that follows it."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from moeplace.launch.serving.requests_file import Tokenizer
from moeplace.placement.placement import Placement
from moeplace.placement.placement_file import save_placement
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.requests import Request
from tests.launch.http_front.http_process import WAIT, ServerProcess, members, running_server
from tests.launch.http_front.http_services import wait_until
from tests.runtime.placements import random_placement
from tests.shared_data import tiny_moe_path

PROMPTS = ("In the beginning", "import os")


def texts_of(engine: Engine, tokens: int) -> list[str]:
    """What an engine of the shipped model, to which nothing happens, says to the prompts."""
    tokenizer = Tokenizer(tiny_moe_path())
    requests = [Request(prompt, tuple(tokenizer.encode(prompt)), tokens, stop_ids=()) for prompt in PROMPTS]
    return [tokenizer.decode(one.token_ids) for one in engine.generate(requests)]


def random_goal(engine: Engine, seed: int) -> Placement:
    """Some placement of the experts of an engine on two ranks."""
    placement = engine.placement
    ids = {"layer_ids": placement.layer_ids, "num_hidden_layers": placement.num_hidden_layers}
    return random_placement(placement.num_layers, placement.num_experts, 2, seed=seed, **ids)


@contextmanager
def administered_server(folder: Path, *options: str) -> Iterator[ServerProcess]:
    """Two ranks; who administers them has the key `root`."""
    (folder / "key").write_text("root\n")
    words = ("--ranks", "2", "--dtype", "float32", "--admin", "--admin-key-file", str(folder / "key"))
    with running_server(folder / "log", *words, *options) as server:
        yield server


def administer(server: ServerProcess, name: str, content: bytes) -> int:
    headers = {"Authorization": "Bearer root", "Content-Type": "application/json"}
    return httpx.post(f"{server.url}/admin/{name}", content=content, headers=headers, timeout=WAIT).status_code


def status(server: ServerProcess) -> dict[str, Any]:
    headers = {"Authorization": "Bearer root"}
    found: dict[str, Any] = json.loads(httpx.get(f"{server.url}/admin/status", headers=headers, timeout=WAIT).text)
    return found


def check_streams(server: ServerProcess, expected: Sequence[str], tokens: int, goal: Placement, folder: Path) -> None:
    """Streams go on while experts move to their place in `goal` and one rank is killed, with the texts expected; so do
    those that are asked for with the rank that has followed it."""
    save_placement(folder / "p.json", goal)
    client = OpenAI(base_url=f"{server.url}/v1", api_key="root", max_retries=0, timeout=WAIT)
    common: dict[str, Any] = {"model": "tiny-moe", "temperature": 0, "max_tokens": tokens}
    common["extra_body"] = {"ignore_eos": True}
    streams = [client.completions.create(prompt=prompt, stream=True, **common) for prompt in PROMPTS]
    texts = [next(stream).choices[0].text for stream in streams]
    assert administer(server, "place", (folder / "p.json").read_bytes()) == 202
    wait_until(lambda: status(server)["placement_digest"] == goal.digest)
    os.kill(members(server)[-1], signal.SIGKILL)
    for index, stream in enumerate(streams):
        texts[index] += "".join(chunk.choices[0].text for chunk in stream)
    assert texts == expected
    wait_until(lambda: len(status(server)["routable"]) == 2)
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert client.completions.create(prompt=prompt, **common).choices[0].text == text
