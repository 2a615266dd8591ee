"""moeplace.policy.plan: what an engine may rely on. The oracle counts from slots alone."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.placement.placement import Placement
from moeplace.placement.placement_file import save_placement
from moeplace.placement.policy import readiness
from moeplace.placement.policy.in_force import of_file
from moeplace.policy import Answer, plan
from tests.seeds import TODAY

SEEDS = [*range(6), TODAY]


def instance(seed: int) -> dict[str, Any]:
    """Random loads, with a layer that has none, and a running map with holes and duplicates."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(1, 3))
    ranks = nodes * int(rng.integers(1, 4))
    experts = int(rng.integers(3, 24))
    per_rank = min(-(-experts // ranks) + int(rng.integers(0, 3)), experts)
    load = rng.zipf(1.6, (3, experts)).clip(0, 5000).astype(float)
    load[1] = 0
    spare = ranks * per_rank - experts
    rows = [np.concatenate([rng.permutation(experts), rng.integers(-1, experts, spare)]) for _ in range(3)]
    return {
        "load": load,
        "ranks": ranks,
        "slots_per_rank": per_rank,
        "nodes": nodes,
        "previous": np.stack([rng.permutation(row) for row in rows]),
    }


def over_steps(load_TE: np.ndarray, row: np.ndarray, ranks: int) -> float:
    """Sum over steps of the busiest rank over the sum of means."""
    count = {int(e): int((row == e).sum()) for e in row}
    busiest = sum(
        max(sum(load_E[int(e)] / count[int(e)] for e in held) for held in row.reshape(ranks, -1)) for load_E in load_TE
    )
    return busiest * ranks / load_TE.sum() if load_TE.sum() else 1.0


def test_by_default_all_ranks_are_on_one_node() -> None:
    """What is not said: no fetch crosses nodes, so none is held back."""
    given = {"load": [[9.0, 1, 1, 1]], "ranks": 2, "slots_per_rank": 3, "previous": [[0, 1, 0, 2, 3, 2]]}
    answer = plan(**given, max_moves_across_nodes=0, wait=True)
    assert answer.moves[0] > 0
    assert answer.across.tolist() == [0]
    assert plan(**given, nodes=2, max_moves_across_nodes=0, wait=True).moves.tolist() == [0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("limits", [{}, {"max_moves": 2}, {"max_moves_per_rank": 1}])
def test_every_slot_has_an_expert_and_every_expert_a_slot(seed: int, limits: dict[str, int]) -> None:
    """Whatever the limits and whatever holes the running map has: an engine takes no empty slot."""
    given = {**instance(seed), **limits}
    answer = plan(**given, wait=True)
    assert answer.reason is None
    for row, load_E, bound, value in zip(answer.map, given["load"], answer.bound, answer.imbalance, strict=True):
        assert set(row.tolist()) == set(range(len(load_E)))
        if load_E.any():
            assert value == pytest.approx(over_steps(load_E[None], row, given["ranks"]))
            assert bound <= value * (1 + 1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_full_map_moves_within_the_limit(seed: int) -> None:
    """Moves are counted from the running map, and the answer unpacks as map, moves, bound."""
    given = instance(seed)
    start, _, bound = plan(**{**given, "previous": None}, wait=True)
    assert (bound >= 1).all()
    rng = np.random.default_rng(seed)
    load = given["load"] * rng.lognormal(0, 0.5, given["load"].shape)
    answer = plan(**{**given, "previous": start, "load": load}, max_moves=2, wait=True)
    old = start.reshape(3, given["ranks"], -1)
    new = answer.map.reshape(old.shape)
    for layer in range(3):
        fetched = sum(len(set(b) - set(a)) for a, b in zip(old[layer].tolist(), new[layer].tolist(), strict=True))
        assert fetched == answer.moves[layer] <= 2
        worse = over_steps(load[layer][None], start[layer], given["ranks"])
        assert over_steps(load[layer][None], answer.map[layer], given["ranks"]) <= worse * (1 + 1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_steps_are_balanced_as_an_engine_waits_for_them(seed: int) -> None:
    """With a time axis the busiest rank of each step counts: never worse than planning for the sum, judged on steps."""
    given = instance(seed)
    rng = np.random.default_rng(seed)
    shape = (20, *given["load"].shape)
    load_TLE = np.floor(given["load"] * rng.lognormal(0, 1.0, shape))
    load_TLE[7] = 0  # a row of a ring that was not written
    summed = plan(**{**given, "load": load_TLE.sum(axis=0), "previous": None}, wait=True)
    stepped = plan(**{**given, "load": load_TLE, "previous": None}, wait=True)
    for layer in range(3):
        ours = over_steps(load_TLE[:, layer], stepped.map[layer], given["ranks"])
        theirs = over_steps(load_TLE[:, layer], summed.map[layer], given["ranks"])
        assert ours <= theirs * (1 + 3.1e-4)  # ties go to the plan that moves less
        assert stepped.imbalance[layer] == pytest.approx(ours)
        assert stepped.bound[layer] <= ours * (1 + 1e-9)


def test_steps_help_where_loads_vary_together() -> None:
    """Two experts that are busy in the same steps do not share a rank, though their sums say they might."""
    even, odd = np.tile([1.0, 0.0], 10), np.tile([0.0, 1.0], 10)
    load_TLE = np.stack([8 * even, 8 * odd + 4 * even, 6 + odd, 6 + even], axis=1)[:, None]
    answer = plan(load_TLE, ranks=2, slots_per_rank=2, wait=True)
    best = min(over_steps(load_TLE[:, 0], np.array(row), 2) for row in ([0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2]))
    summed = plan(load_TLE.sum(axis=0), ranks=2, slots_per_rank=2, wait=True)
    assert best - 1e-9 <= answer.imbalance[0] <= over_steps(load_TLE[:, 0], summed.map[0], 2) + 1e-9


START = np.arange(6, dtype=np.int64)[None] % 4
BROKEN: list[dict[str, Any]] = [
    {"load": np.full((1, 4), np.nan)},
    {"load": np.full((1, 4), -1.0)},
    {"load": "no loads"},
    {"load": None},
    {"load": np.ones((2, 4))},  # more layers than the map
    {"load": np.ones((1, 2, 3, 4))},
    {"load": np.empty((0, 4))},
    {"load": np.empty((1, 0))},
    {"ranks": 0},
    {"ranks": 4},
    {"ranks": None},
    {"ranks": 10**12},
    {"slots_per_rank": 1},
    {"nodes": 3},
    {"nodes": 0},
    {"max_moves": -1},
    {"max_moves": "many"},
    {"move_price": float("nan")},
    {"move_price": "dear"},
    {"time_limit": float("inf")},
    {"time_limit": None},
]


@pytest.mark.parametrize("wrong", BROKEN, ids=str)
def test_on_any_doubt_the_previous_map_is_returned_and_the_reason_said(wrong: dict[str, Any], caplog: Any) -> None:
    """Nothing is raised into an engine."""
    given: dict[str, Any] = {"load": np.ones((1, 4)), "ranks": 2, "slots_per_rank": 3, "previous": START, **wrong}
    answer = plan(**given, wait=True)
    assert np.array_equal(answer.map, START)
    assert answer.reason
    assert not answer.moves.any()
    assert answer.reason in caplog.text


@pytest.mark.parametrize("previous", [[[0, 1, 2, 9, 0, 1]], [[0.5] * 6], "abc", object(), [[0, 1], [2]], START[:, :5]])
def test_a_broken_map_is_never_improved_upon(previous: object) -> None:
    """What cannot be a map of these experts is handed back as far as it is an array, without an exception."""
    answer = plan(np.ones((1, 4)), ranks=2, slots_per_rank=3, previous=previous, wait=True)
    assert answer.reason
    assert not answer.moves.any()


@pytest.mark.parametrize("wrong", [each for each in BROKEN if each.keys() == {"load"}], ids=str)
def test_without_a_previous_map_nothing_is_raised_either(wrong: dict[str, Any]) -> None:
    """There is nothing to keep: index order where that is possible, else an empty map."""
    answer = plan(**{"ranks": 2, "slots_per_rank": 3, **wrong}, wait=True)
    assert answer.map.ndim == 2
    assert answer.map.size == 0 or answer.reason or set(answer.map[0].tolist()) == {0, 1, 2, 3}


def test_without_load_nothing_moves() -> None:
    """Engines ask so when they measure their memory; one without a map starts as engines do."""
    kept = plan(np.zeros((1, 4)), ranks=2, slots_per_rank=3, previous=START[:, ::-1], wait=True)
    assert np.array_equal(kept.map, START[:, ::-1])
    first = plan(np.zeros((2, 4)), ranks=2, slots_per_rank=3, wait=True)
    assert [set(row) for row in first.map.tolist()] == [{0, 1, 2, 3}] * 2


def test_the_answer_is_not_the_callers_array() -> None:
    """An engine changes its map in place."""
    answer = plan(np.zeros((1, 4)), ranks=2, slots_per_rank=3, previous=START, wait=True)
    assert not np.shares_memory(answer.map, START)


def test_threads_answer_alike() -> None:
    """Engines call it from threads of their own."""
    given = instance(3)
    alone = plan(**given, wait=True)
    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(lambda _: plan(**given), range(32)):
            assert answer.map.tobytes() == alone.map.tobytes()


CHILD = """
import json, sys
import numpy as np
before = set(sys.modules)
from moeplace.policy import plan
imported = {name.split(".")[0] for name in set(sys.modules) - before}
rng = np.random.default_rng(5)
load = rng.zipf(1.5, (2, 24)).clip(0, 900)
start = np.tile(np.arange(32) % 24, (2, 1))
answer = plan(load, ranks=8, slots_per_rank=4, nodes=2, groups=4, previous=start, max_moves=9, wait=True)
print(json.dumps([sorted(imported), answer.map.tolist(), answer.reason]))
"""


def child(**environment: str) -> list[Any]:
    """What a fresh interpreter answers."""
    run = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=110,
    )
    found: list[Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_processes_answer_alike_and_import_little() -> None:
    """Whatever the hash seed and the number of threads; nothing heavy is imported, and nothing that compiles."""
    runs = [child(PYTHONHASHSEED="1", NUMBA_NUM_THREADS="1"), child(PYTHONHASHSEED="2", OMP_NUM_THREADS="3")]
    assert runs[0] == runs[1]
    assert runs[0][2] is None
    assert not {"torch", "transformers", "ortools", "pulp", "ray", "numba", "networkx"} & set(runs[0][0])


def test_the_first_call_does_not_wait_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until kernels are compiled the previous map is returned; then, without being asked again, plans are."""
    compiler = threading.Event()
    import moeplace.profiling.kernel_cache as cache

    monkeypatch.setattr(cache, "is_compiled", lambda program: False)
    monkeypatch.setattr(cache, "compile_once", lambda program: compiler.wait(60))
    monkeypatch.setattr(readiness._OfThisProcess, "kernels", readiness.Kernels())

    def ask(*, wait: bool) -> Answer:
        return plan([[9, 1, 1, 1]], ranks=2, slots_per_rank=3, previous=START, wait=wait)

    for _ in range(3):
        assert "compiled" in str(ask(wait=False).reason)
    compiler.set()
    assert ask(wait=True).reason is None
    assert ask(wait=False).reason is None


def test_a_compiler_that_fails_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine keeps its map, and the log says what failed."""
    import moeplace.profiling.kernel_cache as cache

    def fail(program: str) -> None:
        raise OSError("no room")

    monkeypatch.setattr(cache, "compile_once", fail)
    monkeypatch.setattr(readiness._OfThisProcess, "kernels", readiness.Kernels())
    answer = plan([[9, 1, 1, 1]], ranks=2, slots_per_rank=3, previous=START, wait=True)
    assert np.array_equal(answer.map, START)
    assert "no room" in str(answer.reason)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_begins_anew() -> None:
    """An engine that forks its workers after a call: the child has no thread to wait for."""
    plan([[9, 1, 1, 1]], ranks=2, slots_per_rank=3, previous=START, wait=True)
    run = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False, timeout=110)
    assert run.returncode == 0, run.stderr


FORK = """
import os
from moeplace.placement.placement import Placement
from moeplace.placement.placement_file import save_placement
from moeplace.placement.policy import readiness
from moeplace.placement.policy.in_force import of_file
before = readiness.kernels()
child = os.fork()
if child == 0:
    os._exit(readiness.kernels() is before)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_file_with_empty_slots_is_loaded(tmp_path: Path) -> None:
    """A slot that a plan leaves empty repeats an expert of its rank: the map is full, and no rank holds more."""
    rows = np.array([[0, 1, -1, 2, 3, -1], [3, -1, -1, 2, 1, 0]])
    placement = Placement(rows, np.full(2, 3), np.zeros(2, int), np.full(2, 4))
    save_placement(tmp_path / "p.json", placement)
    answer = of_file(str(tmp_path / "p.json"), layers=2, experts=4, ranks=2, slots_per_rank=3, previous=None)
    assert answer.reason is None
    assert answer.map.tolist() == [[0, 1, 0, 2, 3, 2], [3, 3, 3, 2, 1, 0]]
