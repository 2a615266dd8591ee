"""The commands where experts do not fit: solve writes a plan with tiers, evaluate walks it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.launch.cli import main
from moeplace.placement.placement_file import load_placement, load_placement_file
from moeplace.profiling.traces.file import save_trace
from tests.launch.precision_plans import random_plan
from tests.placement.instances import skewed_trace
from tests.shared_data import tiny_moe_path

CLUSTER = """
ranks_per_node = 2
slots_per_rank = 4
[fast]
slots = 2
transit = 2
[host]
latency = 1e-4
bandwidth = 1e6
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trace = skewed_trace(3, tokens=200, layers=3, experts=8, top_k=2)
    fields = {"sequence_ids": np.arange(200) // 10, "expert_bytes": np.full((3, 8), 1000)}
    save_trace(tmp_path / "t.trace", type(trace)(trace.topk_ids, trace.experts_per_layer, **fields))
    (tmp_path / "c.toml").write_text(CLUSTER)
    return tmp_path


def run(folder: Path, *words: str) -> dict[str, Any]:
    """What a command writes for machines."""
    assert main([*words, "--cluster", str(folder / "c.toml"), "--batch", "4", "--json", str(folder / "out.json")]) == 0
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


@pytest.mark.parametrize("policy", [("pinned",), ("lookahead", "--accuracy", "0.9", "--look-ahead", "2")])
def test_solve_and_evaluate(folder: Path, capsys: pytest.CaptureFixture[str], policy: tuple[str, ...]) -> None:
    """The plan keeps the budget; evaluate finds the figures of the evidence again; the bound stands beside pinned."""
    trace, out = str(folder / "t.trace"), str(folder / "p.json")
    flags = ["--policy", *policy]
    solved = run(folder, "solve", trace, *flags, "--time-limit", "1", "--out", out)
    placement = load_placement(out)
    assert placement.tier is not None
    assert ((placement.tier_LER == 0).sum(axis=(0, 1)) <= 2 * 3 - 2).all()
    evidence = load_placement_file(out).evidence["tiers"]
    assert set(evidence["residency_by"]) == {"load", "activation", "srp", "sch"}
    evaluated = run(folder, "evaluate", trace, out, *flags)
    assert evaluated["tiers"]["seconds"] == pytest.approx(evidence["seconds"])
    assert sum(evaluated["tiers"]["shares"].values()) == pytest.approx(1)
    assert evaluated["tiers"]["seconds"] >= evaluated["tiers"]["resident_seconds"]
    solver = solved["solver"]
    assert solver["lower_bound"] <= solver["objective"]
    text = capsys.readouterr().out
    assert ("proven >=" in text.split("residency by load")[1]) == (policy[0] == "pinned")


def test_batches_of_alike_requests(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside drawn ones, of the same requests; short sequences are named."""
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8), (400, 3, 1)), axis=2)[:, :, :2]
    trace = type(skewed_trace(0, tokens=9, layers=3, experts=8, top_k=2))(
        ids, np.full(3, 8), sequence_ids=np.arange(400) // 20, expert_bytes=np.full((3, 8), 1000)
    )
    save_trace(folder / "t.trace", trace)
    out = str(folder / "p.json")
    run(folder, "solve", str(folder / "t.trace"), "--time-limit", "1", "--out", out)
    found = run(folder, "evaluate", str(folder / "t.trace"), out, "--alike", "4")["alike"]
    assert found["requests"] == 8
    assert 2 <= found["alike"]["active_experts"] <= 8
    assert found["drawn"]["seconds"] > 0
    assert "batches of 8 requests" in capsys.readouterr().out
    words = ["evaluate", str(folder / "t.trace"), out, "--cluster", str(folder / "c.toml"), "--batch", "4"]
    assert main([*words, "--alike", "5"]) == 1
    assert "0 sequences have 16 + 5 tokens" in capsys.readouterr().err
    assert main(["evaluate", str(folder / "t.trace"), out, "--alike", "4"]) == 1
    assert "--alike (4) needs memory tiers" in capsys.readouterr().err


def test_loads_carry_the_bytes_of_a_plan(folder: Path, dated_seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside those of exact experts: the same loads in an eighth of the bytes where all experts are in the fewest,
    alike where all are exact; `--budgets` walks by the plan too."""
    out, plan = str(folder / "p.json"), folder / "plan.json"
    run(folder, "solve", str(folder / "t.trace"), "--time-limit", "1", "--out", out)
    words = ("evaluate", str(folder / "t.trace"), out, "--precision", str(plan), "--budgets", "50")
    points = {}
    for choice in (0, 3, None):
        random_plan(plan, dated_seed, layers=3, experts=8, unit=125, choice=choice)
        found = run(folder, *words)
        exact, ours = found["tiers_exact"], found["tiers"]
        assert exact["link_bytes"] == pytest.approx(run(folder, *words[:3])["tiers"]["link_bytes"])  # 1000 each
        assert ours["shares"] == pytest.approx(exact["shares"])
        points[choice] = [point["seconds"] for point in found["budgets"]]
        if choice is None:
            assert exact["link_bytes"] / 8 < ours["link_bytes"] < exact["link_bytes"]
            assert ours["seconds"] < exact["seconds"]
        else:
            assert ours["link_bytes"] == pytest.approx(exact["link_bytes"] / (1, 8)[choice > 0])
    assert points[3] < points[None] < points[0]
    text = capsys.readouterr().out
    assert "exact experts" in text
    assert "experts by the plan" in text


def test_a_placement_with_tiers_without_a_cluster_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures that take everything for resident say so; a predictor that cannot be is one sentence."""
    out = str(folder / "p.json")
    run(folder, "solve", str(folder / "t.trace"), "--time-limit", "1", "--out", out)
    assert main(["evaluate", str(folder / "t.trace"), out]) == 0
    assert "as if every expert were in fast memory" in capsys.readouterr().out
    words = ["evaluate", str(folder / "t.trace"), out, "--cluster", str(folder / "c.toml"), "--accuracy", "2"]
    assert main(words) == 1
    assert "accuracy of a predictor (2.0) must lie in 0..1" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--policy", "pinned"], ["--accuracy", "0.9"], ["--look-ahead", "1"]])
@pytest.mark.parametrize("has_file", [True, False])
def test_flags_of_tiers_need_tiers(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], has_file: bool
) -> None:
    """None is dropped in silence; nothing is written."""
    trace, out = str(folder / "t.trace"), folder / "p.json"
    (folder / "flat.toml").write_text("ranks_per_node = 2\nslots_per_rank = 4\n")
    cluster = ["--cluster", str(folder / "flat.toml")] if has_file else ["--ranks", "4"]
    assert main(["solve", trace, *cluster, *flags, "--time-limit", "1", "--out", str(out)]) == 1
    assert f"{flags[0]} ({flags[1]}) needs memory tiers" in capsys.readouterr().err
    assert not out.exists()
    assert (
        main(["solve", trace, "--ranks", "2", "--solver", "index-order", "--time-limit", "1", "--out", str(out)]) == 0
    )
    assert main(["evaluate", trace, str(out), *flags]) == 1
    assert f"{flags[0]} ({flags[1]}) needs memory tiers" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--host-slots", "2"], ["--fast-policy", "lru"]])
def test_flags_of_fast_memory_need_its_size(
    flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before any rank starts."""
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "a"}\n')
    words = ["serve", str(tiny_moe_path()), "--requests", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*words, *flags]) == 1
    assert f"{flags[0]} ({flags[1]}) needs --fast-slots" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
