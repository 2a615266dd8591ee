"""`moeplace watch` beside a server that answers as SGLang and vLLM do."""

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.cli import DONE, FAILED, USAGE, main
from moeplace.launch.watching.client import EngineClient, EngineUnreachableError
from moeplace.launch.watching.sources import read_prompts
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.placement_file import load_placement, save_placement
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.traces.file import load_trace
from moeplace.runtime.replanning.event_log import read_events
from tests.launch.watching.fake_engine import DENSE, EXPERTS, FakeEngine, serving

LAYERS = 3


def even_bias() -> np.ndarray:
    return np.zeros((LAYERS, EXPERTS))


def skewed_bias() -> np.ndarray:
    """The four experts of the first rank take most: another placement halves the busiest rank's load."""
    bias = np.full((LAYERS, EXPERTS), -2.0)
    bias[:, :4] = 2.0
    return bias


def in_force() -> Placement:
    ids = np.arange(DENSE, DENSE + LAYERS)
    per_layer = np.full(LAYERS, EXPERTS)
    return index_order(per_layer, np.full(2, 4), np.zeros(2, int), layer_ids=ids, num_hidden_layers=DENSE + LAYERS)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_placement(tmp_path / "p.json", in_force())
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    return tmp_path


def watch(url: str, folder: Path, *flags: str, engine: str = "sglang") -> int:
    words = [
        "watch",
        url,
        "--engine",
        engine,
        "--placement",
        str(folder / "p.json"),
        "--out",
        str(folder / "next.json"),
    ]
    common = [
        "--every",
        "0.01",
        "--requests",
        "6",
        "--new-tokens",
        "30",
        "--time-limit",
        "1",
        "--log",
        str(folder / "log"),
    ]
    probe = [] if "--recordings" in flags else ["--prompts", str(folder / "prompts.txt")]
    return main([*words, *common, *probe, *flags])


def kinds(folder: Path) -> list[str]:
    return [event.kind for event in read_events(folder / "log")]


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_a_placement_that_pays_is_written(engine: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody planned for this routing: the first look challenges the placement, and what it finds is written."""
    fake = FakeEngine(skewed_bias())
    with serving(fake) as url:
        assert watch(url, files, "--looks", "1", "--gain", "0", "--model", "m", engine=engine) == DONE
    assert len(fake.requests) == 6
    assert {body.get("text", body.get("prompt")) for _, body in fake.requests} == {"one", "two"}
    assert "move" in kinds(files)
    written = load_placement(files / "next.json")
    load_E = np.exp(skewed_bias()[0])
    halves = [load_E[row[:4]].sum() / load_E.sum() for row in written.slot_to_expert]
    assert max(max(half, 1 - half) for half in halves) < 0.7  # index order: 0.98 on the first rank
    assert (files / f"next.{engine}.json").is_file()
    assert "start" in capsys.readouterr().out


def test_routing_as_planned_is_left_alone(files: Path) -> None:
    """The trace that the placement was planned on, and the same routing again: every look keeps it."""
    fake = FakeEngine(skewed_bias())
    with serving(fake) as url:
        assert watch(url, files, "--looks", "1", "--gain", "0", "--window", "48") == DONE
        trace = gathered_trace(url, files)
        (files / "log").unlink()
        (files / "next.json").replace(files / "p.json")
        assert watch(url, files, "--looks", "3", "--trace", str(trace)) == DONE
    assert kinds(files) == ["keep"] * 3
    assert not (files / "next.json").exists()


def gathered_trace(url: str, folder: Path) -> Path:
    """Answers of the server, imported as a user would."""
    client = EngineClient(url, timeout=20)
    body = {"text": "x", "sampling_params": {"max_new_tokens": 30}, "return_routed_experts": True}
    lines = b"".join(client.post("/generate", body) + b"\n" for _ in range(24))
    (folder / "answers.jsonl").write_bytes(lines)
    words = ["import", str(folder / "answers.jsonl"), "--from", "sglang", "--num-hidden-layers", str(DENSE + LAYERS)]
    assert main([*words, "--num-experts", str(EXPERTS), "--out", str(folder / "t.trace")]) == DONE
    assert load_trace(folder / "t.trace").num_layers == LAYERS
    return folder / "t.trace"


def test_the_recorder_is_started_stopped_and_read(files: Path) -> None:
    """SGLang's dumps of loads: balance is weighed, in the order start, stop, dump."""
    (files / "dumps").mkdir()
    fake = FakeEngine(skewed_bias(), recordings=files / "dumps")
    with serving(fake) as url:
        assert watch(url, files, "--looks", "2", "--recordings", str(files / "dumps"), "--seconds", "0.01") == DONE
    paths = [path.split("_")[0] for path, _ in fake.requests]
    assert paths == ["/start", "/stop", "/dump"] * 2
    events = read_events(files / "log")
    assert [event.kind for event in events] == ["move", "written"] * 2
    assert events[0].figures["candidate_imbalance"] < 1.1 < events[0].figures["imbalance"]


def test_even_loads_are_left_alone(files: Path) -> None:
    """Nothing to gain: kept, nothing written."""
    (files / "dumps").mkdir()
    with serving(FakeEngine(even_bias(), recordings=files / "dumps")) as url:
        flags = ["--recordings", str(files / "dumps"), "--seconds", "0.01", "--gain", "0.2"]
        assert watch(url, files, "--looks", "1", *flags) == DONE
    assert kinds(files) == ["keep"]
    assert not (files / "next.json").exists()


def test_a_hook_hands_over_and_the_watcher_sees_it(files: Path) -> None:
    """The hook gets the engine's file; when it puts the new placement in force, the next look judges that one."""
    script = files / "apply.py"
    script.write_text(
        f"import shutil, sys\nassert sys.argv[1].endswith('next.sglang.json')\n"
        f"shutil.copy({str(files / 'next.json')!r}, {str(files / 'p.json')!r})\n"
    )
    with serving(FakeEngine(skewed_bias())) as url:
        hook = f"{sys.executable} {script}"
        assert watch(url, files, "--looks", "2", "--gain", "0.02", "--hook", hook) == DONE
    found = kinds(files)
    assert found[:4] == ["move", "written", "handed-over", "placement-changed"]
    assert found[-1] == "keep"


def test_an_engine_that_is_away_is_tried_again(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error of the server is one sentence and another look, not the end."""
    fake = FakeEngine(even_bias())
    fake.failing.set()
    with serving(fake) as url:
        assert watch(url, files, "--looks", "2", "--gain", "0.9") == DONE
    assert kinds(files) == ["no-routing"] * 2
    said = capsys.readouterr().out
    assert "answers 500" in said
    assert "the model is loading" in said
    with pytest.raises(EngineUnreachableError, match="does not answer"):
        EngineClient(url, timeout=2).post("/generate")


def test_the_bearer_token_is_sent(files: Path) -> None:
    """With it the server answers, without it the watcher says 401."""
    (files / "key").write_text("secret\n")
    with serving(FakeEngine(even_bias(), key="secret")) as url:
        assert watch(url, files, "--looks", "1", "--gain", "0.9", "--api-key-file", str(files / "key")) == DONE
        assert watch(url, files, "--looks", "1", "--gain", "0.9") == DONE
    first, second = read_events(files / "log")
    assert first.kind != "no-routing"
    assert "answers 401" in second.sentence


def test_a_server_without_routing_is_named(files: Path) -> None:
    """The answers lack the experts: the server runs without the flag."""
    fake = FakeEngine(even_bias())
    fake.answer = lambda path, body: {"text": "...", "meta_info": {"prompt_tokens": 3}}  # type: ignore[method-assign]
    with serving(fake) as url:
        assert watch(url, files, "--looks", "1") == DONE
    [event] = read_events(files / "log")
    assert event.kind == "no-routing"
    assert "routed experts" in event.sentence


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--recordings", "none"], FAILED, "must be the folder"),
        (["--requests", "0"], USAGE, "--requests (0) must be positive"),
        (["--engine", "vllm"], USAGE, "--model"),
    ],
)
def test_wishes_that_do_not_fit(
    flags: list[str], code: int, said: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, before anything is asked of the server."""
    assert watch("http://127.0.0.1:9", files, *flags) == code
    assert said in capsys.readouterr().err


def test_what_is_no_address_is_refused() -> None:
    """Scheme and host are needed."""
    for url in ("127.0.0.1:30000", "ftp://x", "http://"):
        with pytest.raises(InputError, match="must be the address of a server"):
            EngineClient(url, timeout=1)


def test_prompts_are_lines_or_json(tmp_path: Path) -> None:
    """Both forms in one file; what lacks a prompt is named by its line."""
    (tmp_path / "a").write_text('plain\n{"prompt": "json"}\n')
    assert read_prompts(tmp_path / "a") == ["plain", "json"]
    (tmp_path / "b").write_text('x\n{"text": 1}\n')
    with pytest.raises(FormatError, match="line 2"):
        read_prompts(tmp_path / "b")
    (tmp_path / "c").write_text("\n")
    with pytest.raises(InputError, match="no prompts"):
        read_prompts(tmp_path / "c")


def test_nothing_is_left_behind(files: Path) -> None:
    """No thread goes on after the last look."""
    before = threading.active_count()
    with serving(FakeEngine(even_bias())) as url:
        assert watch(url, files, "--looks", "1", "--gain", "0.9") == DONE
    assert threading.active_count() == before
    assert json.loads((files / "log").read_text().splitlines()[0])["kind"]
