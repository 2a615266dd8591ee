"""`serve --fast-slots` by HTTP: ranks whose fast memory holds three experts a layer answer as the plain engine does,
also while a placement changes, after a rank was killed and with the one that follows it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

from moeplace.launch.cli import main
from moeplace.launch.serving.requests_file import Tokenizer
from moeplace.placement.placement_file import save_placement
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from tests.launch.http_front.http_process import WAIT, ServerProcess, running_server
from tests.launch.http_front.http_services import wait_until
from tests.launch.http_front.test_http_openai import members
from tests.runtime.placements import random_placement
from tests.shared_data import tiny_moe_path

PROMPTS = ("In the beginning", "import os")
TOKENS = 60


def test_placements_change_and_ranks_die_with_little_fast_memory(tmp_path: Path, dated_seed: int) -> None:
    """Streams go through all of it with the text of an engine that has everything in fast memory."""
    tokenizer, engine = Tokenizer(tiny_moe_path()), Engine(tiny_moe_path(), dtype=torch.float32)
    expected = []
    for prompt in PROMPTS:
        request = Request("a", tuple(tokenizer.encode(prompt)), TOKENS, SamplingParameters(), ())
        expected.append(tokenizer.decode(engine.generate([request])[0].token_ids))
    placement = engine.placement
    ids = {"layer_ids": placement.layer_ids, "num_hidden_layers": placement.num_hidden_layers}
    wanted = random_placement(placement.num_layers, placement.num_experts, 2, seed=dated_seed, **ids)
    save_placement(tmp_path / "p.json", wanted)
    (tmp_path / "key").write_text("root\n")
    words = ("--ranks", "2", "--dtype", "float32", "--fast-slots", "3", "--host-slots", "9", "--admin")
    with running_server(tmp_path / "log", *words, "--admin-key-file", str(tmp_path / "key")) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="root", max_retries=0, timeout=WAIT)
        common: dict[str, Any] = {"model": "tiny-moe", "temperature": 0, "max_tokens": TOKENS}
        common["extra_body"] = {"ignore_eos": True}
        streams = [client.completions.create(prompt=prompt, stream=True, **common) for prompt in PROMPTS]
        texts = [next(stream).choices[0].text for stream in streams]
        assert administer(server, "place", (tmp_path / "p.json").read_bytes()) == 202
        wait_until(lambda: status(server)["placement_digest"] == wanted.digest)
        os.kill(members(server)[-1], signal.SIGKILL)
        for index, stream in enumerate(streams):
            texts[index] += "".join(chunk.choices[0].text for chunk in stream)
        assert texts == expected
        wait_until(lambda: len(status(server)["routable"]) == 2)
        for prompt, text in zip(PROMPTS, expected, strict=True):
            assert client.completions.create(prompt=prompt, **common).choices[0].text == text


def administer(server: ServerProcess, name: str, content: bytes) -> int:
    headers = {"Authorization": "Bearer root", "Content-Type": "application/json"}
    return httpx.post(f"{server.url}/admin/{name}", content=content, headers=headers, timeout=WAIT).status_code


def status(server: ServerProcess) -> dict[str, Any]:
    headers = {"Authorization": "Bearer root"}
    found: dict[str, Any] = json.loads(httpx.get(f"{server.url}/admin/status", headers=headers, timeout=WAIT).text)
    return found


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--fast-slots", "0"], "fast_slots (0) must be at least 1"),
    (["--fast-slots", "2", "--host-slots", "-1"], "host_slots (-1) must be at least 0"),
    (["--host-slots", "2"], "--host-slots (2) needs --fast-slots"),
])  # fmt: skip
def test_bad_budgets_are_one_sentence(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any rank starts."""
    assert main(["serve", str(tiny_moe_path()), "--http", "127.0.0.1:0", *flags]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "\n" not in error.strip()
