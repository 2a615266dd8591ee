"""`--replica-rule` from end to end: solve writes it, evaluate judges by it, export says what remains."""

import argparse
import json
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from moeplace.launch.commands import evaluate, export, solve
from moeplace.launch.serving.front_arguments import add_engine_arguments, replica_rule_of
from moeplace.placement.engines import read_engine_placement
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.placement_file import load_placement_file, save_placement
from moeplace.profiling.errors import MoeplaceWarning
from moeplace.profiling.traces.file import save_trace
from tests.launch.commands import run
from tests.placement.instances import skewed_trace

RULES = ("moeplace", "balanced", "nearest-static", "random", "hash")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Twelve experts, top-3, ten sequences."""
    tokens = skewed_trace(5, tokens=400, layers=2, experts=12, top_k=3)
    path = tmp_path / "t.npz"
    save_trace(path, tokens.replace(sequence_ids=np.arange(400) // 40))
    return path


def with_replicas(path: Path) -> Path:
    """All slots of four ranks used."""
    rows = [[0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 0, 9, 10, 11, 3]] * 2
    save_placement(path, Placement(np.array(rows), np.full(4, 4), np.zeros(4, int), np.full(2, 12)))
    return path


def test_evidence_names_the_rule(tmp_path: Path, trace: Path) -> None:
    """What a placement file promises is by the rule asked for, and the figures by the other rules stand beside it."""
    out = tmp_path / "p.json"
    arguments = ("--ranks", "4", "--slots-per-rank", "4", "--objective", "traffic", "--time-limit", "0.5", "--out", out)
    assert run(solve, trace, "--replica-rule", "hash", *arguments) == 0
    evidence = load_placement_file(out).evidence
    assert evidence["replica_rule"] == "hash"
    by_rule = evidence["by_replica_rule"]
    assert set(by_rule) == set(RULES)
    assert by_rule["hash"]["ranks_per_token"] == evidence["ranks_per_token"]


def test_evaluate_judges_by_the_rule(tmp_path: Path, trace: Path) -> None:
    """The JSON names the rule; ranks per token differ between rules where there are replicas."""
    placement, figures = with_replicas(tmp_path / "p.json"), {}
    for rule in RULES:
        out = tmp_path / f"{rule}.json"
        assert run(evaluate, trace, placement, "--replica-rule", rule, "--json", out) == 0
        document = json.loads(out.read_text())
        assert document["replica_rule"] == document["index_order"]["replica_rule"] == rule
        figures[rule] = document["ranks_per_token"]
    assert max(figures["moeplace"], figures["balanced"]) < min(figures[rule] for rule in RULES[2:])


def test_export_says_what_remains(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the engine's rule on a trace; without one, a word that nobody judged."""
    placement, out = with_replicas(tmp_path / "p.json"), tmp_path / "engine.json"
    assert run(export, placement, "--to", "sglang", "--out", out, "--trace", trace) == 0
    printed = capsys.readouterr().out
    assert "--ep-dispatch-algorithm static (nearest-static)" in printed
    assert "ranks per token remain of the" in printed
    assert run(export, placement, "--to", "vllm", "--out", tmp_path / "v.json") == 0
    assert "give --trace" in capsys.readouterr().out


def test_export_judges_what_it_writes(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replicas that fill empty slots are not in the plan's figures: none are said, or those of the file."""
    plan, out, again, figures = (tmp_path / name for name in ("p.json", "engine.json", "again.json", "f.json"))
    table = load_placement_file(with_replicas(plan)).placement.slot_to_expert.copy()
    table[:, [4, 11]] = -1  # replicas of 3 and 0; those of 6 and 3 stay
    placement = Placement(table, np.full(4, 4), np.zeros(4, int), np.full(2, 12))
    promised = {"ranks_per_token": 1.0, "imbalance_mean": 1.0}
    rules = RULES
    save_placement(plan, placement, evidence={"by_replica_rule": dict.fromkeys(rules, promised)})
    assert run(export, plan, "--to", "vllm-ascend", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "4 empty slots" in printed
    assert "remain of the" not in printed
    assert "give --trace" in printed
    assert run(export, plan, "--to", "vllm-ascend", "--out", out, "--trace", trace) == 0
    printed = capsys.readouterr().out
    written = read_engine_placement(out, "vllm-ascend")
    assert (written.slot_to_expert >= 0).all()
    save_placement(again, written)
    assert run(evaluate, trace, again, "--replica-rule", "random", "--json", figures) == 0
    assert f"{json.loads(figures.read_text())['ranks_per_token']:.3f} ranks per token remain" in printed


def test_a_trace_of_one_sequence_is_judged_whole(tmp_path: Path) -> None:
    """It cannot be split: all of it, with a warning, as `solve` does."""
    tokens = skewed_trace(5, tokens=50, layers=1, experts=4)
    path, placement, out = tmp_path / "t.npz", tmp_path / "p.json", tmp_path / "f.json"
    save_trace(path, tokens.replace(sequence_ids=np.zeros(50, np.int64)))
    save_placement(placement, index_order(np.full(1, 4), np.full(2, 2), np.zeros(2, int)))
    with pytest.warns(MoeplaceWarning, match="judged on all tokens"):
        assert run(evaluate, path, placement, "--json", out) == 0
    assert json.loads(out.read_text())["split"] == "all"


def test_evaluate_knows_topologies(tmp_path: Path, trace: Path) -> None:
    """A graph with one slow link makes the step longer than one without."""
    placement, seconds = with_replicas(tmp_path / "p.json"), []
    for slow in (1e11, 1e7):
        graph: nx.Graph[str] = nx.Graph()
        for name in "abcd":
            graph.add_node(name, kind="gpu", node=0)
            graph.add_edge(name, "switch", bandwidth=1e11 if name < "d" else slow)
        nx.write_graphml(graph, tmp_path / "g.graphml")
        out = tmp_path / "f.json"
        assert run(evaluate, trace, placement, "--topology", tmp_path / "g.graphml", "--json", out) == 0
        seconds.append(json.loads(out.read_text())["predicted_seconds"])
    assert seconds[1] > 10 * seconds[0]


def test_serving_follows_what_was_solved_for(tmp_path: Path, trace: Path) -> None:
    """The placement file's rule where the runtime knows it, unless another is asked for; engines' are refused."""
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    for solved_for, asked, expected in (
        ("balanced", [], "balanced"), ("moeplace", [], "moeplace"), ("hash", [], "moeplace"),
        ("balanced", ["--replica-rule", "moeplace"], "moeplace"), ("hash", ["--replica-rule", "balanced"], "balanced"),
    ):  # fmt: skip
        plan = with_replicas(tmp_path / "p.json")
        save_placement(plan, load_placement_file(plan).placement, evidence={"replica_rule": solved_for})
        args = parser.parse_args(["--placement", str(plan), *asked])
        assert replica_rule_of(args) == expected
    assert replica_rule_of(parser.parse_args([])) == "moeplace"
    with pytest.raises(SystemExit):
        parser.parse_args(["--replica-rule", "hash"])


def test_export_of_a_plan_by_running_load(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Engines do not follow that rule: what remains of its figures is said beside them."""
    out, engine = tmp_path / "p.json", tmp_path / "engine.json"
    arguments = ("--ranks", "4", "--slots-per-rank", "4", "--objective", "traffic", "--time-limit", "0.5", "--out", out)
    assert run(solve, trace, "--replica-rule", "balanced", *arguments) == 0
    evidence = load_placement_file(out).evidence
    assert run(export, out, "--to", "vllm", "--out", engine) == 0
    assert f"of the {evidence['ranks_per_token']:.3f} by moeplace's own" in capsys.readouterr().out
