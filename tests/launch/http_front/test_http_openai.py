"""The official client of OpenAI against a real server process with the shipped model."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from moeplace.launch.cli import main
from moeplace.launch.serving.requests_file import Tokenizer
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from tests.launch.http_front.http_process import WAIT, ServerProcess, members, running_server
from tests.launch.http_front.http_services import wait_until
from tests.shared_data import tiny_moe_path

MODEL = "tiny-moe"
PROMPTS = ("In the beginning", "import os", "naïve café")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("http") / "log", "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=WAIT, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, int, int], str]:
    """(prompt, seed, choice) -> text, from an engine in this process; seed -1 = greedy."""
    import torch

    tokenizer = Tokenizer(tiny_moe_path())
    engine = Engine(tiny_moe_path(), dtype=torch.float32)
    found = {}
    for prompt in PROMPTS:
        for seed, choice in ((-1, 0), (3, 0), (3, 1), (4, 0)):
            drawn = SamplingParameters(temperature=1.0, top_p=0.9, seed=max(seed, 0), choice=choice)
            sampling = SamplingParameters() if seed < 0 else drawn
            request = Request("a", tuple(tokenizer.encode(prompt)), 12, sampling, ())
            found[prompt, seed, choice] = tokenizer.decode(engine.generate([request])[0].token_ids)
    return found


IGNORE_EOS = {"ignore_eos": True}


def test_completions(client: OpenAI, expected: dict[tuple[str, int, int], str]) -> None:
    """Text and token ids, greedy and drawn: what the engine gives."""
    common: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "extra_body": IGNORE_EOS}
    greedy = client.completions.create(prompt=list(PROMPTS), temperature=0, **common)
    assert [choice.text for choice in greedy.choices] == [expected[prompt, -1, 0] for prompt in PROMPTS]
    assert [choice.index for choice in greedy.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in greedy.choices} == {"length"}
    assert greedy.usage is not None
    assert greedy.usage.completion_tokens == 36
    ids = Tokenizer(tiny_moe_path()).encode(PROMPTS[0])
    drawn = client.completions.create(prompt=ids, n=2, seed=3, temperature=1.0, top_p=0.9, **common)
    assert [choice.text for choice in drawn.choices] == [expected[PROMPTS[0], 3, 0], expected[PROMPTS[0], 3, 1]]


def test_streaming(client: OpenAI, expected: dict[tuple[str, int, int], str]) -> None:
    """The pieces join to the same text; usage comes last."""
    options: dict[str, Any] = {"stream_options": {"include_usage": True}, "extra_body": IGNORE_EOS}
    stream = client.completions.create(
        model=MODEL, prompt=PROMPTS[2], max_tokens=12, temperature=0, stream=True, echo=True, **options
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == PROMPTS[2] + expected[PROMPTS[2], -1, 0]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_many_at_once(server: ServerProcess, expected: dict[tuple[str, int, int], str]) -> None:
    """The asynchronous client, 40 streams together: each gets its own text."""

    async def read(client: AsyncOpenAI, prompt: str, seed: int) -> str:
        temperature = 0.0 if seed < 0 else 1.0
        stream = await client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=12,
            temperature=temperature,
            top_p=0.9,
            seed=seed,
            stream=True,
            extra_body=IGNORE_EOS,
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def read_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=WAIT, max_retries=0) as client:
            return await asyncio.gather(*(read(client, *wanted[number % len(wanted)]) for number in range(40)))

    wanted = [(prompt, seed) for prompt, seed, choice in expected if not choice]
    assert asyncio.run(read_all()) == [expected[*wanted[number % len(wanted)], 0] for number in range(40)]


def test_logprobs(client: OpenAI, expected: dict[tuple[str, int, int], str]) -> None:
    """The token of a greedy completion is the likeliest, whole and streamed, with the same numbers."""
    common: dict[str, Any] = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0}
    common |= {"logprobs": 3, "extra_body": IGNORE_EOS}
    found = client.completions.create(**common).choices[0].logprobs
    assert found is not None
    assert found.token_logprobs
    assert found.top_logprobs
    assert found.tokens
    assert "".join(found.tokens) == expected[PROMPTS[0], -1, 0]
    assert [max(top.values()) for top in found.top_logprobs] == found.token_logprobs
    assert {len(top) for top in found.top_logprobs} == {3}
    pieces = [chunk.choices[0].logprobs for chunk in client.completions.create(stream=True, **common)]
    assert [value for piece in pieces for value in piece.token_logprobs] == pytest.approx(found.token_logprobs)
    assert [offset for piece in pieces for offset in piece.text_offset] == found.text_offset


def test_a_stop_string(client: OpenAI, expected: dict[tuple[str, int, int], str]) -> None:
    """Ends the text before it."""
    text = expected[PROMPTS[0], -1, 0]
    stop = text[len(text) // 2 :][:3]
    answer = client.completions.create(model=MODEL, prompt=PROMPTS[0], max_tokens=12, temperature=0, stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_models_and_errors(client: OpenAI) -> None:
    """The client finds the model and turns our errors into its exceptions."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "moeplace"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="logit_bias is not supported"):
        client.completions.create(model=MODEL, prompt="a", logit_bias={"5": 1})
    with pytest.raises(openai.BadRequestError, match="positions") as caught:
        client.completions.create(model=MODEL, prompt="a", max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="token id 99999"):
        client.completions.create(model=MODEL, prompt=[99999])


def test_a_client_that_leaves(client: OpenAI, server: ServerProcess) -> None:
    """The engine stops working for it: nothing runs soon after."""
    with client.completions.create(model=MODEL, prompt="a", max_tokens=500, stream=True, extra_body=IGNORE_EOS) as one:
        next(iter(one))
    wait_until(lambda: not sample(server, "moeplace_requests", state="running"))
    assert sample(server, "moeplace_completions_total", outcome="cancelled") >= 1


def sample(server: ServerProcess, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=WAIT).text)
    return next(s.value for family in families for s in family.samples if (s.name, s.labels) == (name, labels))


def test_a_guarded_server_ends_well(tmp_path: Path) -> None:
    """A token from a file; SIGTERM while a stream runs: it is finished, nothing new is taken, exit code 0."""
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    options = ("--api-key-file", str(key), "--model-name", "m", "--max-tokens", "300", "--drain-timeout", "60")
    with running_server(tmp_path / "log", *options, environment={"MOEPLACE_API_KEY": "unused"}) as server:
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0).models.list()
        client = OpenAI(base_url=f"{server.url}/v1", api_key="s3cret", max_retries=0, timeout=WAIT)
        stream = client.completions.create(model="m", prompt="a", max_tokens=300, stream=True, extra_body=IGNORE_EOS)
        pieces = [next(iter(stream))]
        server.terminate()
        pieces += stream
        assert pieces[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_ranks_that_die(tmp_path: Path, expected: dict[tuple[str, int, int], str]) -> None:
    """Two ranks, one is killed in the middle of streams: they go on with the same text, and another rank follows."""
    with running_server(tmp_path / "log", "--ranks", "2", "--dtype", "float32") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT)
        common: dict[str, Any] = {"model": MODEL, "temperature": 0, "stream": True, "extra_body": IGNORE_EOS}
        streams = [client.completions.create(prompt=prompt, max_tokens=100, **common) for prompt in PROMPTS]
        texts = [next(stream).choices[0].text for stream in streams]
        os.kill(members(server)[-1], signal.SIGKILL)
        for index, stream in enumerate(streams):
            texts[index] += "".join(chunk.choices[0].text for chunk in stream)
        for prompt, text in zip(PROMPTS, texts, strict=True):
            assert text.startswith(expected[prompt, -1, 0])
        alone = client.completions.create(prompt=PROMPTS[0], max_tokens=100, **{**common, "stream": False})
        assert alone.choices[0].text == texts[0]
        wait_until(lambda: sample(server, "moeplace_members", state="routable") == 2)
        assert sample(server, "moeplace_generation") > 1


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Usage errors exit 2; a taken port, a bad address and an empty token are one sentence and exit 1."""
    model = str(tiny_moe_path())
    (tmp_path / "empty").touch()
    assert main(["serve", model, "--http", ":0", "--requests", "x"]) == 2
    assert main(["serve", model, "--requests", "x"]) == 2
    capsys.readouterr()
    for words, sentence in (
        (["--http", "nothing"], "must be HOST:PORT"),
        (["--http", "192.0.2.1:0"], "cannot listen on 192.0.2.1:0"),
        (["--http", ":0", "--api-key-file", str(tmp_path / "empty")], "must hold a bearer token"),
        (["--http", ":0", "--max-concurrent", "0"], "max_concurrent (0)"),
    ):
        assert main(["serve", model, *words]) == 1
        error = capsys.readouterr().err
        assert sentence in error
        assert "\n" not in error.strip()
