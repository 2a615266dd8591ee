"""`serve --precision` by HTTP: ranks that keep experts in the bits of a plan answer as an engine with the same numbers,
also while experts move, after a rank was killed and with the one that follows it; the health check says what is not
exact."""

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import torch
from openai import OpenAI

from moeplace.launch.serving.requests_file import Tokenizer
from moeplace.placement.placement_file import save_placement
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.experts.rounding import PRECISIONS
from moeplace.runtime.models.precisions.rounded_checkpoint import RoundedCheckpoint
from tests.launch.http_front.http_process import WAIT, running_server
from tests.launch.http_front.http_services import wait_until
from tests.launch.http_front.test_http_openai import members
from tests.launch.http_front.test_serving_tiers import administer, status
from tests.launch.serving.test_serve_precision import random_plan
from tests.runtime.placements import random_placement
from tests.shared_data import tiny_moe_path

PROMPTS = ("In the beginning", "import os")
TOKENS = 50


def test_members_come_go_and_exchange_experts_in_few_bits(tmp_path: Path, dated_seed: int) -> None:
    """Two ranks with little fast memory; the text is that of one that has the rounded numbers in plain matrices."""
    plan, tokenizer = random_plan(tmp_path / "plan.json", dated_seed), Tokenizer(tiny_moe_path())
    engine = Engine(RoundedCheckpoint(tiny_moe_path(), PRECISIONS, plan.choice_LE), dtype=torch.float32)
    requests = [Request(p, tuple(tokenizer.encode(p)), TOKENS, stop_ids=()) for p in PROMPTS]
    expected = [tokenizer.decode(one.token_ids) for one in engine.generate(requests)]
    placement = engine.placement
    ids = {"layer_ids": placement.layer_ids, "num_hidden_layers": placement.num_hidden_layers}
    wanted = random_placement(placement.num_layers, placement.num_experts, 2, seed=dated_seed, **ids)
    save_placement(tmp_path / "p.json", wanted)
    (tmp_path / "key").write_text("root\n")
    words = ("--ranks", "2", "--dtype", "float32", "--precision", str(tmp_path / "plan.json"), "--fast-slots", "4")
    with running_server(tmp_path / "log", *words, "--admin", "--admin-key-file", str(tmp_path / "key")) as server:
        assert httpx.get(f"{server.url}/healthz", timeout=WAIT).json()["precision"] == {
            "experts": plan.counts(), "predicted_error": plan.error,
        }  # fmt: skip
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
