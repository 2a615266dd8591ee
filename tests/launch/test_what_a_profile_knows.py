"""A trace's own sizes are the defaults of planning; a load file is used for what it allows."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.commands import compare, evaluate, import_trace, report, solve, stats
from moeplace.launch.options.layers import expert_counts, layer_range, slot_counts
from moeplace.launch.options.problem import add_kv_argument, step_shape
from moeplace.placement.cost.steps import StepShape, default_shape
from moeplace.placement.placement import Placement
from moeplace.placement.placement_file import load_placement, save_placement
from moeplace.profiling.errors import FormatError, InputError, MoeplaceWarning
from moeplace.profiling.synthetic.traces import planted
from moeplace.profiling.traces.file import load_trace, save_trace
from moeplace.profiling.traces.loads import LoadStats, save_load
from tests.launch.commands import run


def small_trace(**changes: object) -> object:
    trace, _ = planted(num_tokens=512, num_layers=2, num_experts=8, top_k=1, num_ranks=2, epsilon=0.1, seed=1)
    return trace.replace(**changes)


@pytest.mark.parametrize(("flag", "known", "expected"), [((), 96, 96), ((), 0, 576), (("--kv-dim", "7"), 96, 7)])
def test_the_size_of_kv(flag: tuple[str, ...], known: int, expected: int) -> None:
    """The flag, else the trace, else the nominal size; hidden size likewise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=32)
    add_kv_argument(parser)
    trace = small_trace(kv_dim=known, hidden_size=64)
    shape = step_shape(parser.parse_args(flag), trace)
    assert shape == StepShape(batch=32, hidden_size=64, kv_dim=expected)
    if not flag:
        assert default_shape(trace) == StepShape(hidden_size=64, kv_dim=expected)


def test_commands_use_it(tmp_path: Path) -> None:
    """`evaluate` of a coherent placement: the seconds follow the K/V size that the trace knows."""
    rows = np.tile(np.arange(8), (2, 1))
    save_placement(
        tmp_path / "p.json", Placement(rows, np.full(2, 4), np.zeros(2, int), np.full(2, 8), mode="coherent")
    )
    seconds = []
    for name, kv_dim, flag in (
        ("a", 96, ()),
        ("b", 40_000, ()),
        ("c", 0, ("--kv-dim", 96)),
        ("d", 7, ("--kv-dim", 96)),
    ):
        save_trace(tmp_path / name, small_trace(kv_dim=kv_dim))
        assert run(evaluate, tmp_path / name, tmp_path / "p.json", "--json", tmp_path / "e.json", *flag) == 0
        seconds.append(json.loads((tmp_path / "e.json").read_text())["predicted_seconds"])
    assert seconds[0] == seconds[2] == seconds[3] < seconds[1]


def test_one_prompt_has_no_other_side(tmp_path: Path) -> None:
    """One sequence: evaluate judges on all of it and says so; report names the flag that does."""
    save_trace(tmp_path / "t", small_trace(sequence_ids=np.zeros(512, int)))
    rows = np.tile(np.arange(8), (2, 1))
    save_placement(tmp_path / "p.json", Placement(rows, np.full(2, 4), np.zeros(2, int), np.full(2, 8)))
    with pytest.warns(MoeplaceWarning, match="one side of the split by sequence is empty: judged on all tokens"):
        assert run(evaluate, tmp_path / "t", tmp_path / "p.json") == 0
    with pytest.raises(InputError, match="split all judges"):
        run(report, tmp_path / "t", "--placement", tmp_path / "p.json", "--out", tmp_path / "r.html")
    assert run(evaluate, tmp_path / "t", tmp_path / "p.json", "--split", "all") == 0


def test_a_configuration_gives_what_flags_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`import --config`: experts, layers, sizes and the name; a flag wins."""
    folder = tmp_path / "toy-model"
    folder.mkdir()
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 5, "num_experts": 16,
              "dtype": "bfloat16", "moe_intermediate_size": 8, "n_shared_experts": 1}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    np.savez(tmp_path / "t.npz", experts=np.array([[[0, 1], [3, 2]], [[1, 7], [2, 3]]]), sequence_ids=[0, 1])
    source = (tmp_path / "t.npz", "--from", "npz", "--out", tmp_path / "t", "--layer-ids", "1,3")
    assert run(import_trace, *source, "--config", folder, "--hidden-size", 32) == 0
    trace = load_trace(tmp_path / "t")
    assert (trace.num_experts, trace.num_hidden_layers, trace.hidden_size, trace.kv_dim) == (16, 5, 32, 128)
    assert (trace.model, trace.shared_experts) == ("toy-model", 1)
    assert trace.expert_bytes is not None
    assert trace.expert_bytes.max() == 3 * 64 * 8 * 2
    assert "decoder layers 1, 3 of 5" in capsys.readouterr().out


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    load_LE = np.array([[8, 1, 1, 1, 1, 1, 1, 2], [1, 1, 1, 1, 1, 1, 1, 9]])
    save_load(tmp_path / "l.npz", LoadStats(load_LE))
    return tmp_path / "l.npz"


def test_a_load_file_is_used_or_sent_on(loads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """evaluate says the balance; what judges where tokens go names `moeplace solve`."""
    rows = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [7, 1, 2, 3, 4, 5, 6, 0]])
    save_placement(tmp_path / "p.json", Placement(rows, np.full(2, 4), np.zeros(2, int), np.full(2, 8)))
    assert run(evaluate, loads, tmp_path / "p.json", "--json", tmp_path / "e.json") == 0
    document = json.loads((tmp_path / "e.json").read_text())
    assert document["imbalance_mean"] == pytest.approx((11 / 8 + 12 / 8) / 2)
    assert document["index_order"]["imbalance_worst"] == pytest.approx(12 / 8)
    assert "imbalance worst" in capsys.readouterr().out
    for command, extra in ((stats, ()), (compare, ("--ranks", 2)),
                           (report, ("--placement", tmp_path / "p.json", "--out", tmp_path / "r.html"))):  # fmt: skip
        with pytest.raises(FormatError, match=r"holds loads without tokens: `moeplace solve` takes it"):
            run(command, loads, *extra)
    other = Placement(rows[:1], np.full(2, 4), np.zeros(2, int), np.full(1, 8))
    save_placement(tmp_path / "q.json", other)
    with pytest.raises(InputError, match=r"is for 1 layers of 8 experts, .* has 2 of 8"):
        run(evaluate, loads, tmp_path / "q.json")


def test_slots_by_rank_and_ways_on(loads: Path, tmp_path: Path) -> None:
    """Unequal ranks by flag; too few slots, too many ranks and uneven ranks name the flag that helps."""
    assert (
        run(solve, loads, "--ranks", 2, "--slots-per-rank", "3,5", "--out", tmp_path / "p.json", "--time-limit", 1) == 0
    )
    assert load_placement(tmp_path / "p.json").slots_of_rank.tolist() == [3, 5]
    with pytest.raises(
        InputError, match=r"ranks \(9\) exceed .* --slots-per-rank 1 gives every rank an expert, 9 slots"
    ):
        run(solve, loads, "--ranks", 9)
    with pytest.warns(MoeplaceWarning, match=r"--slots-per-rank 3 makes them equal \(9 slots, 1 redundant\)"):
        run(solve, loads, "--ranks", 3, "--time-limit", 1)
    from moeplace.profiling.errors import InfeasibleError

    with pytest.raises(InfeasibleError, match=r"1 are missing \(--slots-per-rank 4 is enough\)|4 is enough"):
        run(solve, loads, "--ranks", 2, "--slots-per-rank", 3)


def test_numbers_on_the_command_line() -> None:
    """Ranges of layers, experts by layer, slots by rank; nonsense is refused with an example."""
    assert layer_range("1-3,7") == (1, 2, 3, 7)
    assert (expert_counts("64"), expert_counts("64,60"), expert_counts("8x2,4")) == (64, (64, 60), (8, 8, 4))
    assert (slot_counts("9"), slot_counts("44,84")) == (9, [44, 84])
    for parse, text in ((layer_range, "a-b"), (expert_counts, "8xy"), (expert_counts, "8,y"), (slot_counts, "-1")):
        with pytest.raises(argparse.ArgumentTypeError, match=r"neither|not a number"):
            parse(text)
