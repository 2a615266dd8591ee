"""The library of instances: what it covers, that recipes repeat, and that the checker believes nobody."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.benches.library.checker import Checker, check_entry
from moeplace.launch.benches.library.instance import SUITES, Instance, load_suite
from moeplace.launch.benches.library.recipes import AbsentTraceError
from moeplace.launch.benches.library.table import Entry, Table, is_less
from moeplace.launch.benches.solve import bench_instance, gap, shifted_mean
from moeplace.launch.cli import main
from moeplace.profiling.errors import FormatError
from tests.shared_data import ROOT

LIBRARY = ROOT / "benchmarks" / "instances"
TINY = {
    "name": "tiny",
    "about": "for tests",
    "trace": {"generator": "topics", "tokens": 256, "layers": 2, "experts": 8, "top_k": 2, "topics": 4,
              "contrast": 1.5, "seed": 3},
    "cluster": {"ranks": 2, "slots_per_rank": 4},
    "problem": {"max_imbalance": 1.3},
}  # fmt: skip


def instances() -> list[Instance]:
    return [instance for suite in SUITES for instance in load_suite(LIBRARY, suite)]


def test_the_library_covers_what_it_promises() -> None:
    """Thirty or more; every mode, K, ragged, replicas, nodes, unequal ranks, solving again, surviving, recorded."""
    everything = instances()
    assert len(everything) >= 30
    assert len({i.name for i in everything}) == len(everything)
    modes = {i.options.get("mode", "dispatch-combine") for i in everything}
    assert modes == {"dispatch-combine", "coherent", "allgather"}
    traced = [i for i in everything if not i.of_loads]
    assert {i.recipe.get("top_k") for i in traced} >= {1, 2, 4, 6, 8}
    for covered in (
        any("ragged" in i.recipe for i in traced),
        any("ranks_per_node" in i.cluster for i in everything),
        any("speed" in i.cluster for i in everything),
        any(isinstance(i.cluster["slots_per_rank"], list) for i in everything),
        any(i.options.get("survive") for i in everything),
        any(i.options.get("replica_budget") == "global" for i in everything),
        any("max_moves" in i.previous for i in everything),
        any(i.options.get("objective") == "seconds" for i in everything),
        any("file" in i.recipe for i in traced),
        any(i.of_loads for i in everything),
    ):
        assert covered


def test_recipes_repeat() -> None:
    """The same recipe makes the same tokens; another seed makes others."""
    one = Instance.from_entry(TINY).problem()
    again = Instance.from_entry(TINY).problem()
    other = Instance.from_entry({**TINY, "trace": {**TINY["trace"], "seed": 4}}).problem()
    assert np.array_equal(one.trace.topk_ids, again.trace.topk_ids)
    assert not np.array_equal(one.trace.topk_ids, other.trace.topk_ids)


@pytest.mark.parametrize("change", [{"trace": {"generator": "nonsense"}}, {"surprise": 1}, {"cluster": {"ranks": 2}},
                                    {"cluster": {"ranks": 2, "slots_per_rank": 4, "colour": 1}},
                                    {"trace": {"generator": "topics", "seed": 1}},
                                    {"previous": {"by": "nobody"}}])  # fmt: skip
def test_wrong_descriptions_are_refused(change: dict) -> None:
    with pytest.raises(FormatError):
        Instance.from_entry({**TINY, **change}).problem()


def test_a_recorded_trace_may_be_absent(tmp_path: Path) -> None:
    entry = {**TINY, "trace": {"file": "nowhere.npz", "experts": 8}}
    for traces in (None, tmp_path):
        with pytest.raises(AbsentTraceError, match="not on this machine"):
            Instance.from_entry(entry).problem(traces)


def recorded(library: Path) -> tuple[Instance, Table]:
    """A table that knows the tiny instance."""
    instance, table = Instance.from_entry(TINY), Table(library)
    bench_instance(instance, table, solvers=["index-order", "lpt"], time_limit=0.2, seeds=[0], traces=None,
                   record=True)  # fmt: skip
    return instance, Table.load(library)


def test_what_is_recorded_is_confirmed(tmp_path: Path) -> None:
    """The first run fills the table, the better of two values stays, and the checker agrees."""
    instance, table = recorded(tmp_path)
    entry = table.entries["tiny"]
    assert check_entry(instance, entry, table, None) == []
    outcome = bench_instance(instance, table, solvers=["auto"], time_limit=0.5, seeds=[0], traces=None, record=True)
    better = Table.load(tmp_path).entries["tiny"]
    assert outcome.value("auto") == pytest.approx(better.value)
    assert better.value <= entry.value
    assert check_entry(instance, better, Table.load(tmp_path), None) == []


def test_the_checker_finds_lies(tmp_path: Path) -> None:
    """A value too good, a bound above the value, a tampered placement, other tokens, a cap that is broken."""
    instance, table = recorded(tmp_path)
    entry = table.entries["tiny"]

    def says(changed: Entry) -> str:
        return " ".join(check_entry(instance, changed, table, None))

    assert "the table says" in says(replace(entry, value=entry.value * 0.99))
    assert "exceeds the value" in says(replace(entry, bound=entry.value * 1.01))
    assert "the certificate proves" in says(replace(entry, bound=entry.bound * 1.001))
    assert "other tokens" in says(replace(entry, tokens_digest="sha256:0"))
    assert "held to" in says(replace(entry, caps=(1.0, 1.0)))
    path = table.solution_path("tiny")
    document = json.loads(path.read_text())
    row = document["slot_to_expert"][0]
    row[0], row[-1] = row[-1], row[0]
    path.write_text(json.dumps(document))
    assert says(entry)
    document["slot_to_expert"][0][0] = row[1]
    path.write_text(json.dumps(document))
    assert "twice" in says(entry)


def test_what_breaks_a_rule_is_not_recorded(tmp_path: Path) -> None:
    """Index order breaks the cap here: it is shown, not counted, and never becomes the best known."""
    tight = Instance.from_entry({**TINY, "problem": {"max_imbalance": 1.0001}})
    table = Table(tmp_path)
    outcome = bench_instance(tight, table, solvers=["index-order"], time_limit=0.2, seeds=[0], traces=None, record=True)
    assert outcome.value("index-order") is None
    assert outcome.runs[0].judged.broken
    assert "tiny" not in table.entries


def test_checker_values_do_not_come_from_the_solver() -> None:
    """The judgement of a placement needs nothing but the problem and the slots."""
    problem = Instance.from_entry(TINY).problem()
    checker = Checker(problem, "traffic", None)
    judged = checker.judge(np.tile(np.arange(8), (2, 1)), np.array([4, 4]))
    ids = problem.trace.topk_ids
    by_hand = np.mean([[len({e // 4 for e in row}) for row in token] for token in ids])
    assert judged.value == pytest.approx(by_hand)


def test_gaps_and_means() -> None:
    assert gap(1.1, 1.0) == pytest.approx(0.1)
    assert gap(0.0, 0.0) == 0
    assert gap(1.0, 0.0) == float("inf")
    assert shifted_mean([(2.0, 1.0), (1.0, 2.0)]) == pytest.approx(0.0)
    assert shifted_mean([(0.0, 0.0)]) == 0
    assert shifted_mean([]) is None
    assert not is_less(1.0 - 1e-12, 1.0)
    assert is_less(0.999, 1.0)


def test_the_shipped_table_is_confirmed(capsys: pytest.CaptureFixture[str]) -> None:
    """Three entries by name here; `moeplace bench solve --check` does all."""
    names = "l-eplb-readme,d-planted-64x8,c-mixtral-32x8-r4"
    assert main(["bench", "solve", "--check", "--library", str(LIBRARY), "--only", names]) == 0
    assert "3 of 3 confirmed, 0 wrong" in capsys.readouterr().out


def test_the_command_prints_gaps_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "small.toml").write_text(
        '[[instance]]\nname = "four"\nabout = "x"\nloads = { rows = [[4, 3, 2, 1]] }\n'
        "cluster = { ranks = 2, slots_per_rank = 2 }\n"
    )
    out = tmp_path / "out.json"
    words = ["bench", "solve", "--library", str(library), "--solvers", "auto,index-order", "--time-limit", "0.2",
             "--seeds", "2", "--record", "--json", str(out)]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "geometric mean" in printed
    assert "first value 1, bound 1" in printed
    document = json.loads(out.read_text())
    (row,) = document["instances"]
    assert [run["seed"] for run in row["runs"]] == [0, 7, 0]
    assert [run["value"] for run in row["runs"]] == [1.0, 1.0, 1.4]
    assert document["summary"]["index-order"]["gap_to_best_known"] == pytest.approx(0.4, rel=1e-3)
    assert main(["bench", "solve", "--library", str(library), "--only", "five"]) == 1
    assert "not in the suite" in capsys.readouterr().err


def test_traces_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is named must exist, before anything is solved."""
    words = ["bench", "solve", "--solvers", "index-order", "--json", str(tmp_path / "f.json")]
    for more in ([], ["--check"]):
        assert main([*words, "--traces", str(tmp_path / "none"), *more]) == 1
        assert f"no such folder of traces: {tmp_path / 'none'}" in capsys.readouterr().err
    assert not (tmp_path / "f.json").exists()
