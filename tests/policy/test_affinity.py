"""Plans with a recorded trace: fewer ranks per token within a cap on imbalance and limits on moves.

The oracle counts from slots alone, and draws the replica that serves a token by itself.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.placement.policy import planning
from moeplace.policy import Answer, plan
from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.trace import RoutingTrace
from tests.seeds import TODAY

SEEDS = [*range(5), TODAY]


def recorded(rng: np.random.Generator, tokens: int, layers: int, experts: int) -> np.ndarray:
    """(T, L, 3) tokens of topics: two experts of a token's own third of the experts and one of any, shuffled."""
    topics = [rng.permutation(experts) for _ in range(layers)]
    third = experts // 3
    rows = []
    for token in range(tokens):
        begin, picks = third * (token % 3), []
        for order in topics:
            near = rng.choice(third, 2, replace=False) + begin
            far = int(rng.choice(np.setdiff1d(np.arange(experts), near)))
            picks.append(order[[*near, far]])
        rows.append(picks)
    return np.array(rows)


def instance(seed: int) -> dict[str, Any]:
    """A model of three layers whose tokens have topics, the loads of other tokens of it, a map in force."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    nodes, per_node = int(rng.integers(1, 3)), int(rng.integers(2, 4))
    ranks, experts = nodes * per_node, int(rng.integers(12, 25))
    per_rank = -(-experts // ranks) + int(rng.integers(0, 3))
    ids = recorded(rng, 900, 3, experts)
    load = np.stack([np.bincount(ids[600:, layer].ravel(), minlength=experts) for layer in range(3)])
    spare = ranks * per_rank - experts
    rows = [rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, spare)])) for _ in range(3)]
    return {
        "load": load,
        "ranks": ranks,
        "slots_per_rank": per_rank,
        "nodes": nodes,
        "previous": np.stack(rows),
        "trace": RoutingTrace(ids[:600], np.full(3, experts)),
        "trace_time_limit": 0.2,
    }


def by_loads(given: dict[str, Any], **changes: Any) -> Answer:
    """The plan without the trace."""
    return plan(**{**given, "trace": None, **changes}, wait=True)


def imbalance(row: np.ndarray, load_E: np.ndarray, ranks: int) -> float:
    """Busiest rank over mean, slot by slot."""
    count = {int(e): int((row == e).sum()) for e in row}
    return (
        max(sum(load_E[int(e)] / count[int(e)] for e in held) for held in row.reshape(ranks, -1)) * ranks / load_E.sum()
    )


def ranks_per_token(row: np.ndarray, ids: np.ndarray, ranks: int, group: int = 1) -> float:
    """Distinct ranks (groups of ranks) per token, any slot of an expert serving; of a fixed draw."""
    rng = np.random.default_rng(99)
    slots = {int(e): np.flatnonzero(row == e) for e in row}
    per_rank = len(row) // ranks * group
    return float(np.mean([len({int(rng.choice(slots[int(e)])) // per_rank for e in token}) for token in ids]))


def fetched(before: np.ndarray, after: np.ndarray, ranks: int, nodes: int) -> tuple[int, int, int]:
    """(experts fetched, most by one rank, new to their node)."""
    old, new = before.reshape(ranks, -1).tolist(), after.reshape(ranks, -1).tolist()
    each = [set(b) - set(a) for a, b in zip(old, new, strict=True)]
    size = ranks // nodes
    had = [set().union(*old[n * size : (n + 1) * size]) for n in range(nodes)]
    across = sum(len(experts - had[rank // size]) for rank, experts in enumerate(each))
    return sum(map(len, each)), max(map(len, each)), across


@pytest.mark.parametrize("rule", ["hash", "random", "nearest-static"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_trace_brings_experts_together_within_the_cap(seed: int, rule: str) -> None:
    """Tokens are served on fewer ranks (nodes) than by loads alone; the cap holds wherever loads alone reach it."""
    given = instance(seed)
    ids, ranks, nodes = given["trace"].topk_ids, given["ranks"], given["nodes"]
    plain, answer = by_loads(given), plan(**given, replica_rule=rule, max_imbalance=1.2, wait=True)
    assert answer.reason is None
    assert answer.note is None
    saved = 0.0
    for layer, load_E in enumerate(given["load"]):
        row, base = answer.map[layer].astype(int), plain.map[layer].astype(int)
        assert set(row.tolist()) == set(range(len(load_E)))
        assert imbalance(row, load_E, ranks) <= max(1.2, imbalance(base, load_E, ranks)) * (1 + 1e-6)
        assert answer.imbalance[layer] == pytest.approx(imbalance(row, load_E, ranks))
        assert answer.bound[layer] <= answer.imbalance[layer] * (1 + 1e-9)
        moved = fetched(given["previous"][layer], row, ranks, nodes)
        assert (answer.moves[layer], answer.across[layer]) == (moved[0], moved[2])
        group = ranks // nodes if nodes > 1 else 1
        saved += ranks_per_token(base, ids[:, layer], ranks, group) - ranks_per_token(row, ids[:, layer], ranks, group)
    assert saved > 0.1 * 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "limits",
    [
        {"max_moves": 4},
        {"max_moves": 0},
        {"max_moves_per_rank": 1},
        {"max_moves_across_nodes": 1},
        {"max_moves": 6, "max_moves_per_rank": 2, "max_moves_across_nodes": 2},
    ],
    ids=str,
)
def test_limits_on_moves_hold_with_a_trace(seed: int, limits: dict[str, int]) -> None:
    """All three, together and alone, from a running map with and without duplicates."""
    given = instance(seed)
    rng = np.random.default_rng(seed)
    given["load"] = given["load"] * rng.lognormal(0, 0.3, given["load"].shape)
    answer = plan(**given, **limits, wait=True)
    plain = by_loads(given, **limits)
    assert answer.note is None
    for layer in range(3):
        found = fetched(given["previous"][layer], answer.map[layer], given["ranks"], given["nodes"])
        allowed = [limits.get(name, 10**9) for name in ("max_moves", "max_moves_per_rank", "max_moves_across_nodes")]
        assert all(count <= limit for count, limit in zip(found, allowed, strict=True)), found
        alone = imbalance(plain.map[layer].astype(int), given["load"][layer], given["ranks"])
        reached = imbalance(answer.map[layer].astype(int), given["load"][layer], given["ranks"])
        assert reached <= max(1.1, alone) * (1 + 1e-6)


@pytest.mark.parametrize("seconds", [0, 0.01])
def test_little_time_is_no_harm(seconds: float) -> None:
    """What is found is within the cap, or balances as loads alone do."""
    given = instance(1)
    answer, plain = plan(**{**given, "trace_time_limit": seconds}, wait=True), by_loads(given)
    assert answer.note is None
    for layer, load_E in enumerate(given["load"]):
        reached, alone = (imbalance(each.map[layer].astype(int), load_E, given["ranks"]) for each in (answer, plain))
        assert reached <= max(1.1, alone) * (1 + 1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_asked_again_it_comes_to_rest(seed: int) -> None:
    """With the same loads every change must save a share of the ranks per token, so there is an end to it."""
    given = instance(seed)
    for _ in range(8):
        answer = plan(**given, wait=True)
        if not answer.moves.any():
            break
        given["previous"] = answer.map
    assert not answer.moves.any()


def test_groups_of_the_router_stay_on_their_nodes_with_a_trace() -> None:
    """An expert is fetched only by the node that holds most of its group."""
    rng = np.random.default_rng(3)
    home = np.repeat([0, 1, 1, 0], 4)
    old = np.stack(
        [np.concatenate([rng.permutation(np.resize(np.flatnonzero(home == n), 10)) for n in (0, 1)]) for _ in range(2)]
    )
    ids = recorded(rng, 600, 2, 16)
    load = np.stack([np.bincount(ids[:, layer].ravel(), minlength=16) for layer in range(2)])
    given = {"ranks": 4, "slots_per_rank": 5, "nodes": 2, "previous": old, "trace": RoutingTrace(ids, np.full(2, 16))}
    answer = plan(load, groups=4, **given, wait=True)
    assert answer.moves.sum() > 0
    assert (home[answer.map] == np.repeat([0, 1], 10)).all()
    assert (home[plan(load, **given, wait=True).map] != np.repeat([0, 1], 10)).any()


def test_rows_of_dense_layers_stay(tmp_path: Path) -> None:
    """SGLang has a row for every decoder layer: those of the trace are found by their number."""
    rng = np.random.default_rng(4)
    ids = recorded(rng, 600, 2, 12)
    trace = RoutingTrace(ids, np.full(2, 12), layer_ids=np.array([1, 3]), num_hidden_layers=5)
    load = np.zeros((5, 12))
    for row, layer in ((1, 0), (3, 1)):
        load[row] = np.bincount(ids[:, layer].ravel(), minlength=12)
    old = np.tile(np.arange(12), (5, 1))
    answer = plan(load, ranks=3, slots_per_rank=4, previous=old, trace=trace, wait=True)
    assert answer.note is None
    assert (answer.map[[0, 2, 4]] == old[[0, 2, 4]]).all()
    for row, layer in ((1, 0), (3, 1)):
        assert ranks_per_token(answer.map[row], ids[:, layer], 3) < ranks_per_token(old[row], ids[:, layer], 3) - 0.1


def misfits(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Traces that do not serve, and what is said of each."""
    ids = np.zeros((4, 2, 1), np.int16)
    (folder / "text.npz").write_text("no archive")
    np.savez(folder / "raw.npz", experts=ids)
    return {
        "absent": ({"trace": folder / "none.npz"}, "none.npz was not found"),
        "a folder": ({"trace": str(folder)}, "not found"),
        "no trace": ({"trace": folder / "text.npz"}, "text.npz"),
        "another format": ({"trace": folder / "raw.npz"}, "moeplace import"),
        "an object": ({"trace": 5}, "num_tokens"),
        "other layers": ({"trace": RoutingTrace(ids, np.full(2, 12))}, "2 MoE layers"),
        "other experts": ({"trace": RoutingTrace(np.zeros((4, 3, 1), np.int16), np.full(3, 13))}, "13 experts"),
        "uneven": ({"trace": RoutingTrace(np.zeros((4, 3, 1), np.int16), np.array([12, 14, 12]))}, "14 experts"),
        "no token": ({"trace": RoutingTrace(np.zeros((0, 3, 1), np.int16), np.full(3, 12))}, "no token"),
        "no rule": ({"replica_rule": "best"}, "'best'"),
        "no rule of engines": ({"replica_rule": "balanced"}, "no engine follows it"),
        "a cap below 1": ({"max_imbalance": 0.9}, "max_imbalance (0.9)"),
        "no cap": ({"max_imbalance": float("nan")}, "max_imbalance (nan)"),
        "no time": ({"trace_time_limit": -1}, "trace_time_limit (-1)"),
    }


def test_a_trace_that_does_not_fit_leaves_the_plan_by_loads(tmp_path: Path, caplog: Any) -> None:
    """Whatever is wrong with it: the same map as without, a note, and one line in the log however often it is asked."""
    planning._say_once.cache_clear()
    rng = np.random.default_rng(1)
    ids = recorded(rng, 50, 3, 12)
    given: dict[str, Any] = {"load": rng.integers(1, 99, (3, 12)), "ranks": 3, "slots_per_rank": 5}
    plain = plan(**given, wait=True)
    for name, (wrong, said) in misfits(tmp_path).items():
        caplog.clear()
        for _ in range(2):
            answer = plan(**given, **{"trace": RoutingTrace(ids, np.full(3, 12)), **wrong}, wait=True)
            assert answer.reason is None, name
            assert said in str(answer.note), (name, answer.note)
            assert np.array_equal(answer.map, plain.map), name
        assert len(caplog.records) == 1, name


CHILD = """
import json, os, sys, threading
import numpy as np
from moeplace.policy import plan
found = []
def ask():
    rng = np.random.default_rng(5)
    load = rng.integers(1, 400, (2, 24))
    start = np.tile(np.arange(32) % 24, (2, 1))
    answer = plan(load, ranks=8, slots_per_rank=4, nodes=2, previous=start, max_moves=9, wait=True, trace=sys.argv[1])
    found.append([answer.map.tolist(), answer.moves.tolist(), answer.reason, answer.note])
threads = [threading.Thread(target=ask) for _ in range(int(sys.argv[2]))]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps([found, sorted({"torch", "ortools", "pulp", "ray", "transformers"} & set(sys.modules))]))
"""


def test_processes_and_threads_answer_alike_with_a_trace(tmp_path: Path) -> None:
    """Whatever the cores and the hash seed; a file is read once, and nothing heavy is imported."""
    ids = recorded(np.random.default_rng(2), 700, 2, 24)
    save_trace(tmp_path / "trace.npz", RoutingTrace(ids, np.full(2, 24)))
    runs = []
    for threads, environment in ((1, {"PYTHONHASHSEED": "1", "NUMBA_NUM_THREADS": "1"}), (4, {"OMP_NUM_THREADS": "3"})):
        run = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path / "trace.npz"), str(threads)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
            timeout=110,
        )
        found, heavy = json.loads(run.stdout.splitlines()[-1])
        assert heavy == []
        assert len(found) == threads
        runs += found
    assert all(each == runs[0] for each in runs)
    assert runs[0][2:] == [None, None]
    assert sum(runs[0][1]) > 0
