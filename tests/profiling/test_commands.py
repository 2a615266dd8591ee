"""The commands profile, import and stats as functions of their arguments."""

import argparse
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from moeplace.profiling.errors import InputError
from moeplace.profiling.synthetic.traces import planted
from moeplace.profiling.synthetic.workloads import make_workload
from moeplace.profiling.traces.file import load_trace, save_trace
from moeplace.profiling.traces.trace import RoutingTrace
from tests.profiling import sources
from tests.shared_data import text_paths, tiny_moe_path


def run(command: str, *arguments: object) -> int:
    """Parse and run one command module."""
    module = importlib.import_module(f"moeplace.launch.commands.{command}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return int(module.run(parser.parse_args([str(argument) for argument in arguments])))


def test_profile_then_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Profile the shipped model over two texts; stats prints its sections and writes the same figures as JSON."""
    texts = text_paths()[:2]
    assert run("profile", tiny_moe_path(), "--text", *texts, "--out", tmp_path / "t", "--max-tokens", 1500) == 0
    printed = capsys.readouterr().out
    config = json.loads((Path(tiny_moe_path()) / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_dim = 2 * config["num_key_value_heads"] * (config.get("head_dim") or width // heads)
    for part in (
        f"{tmp_path / 't'}: 3000 tokens of 2 texts x 6 layers x 16 experts, top-1 (", "decoder layers 0-5 of 6\n",
        f": hidden size {width}, {kv_dim} K/V elements", f"moeplace stats {tmp_path / 't'} --ranks 8",
    ):  # fmt: skip
        assert part in printed
    assert "not in the trace" not in printed
    assert run("stats", tmp_path / "t", "--json", tmp_path / "s.json", "--compare", tmp_path / "t") == 0
    out = capsys.readouterr().out
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["format"] == "moeplace.stats/1"
    assert document["trace"]["workloads"] == {"kjv": 1500, "python-docs": 1500}
    assert document["affinity"]["bits"] > document["affinity"]["control_bits"]
    assert {score["length"] for score in document["srp"]} == {4, 16, 64}
    assert not document["drift"]["is_significant"]
    for part in ("load skew", "affinity bits", "SRP", "SCH 16", "belady", "no drift beyond chance"):
        assert part in out


def test_stats_of_odd_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One layer, one token, one sequence: every figure that has no meaning is left out, none is invented."""
    made = make_workload("W0", num_tokens=8, num_layers=1, num_experts=4, top_k=1, num_ranks=2, seed=0).trace
    for number, trace in enumerate((made, made.select(slice(0, 1)), made.replace(sequence_ids=None))):
        save_trace(tmp_path / f"t{number}", trace)
        assert run("stats", tmp_path / f"t{number}", "--json", tmp_path / "s.json") == 0
        document = json.loads((tmp_path / "s.json").read_text())
        assert document["affinity"]["bits"] is None
    assert "no sequence ids" in capsys.readouterr().out


def test_stats_of_several_recordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their sum, a line for each; what needs their tokens together is refused with the way to join them."""
    for number in (1, 2):
        ids = np.full((6, 2, 1), number, np.int16)
        trace = RoutingTrace(ids, np.full(2, 4), sequence_ids=np.arange(6) // 2)
        save_trace(tmp_path / f"t{number}", trace)
    names = [tmp_path / "t1", tmp_path / "t2"]
    assert run("stats", *names, "--json", tmp_path / "s.json") == 0
    text = capsys.readouterr().out
    assert "2 recordings: 12 tokens in 6 sequences" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith(str(tmp_path))}
    assert rows == {str(name): ["6", "3", "4.0000", "0.5000"] for name in names}
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["load"]["skew_mean"] == 2.0  # two of four experts have all of it
    for flags, name in ((["--ranks", "2"], "a cluster"), (["--compare", tmp_path / "t1"], "--compare")):
        with pytest.raises(InputError, match=f"{name} needs one trace, not 2: join them by `moeplace import"):
            run("stats", *names, *flags)


def test_stats_judges_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --ranks: verdict, tokens needed and, with a second trace, what survives; as text and as JSON."""
    shape = {"num_tokens": 2048, "num_layers": 2, "num_experts": 8, "top_k": 1, "num_ranks": 2, "epsilon": 0.1}
    for seed in (1, 2):
        save_trace(tmp_path / f"t{seed}", planted(**shape, seed=seed)[0])
    flags = ["--no-locality", "--ranks", 2, "--time-limit", 3, "--json", tmp_path / "s.json"]
    assert run("stats", tmp_path / "t1", "--compare", tmp_path / "t2", *flags) == 0
    out = capsys.readouterr().out
    document = json.loads((tmp_path / "s.json").read_text())
    for part in ("verdict", "curve", "carry_over"):
        assert document[part]["sentence"] in out
    assert len(document["verdict"]["options"]) == 6
    assert document["verdict"]["conditions"]["links"] == "nominal links and expert times"
    assert document["curve"]["points"][-1]["tokens"] == 1024
    assert run("stats", tmp_path / "t1", *flags, "--no-curve") == 0
    assert "curve" not in json.loads((tmp_path / "s.json").read_text())
    for flag, value in (("--tolerance", 0), ("--time-limit", -1), ("--ranks", 9)):
        with pytest.raises(InputError, match=r"must|ranks \(9\)"):
            run("stats", tmp_path / "t1", "--no-locality", "--ranks", 2, flag, value)


def test_adapters_from_import_to_solve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An interchange file with adapters: stats by adapter, separated experts, a mix and held-out adapters in solve."""
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((640, 3, 8)), axis=2)[:, :, :2]
    sequences = np.arange(640) // 16
    adapter = np.array([-1, 0, 0, 1, 1])[sequences % 5]
    names = np.array(["law", "code"])
    arrays = {"experts": experts, "sequence_ids": sequences, "adapter": adapter, "adapter_names": names}
    np.savez(tmp_path / "in.npz", **arrays)
    source, out = tmp_path / "in.npz", tmp_path / "t"
    assert run("import_trace", source, "--from", "npz", "--out", tmp_path / "s", "--separate-adapters") == 0
    assert "48 experts of 2 adapters" in capsys.readouterr().out
    assert load_trace(tmp_path / "s").experts_per_layer.tolist() == [24, 24, 24]
    assert run("import_trace", source, "--from", "npz", "--out", out) == 0
    assert run("stats", out, "--no-locality", "--json", tmp_path / "j") == 0
    document = json.loads((tmp_path / "j").read_text())["adapters"]
    assert {name: score["tokens"] for name, score in document.items()} == {"base": 128, "law": 256, "code": 256}
    assert "load against the rest" in capsys.readouterr().out
    flags = ["--ranks", 2, "--time-limit", 0.2, "--split-by", "adapter", "--mix", "law=3,base=1"]
    assert run("solve", out, *flags) == 0
    assert "held-out adapter" in capsys.readouterr().out
    with pytest.raises(InputError, match="names 'lax'"):
        run("solve", out, "--ranks", 2, "--mix", "lax=1")


def test_import_options_reach_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranges of layers, names and sizes."""
    path = sources.interchange(tmp_path)
    options = [
        "--layer-ids",
        "2,5-5",
        "--num-hidden-layers",
        9,
        "--model",
        "m",
        "--expert-bytes",
        3,
        "--hidden-size",
        4,
    ]
    options += ["--workload-names", "x, y", "--top-k", 1, "--num-experts", 6]
    assert run("import_trace", path, "--from", "npz", "--out", tmp_path / "t", *options) == 0
    trace = load_trace(tmp_path / "t")
    assert trace.layer_ids is not None
    assert (trace.layer_ids.tolist(), trace.num_hidden_layers, trace.model) == ([2, 5], 9, "m")
    assert (trace.hidden_size, trace.top_k, trace.num_experts, trace.workload_names) == (4, 1, 6, ("x", "y"))
    assert "40 tokens x 2 layers x 6 experts, top-1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run("import_trace", path, "--from", "npz", "--out", tmp_path / "t", "--layer-ids", "a-b")
    assert stop.value.code == 2
    assert "neither a layer nor a range" in capsys.readouterr().err


def test_a_profile_says_which_layers_it_leaves_out(tmp_path: Path) -> None:
    """Dense layers, experts that differ by layer, zero-computation experts: all of it read from the trace."""
    from moeplace.launch.commands.profile import summarise

    ids = np.array([[[0, 1], [2, 5]], [[1, 0], [3, 1]]])
    made = make_workload("W0", num_tokens=2, num_layers=2, num_experts=6, top_k=2, num_ranks=2, seed=0).trace
    trace = made.replace(
        topk_ids=ids, topk_weights=None, sequence_ids=None, experts_per_layer=np.array([3, 6]),
        layer_ids=np.array([1, 4]), num_hidden_layers=6, null_experts=2, model="m", hidden_size=7, kv_dim=9,
        expert_bytes=np.array([1500, 2500]),
    )  # fmt: skip
    save_trace(tmp_path / "t", trace)
    lines = summarise(str(tmp_path / "t"), tokens=2, texts=1).splitlines()
    head = f"{tmp_path / 't'}: 2 tokens of 1 text x 2 layers x 3 to 6 experts and 2 zero-computation ones, top-2 ("
    assert lines[0].startswith(head)
    assert lines[1:4] == [
        "MoE layers: decoder layers 1, 4 of 6",
        "not in the trace: decoder layers 0, 2-3, 5, which have no routed experts to place",
        "model m: hidden size 7, 9 K/V elements a token and decoder layer, 2.5 kB an expert",
    ]
    assert lines[4] == f"next: moeplace stats {tmp_path / 't'} --ranks 2 (is a placement worth having), or"
