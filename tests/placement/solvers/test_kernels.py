"""What the compiled searches return, against definitions and brute force: costs, hedge, ties, limits, optima.

Small enough to be run without compiling (NUMBA_DISABLE_JIT=1), so that faults in kernels are quickly looked for.
"""

import ast
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.search.annealing import (
    accepts,
    more_moves,
    next_pull,
    next_random,
    overload_change,
    random_below,
    seed_state,
)
from moeplace.placement.search.hedge import FEWEST_SEQUENCES, risk_matrix
from moeplace.placement.search.nets import layer_nets
from moeplace.placement.search.swaps import Near, anneal_layer, no_ties
from moeplace.placement.solvers.chain.search import (
    COOLING_STEPS,
    Chain,
    Cooling,
    anneal_chain,
    attraction,
    chain_value,
    first_pull,
)
from moeplace.placement.solvers.replicas.bit_search import anneal_bits
from moeplace.placement.solvers.replicas.exact_search import Schedule, anneal_replicas
from moeplace.placement.solvers.replicas.rule import gain_of_replicas, replay, rule_on, unserved
from moeplace.placement.solvers.replicas.seats import count_moves, find_holders, seat
from moeplace.placement.solvers.replicas.token_bits import bit_state, token_bits
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_problem, skewed_trace
from tests.placement.oracles import layer_rows
from tests.seeds import TODAY

ROOT = Path(__file__).resolve().parents[3]
GO_ON = np.zeros(1, np.uint8)
SEEDS = (0, 1, 2, TODAY)
"""The last one changes with the date; a failing test prints it."""
EXPERTS, RANKS = 6, 3
NODES = np.array([0, 0, 1])


def test_every_kernel_is_cached_and_releases_the_lock() -> None:
    """Threads search side by side, and the warm-up compiles for good."""
    found = 0
    for path in sorted(path for floor in ("profiling", "placement") for path in (ROOT / floor).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for call in node.decorator_list if isinstance(node, ast.FunctionDef) else []:
                if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("njit"):
                    options = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
                    assert options["cache"] is True, f"{path}:{node.lineno}"
                    assert options["nogil"] is True, f"{path}:{node.lineno}"
                    found += 1
    assert found > 50


@pytest.mark.filterwarnings("ignore:overflow")
def test_random_numbers_are_those_of_the_generator() -> None:
    """The published first outputs of splitmix64 for 1234567; draws below a limit are even; acceptance is Metropolis."""
    state = np.array([1234567], np.uint64)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(next_random(state)) for _ in published] == published
    state = np.array([1234567], np.uint64)
    assert [random_below(state, 1000) for _ in published] == [(each >> 11) % 1000 for each in published]
    for temperature, delta in ((2.0, 1.0), (0.5, 1.0), (3.0, 6.0)):
        taken = sum(accepts(delta, temperature, state) for _ in range(4000)) / 4000
        assert taken == pytest.approx(np.exp(-delta / temperature), abs=0.04)
    assert all(accepts(delta, temperature, state) for delta in (0.0, -1.0) for temperature in (0.0, 1.0))
    assert not any(accepts(1.0, 0.0, state) or accepts(31.0, 1.0, state) for _ in range(50))


def test_small_accounts_by_hand() -> None:
    """Overload, moves, and the price of a move after too many and after few enough."""
    load_R, limit_R = np.array([10.0, 4.0]), np.array([8.0, 6.0])
    for amount, expected in ((1.0, -1.0), (3.0, 1.0 - 2.0), (5.0, 3.0 - 2.0), (-1.0, 1.0)):
        assert overload_change(load_R, limit_R, 0, 1, amount) == pytest.approx(expected)
    new_ER = np.array([[0, 1], [1, 0], [1, 1]], np.uint8)
    assert [more_moves(a, b, 0, 1, new_ER) for a, b in ((0, 1), (0, 2), (2, 1))] == [2, 1, 1]
    assert more_moves(1, 0, 0, 1, new_ER) == -2
    assert next_pull(3.0, 5, 4.0) > 3.0 > next_pull(3.0, 4, 4.0)
    assert next_pull(0.0, 9, 1.0) == 0.0


def test_the_hedge_is_the_variance_over_sequences() -> None:
    """Ranks as in the packed layer cost `weight` of the tokens if they vary alike; few sequences have no hedge."""
    rng, tokens = np.random.default_rng(3), 400
    ids_TK = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :2]
    packed_S = np.arange(EXPERTS) % RANKS
    for sequences in (FEWEST_SEQUENCES - 1, FEWEST_SEQUENCES, 40):
        trace = RoutingTrace(
            ids_TK[:, None], np.full(1, EXPERTS), sequence_ids=np.sort(np.arange(tokens) % sequences) * 7
        )
        risk_SS = risk_matrix(trace, ids_TK, packed_S, 0.5)
        count = np.array([np.bincount(ids_TK[trace.sequence_ids == s].ravel(), minlength=EXPERTS)
                          for s in np.unique(trace.sequence_ids)], float)  # fmt: skip
        deviation = count - count.sum(axis=1, keepdims=True) * count.sum(axis=0) / count.sum()
        covariance = deviation.T @ deviation
        on_SR = packed_S[:, None] == np.arange(RANKS)
        variance_R = np.einsum("sr,st,tr->r", on_SR, covariance, on_SR)
        if sequences < FEWEST_SEQUENCES:
            assert not risk_SS.any()
            continue
        expected = covariance * np.sqrt(0.5 * tokens / RANKS) / variance_R.mean()
        np.testing.assert_allclose(risk_SS, expected, atol=1e-9)
        assert not risk_matrix(trace, ids_TK, packed_S, 0.0).any()


def tied(rng: np.random.Generator, start_S: np.ndarray, most_moves: float) -> Near:
    """Ties to a start: other ranks are moves, and every rank has a price of its own."""
    new_ER = np.ones((EXPERTS, RANKS), np.uint8)
    new_ER[np.arange(EXPERTS), start_S] = 0
    return Near(rng.random((EXPERTS, RANKS)) * 6 * new_ER, new_ER, most_moves)


def even_rows() -> list[np.ndarray]:
    """All 90 ways to give six experts to three ranks of two slots."""
    return [np.array(row) for row in sorted(set(itertools.permutations([0, 0, 1, 1, 2, 2])))]


def hedge(rng: np.random.Generator) -> np.ndarray:
    """(E, E) a covariance, so that its form over any set is at least zero."""
    root = rng.normal(size=(EXPERTS, EXPERTS))
    return 0.3 * root @ root.T


def layer_value(ids_TK: np.ndarray, rank_E: np.ndarray, risk_EE: np.ndarray, weight: float) -> float:
    """Ranks and nodes of all tokens, token by token, and the hedge, rank by rank."""
    total = 0.0
    for ids in ids_TK.tolist():
        ranks = {int(rank_E[e]) for e in ids if e >= 0}
        total += len(ranks) + weight * len({int(NODES[r]) for r in ranks})
    for rank in range(RANKS):
        own = np.flatnonzero(rank_E == rank)
        total += risk_EE[np.ix_(own, own)].sum() ** 2
    return total


@pytest.mark.parametrize("hot", [0.0, 0.5])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_the_layer_kernel_finds_the_best_within_limits(seed: int, hot: float) -> None:
    """Its account is that of the definitions; from hot starts it finds the best of all that keep limits and moves."""
    rng = np.random.default_rng(seed)
    trace = skewed_trace(seed % 1000, tokens=90, layers=1, experts=EXPERTS, top_k=2, ragged=0.2)
    ids_TK, risk_EE, start_E = trace.layer(0), hedge(rng), np.array([0, 0, 1, 1, 2, 2])
    nets, weight = layer_nets(ids_TK, EXPERTS, risk_EE), 1.5
    near = tied(rng, start_E, float(rng.integers(2, 5)))
    loads = np.bincount(ids_TK[ids_TK >= 0], minlength=EXPERTS)
    limit_R = np.bincount(start_E, loads).max() * np.array([1.0, 1.1, 1.0])

    def value(rank_E: np.ndarray) -> float:
        bias = near.bias_ER[np.arange(EXPERTS), rank_E].sum()
        return layer_value(ids_TK, rank_E, risk_EE, weight) + float(bias)

    def moves(rank_E: np.ndarray) -> int:
        return int((rank_E != start_E).sum())

    kept = [
        value(row)
        for row in even_rows()
        if (np.bincount(row, loads) <= limit_R).all() and moves(row) <= near.most_moves
    ]
    found = []
    for run in range(4):
        rank_E = start_E.copy()
        cost = anneal_layer(
            nets, rank_E, NODES, limit_R, node_weight=weight, sweeps=20, hot=hot, stop=GO_ON,
            state=seed_state(np.random.default_rng(run)), near=near,
        )  # fmt: skip
        first = value(start_E) - layer_value(ids_TK, start_E, 0 * risk_EE, weight)  # the kernel counts change of both
        assert cost + first == pytest.approx(value(rank_E))
        assert value(rank_E) <= value(start_E) + 1e-9
        assert moves(rank_E) <= near.most_moves
        assert (np.bincount(rank_E, loads) <= limit_R).all()
        found.append(value(rank_E))
    assert hot == 0 or min(found) == pytest.approx(min(kept))


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_the_chain_kernel_finds_the_best_within_limits(seed: int, limited: bool) -> None:
    """Tables stay those of the definition, and what is found is near the best of all 8,100 pairs of rows."""
    rng = np.random.default_rng(seed)
    flow_LSS = rng.integers(0, 9, (1, EXPERTS, EXPERTS)).astype(float)
    start_LS = np.tile([0, 0, 1, 1, 2, 2], (2, 1))
    near = [tied(rng, row, 2.0) for row in start_LS]
    distance_RR = rng.random((RANKS, RANKS)) + 1
    np.fill_diagonal(distance_RR, 0)
    loads = rng.integers(5, 20, (2, EXPERTS)).astype(float)
    fullest_L = np.array([np.bincount(row, load).max() for row, load in zip(start_LS, loads, strict=True)])
    chain = Chain(
        flow_LSS, distance_RR, loads, np.tile(fullest_L[:, None], RANKS), np.stack([0.1 * hedge(rng)] * 2),
        np.stack([n.bias_ER for n in near]), np.stack([n.new_ER for n in near]), 2.0 if limited else np.inf,
    )  # fmt: skip

    def value(rank_LS: np.ndarray) -> float:
        total = 0.0
        for i, j in itertools.product(range(EXPERTS), repeat=2):
            total += flow_LSS[0, i, j] * distance_RR[rank_LS[0, i], rank_LS[1, j]]
        for layer, row in enumerate(rank_LS):
            total += near[layer].bias_ER[np.arange(EXPERTS), row].sum()
            for rank in range(RANKS):
                own = np.flatnonzero(row == rank)
                total += chain.risk_LSS[layer][np.ix_(own, own)].sum() ** 2
        return float(total)

    def keeps(layer: int, row: np.ndarray) -> bool:
        moved = (row != start_LS[layer]).sum() <= chain.most_moves
        return bool(moved and (np.bincount(row, loads[layer]) <= fullest_L[layer] + 1e-9).all())

    rows = [[row for row in even_rows() if keeps(layer, row)] for layer in range(2)]
    best = min(value(np.stack(pair)) for pair in itertools.product(*rows))
    found = []
    for run in range(2):
        rank_LS, state = start_LS.copy(), seed_state(np.random.default_rng(run))
        table_LSR = attraction(rank_LS, flow_LSS, distance_RR) + chain.bias_LSR
        pull_L = first_pull(chain, 20.0)
        assert bool(pull_L.any()) == limited
        for first in (0, 60):
            until = COOLING_STEPS + 1 if first else 60
            anneal_chain(rank_LS, chain, table_LSR, Cooling(20.0, 0.5, first, until, 6000, pull_L), GO_ON, state)
        np.testing.assert_allclose(table_LSR, attraction(rank_LS, flow_LSS, distance_RR) + chain.bias_LSR)
        assert all((row != old).sum() <= chain.most_moves for row, old in zip(rank_LS, start_LS, strict=True))
        if all(keeps(layer, row) for layer, row in enumerate(rank_LS)):
            assert chain_value(rank_LS, chain) == pytest.approx(value(rank_LS))
            found.append(value(rank_LS))
    assert best - 1e-9 <= min(found) <= 1.03 * best
    over_LS = np.array([[0, 0, 1, 1, 2, 2], rows[1][0]])
    tight = chain._replace(limit_LR=chain.limit_LR - 1.0)
    load_R = np.bincount(over_LS[0], loads[0])
    excess = sum(np.maximum(np.bincount(row, load) - limit + 1.0, 0).sum()
                 for row, load, limit in zip(over_LS, loads, fullest_L, strict=True))  # fmt: skip
    assert load_R.max() == fullest_L[0]
    assert chain_value(over_LS, tight) == pytest.approx(value(over_LS) + 1e3 * excess)


def replica_case(seed: int) -> dict[str, Any]:
    """Four experts on three ranks of two slots: all rows can be tried."""
    rng = np.random.default_rng(seed)
    problem = skewed_problem(seed % 1000, ranks=3, slots=2, trace={"experts": 4, "layers": 1, "top_k": 2, "tokens": 96})
    assert problem.trace is not None
    ids_TK = np.ascontiguousarray(problem.trace.layer(0), np.int16)
    start_S = np.array([0, 1, 2, 3, 0, 2], np.int32)
    new_ER = np.ones((6, 3), np.uint8)
    for slot, expert in enumerate(start_S.tolist()):
        new_ER[expert, slot // 2] = 0
    near = Near(3.0 * rng.random((6, 3)) * new_ER, new_ER, float(rng.integers(1, 4)))
    return {
        "problem": problem, "ids": ids_TK, "start": start_S, "near": near, "rows": layer_rows(problem, 0, fill=True)
    }  # fmt: skip


def moved(row_S: np.ndarray, near: Near) -> int:
    """Experts on ranks that did not hold them, pair by pair."""
    assert count_moves(row_S, np.repeat(np.arange(3), 2), near.new_ER[:0]) == 0
    return sum(int(near.new_ER[e, slot // 2]) for slot, e in enumerate(row_S.tolist()) if e >= 0)


def replica_value(case: dict[str, Any], row_S: np.ndarray) -> float:
    """Ranks of all tokens by `evaluate`, and the biases."""
    ranks = case["problem"].evaluate(case["problem"].placement(row_S[None])).ranks_per_token
    bias = sum(case["near"].bias_ER[e, slot // 2] for slot, e in enumerate(row_S.tolist()) if e >= 0)
    return 96 * ranks + float(bias)


@pytest.mark.parametrize("kernel", ["bits", "exact"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_replica_kernels_find_the_best_within_moves(seed: int, kernel: str) -> None:
    """Ties, their cap, and the load limit; with two experts a token both kernels count exactly."""
    case = replica_case(seed)
    problem, ids_TK, start_S, near = (case[name] for name in ("problem", "ids", "start", "near"))
    load_R = problem.evaluate(problem.placement(start_S[None])).load_LR[0]
    limit_R = np.full(3, load_R.max() + 1e-9)

    def keeps(row_S: np.ndarray) -> bool:
        loads = problem.evaluate(problem.placement(row_S[None])).load_LR[0]
        return moved(row_S, near) <= near.most_moves and bool((loads <= limit_R).all())

    best = min(replica_value(case, row) for row in case["rows"] if keeps(row))
    found = []
    for run in range(4):
        row_S, state = start_S.copy(), seed_state(np.random.default_rng(run))
        seats = seat(row_S, problem.cluster.first_slots, 6, 4)
        if kernel == "bits":
            bits = token_bits(ids_TK, 6, 3)
            cost, _ = anneal_bits(
                bits, seats, bit_state(bits, seats, problem.cluster.node_of_rank, 0.0), limit_R, np.zeros((6, 6)),
                Schedule(12.0, 0.4, 500.0), near, GO_ON, state,
            )  # fmt: skip
        else:
            rule = rule_on(ids_TK, problem.cluster.node_of_rank, 0.0)
            cost, _ = anneal_replicas(
                layer_nets(ids_TK, 6), rule, seats, unserved(rule), limit_R, Schedule(12.0, 0.4, 20_000.0), near,
                GO_ON, state,
            )  # fmt: skip
        assert keeps(row_S)
        assert cost == pytest.approx(replica_value(case, row_S))
        found.append(replica_value(case, row_S))
    assert min(found) == pytest.approx(best)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_the_exact_kernel_keeps_every_expert_on_its_ranks_and_nodes(seed: int) -> None:
    """Two replicas each, on both nodes, whatever the heat; the hedge shares an expert out over its replicas."""
    trace = skewed_trace(seed % 1000, tokens=60, layers=1, experts=4, top_k=2)
    cluster = Cluster.uniform(4, slots_per_rank=3, ranks_per_node=2)
    row_S = np.array([0, 1, -1, 2, 3, 0, 0, 1, -1, 2, 3, 1], np.int32)
    nets = layer_nets(trace.layer(0), 12, np.ones((12, 12)) * 0.2)
    rule = rule_on(np.ascontiguousarray(trace.layer(0), np.int16), cluster.node_of_rank, 1.0)
    cost, _ = anneal_replicas(
        nets, rule, seat(row_S, cluster.first_slots, 12, 4), unserved(rule), np.full(4, 1e9),
        Schedule(20.0, 5.0, 6000.0, 2, 2), no_ties(4), GO_ON, seed_state(np.random.default_rng(seed)),
    )  # fmt: skip
    ranks = {e: set(np.flatnonzero(row_S == e) // 3) for e in range(4)}
    assert all(len(held) >= 2 and len({rank // 2 for rank in held}) == 2 for held in ranks.values())
    replicas = Counter(row_S[row_S >= 0].tolist())
    risk = sum(
        sum(0.2 / (replicas[a] * replicas[b]) for a in on for b in on) ** 2
        for on in ([e for e in row_S[3 * r : 3 * r + 3].tolist() if e >= 0] for r in range(4))
    )
    problem = skewed_problem(0, ranks=4, slots=3, ranks_per_node=2, trace={"experts": 4, "layers": 1})
    problem = type(problem).from_trace(trace, cluster, objective="traffic")
    evaluation = problem.evaluate(problem.placement(row_S[None]))
    assert cost == pytest.approx(60 * (evaluation.ranks_per_token + evaluation.nodes_per_token) + risk)


@pytest.mark.parametrize("seed", SEEDS)
def test_gains_of_replicas_are_what_a_replay_saves(seed: int) -> None:
    """Every expert on every rank that lacks it, one replica at a time, on one node."""
    trace = skewed_trace(seed % 1000, tokens=50, layers=1, experts=EXPERTS, top_k=3, ragged=0.2)
    rule = rule_on(np.ascontiguousarray(trace.layer(0), np.int16), 0 * NODES, 0.0)
    row_S, rank_S = np.array([0, 1, 2, 3, 4, 5]), np.repeat(np.arange(RANKS), 2)
    holders, gain_ER = find_holders(row_S, rank_S, EXPERTS, RANKS), np.zeros((EXPERTS, RANKS))
    before = replay(rule, holders, unserved(rule))
    gain_of_replicas(rule, holders, gain_ER)
    for expert, rank in zip(*np.nonzero(~holders.held_ER), strict=True):
        more = find_holders(np.append(row_S, expert), np.append(rank_S, rank), EXPERTS, RANKS)
        assert before - replay(rule, more, unserved(rule)) == pytest.approx(gain_ER[expert, rank])


def test_holders_follow_slots() -> None:
    """Ranks of each expert, in any order, and how many."""
    holders = find_holders(np.array([0, 1, -1, 0, 2, -1]), np.repeat(np.arange(3), 2), 4, 3)
    assert holders.count_E.tolist() == [2, 1, 1, 0]
    assert [set(holders.rank_EH[e, : holders.count_E[e]].tolist()) for e in range(4)] == [{0, 1}, {0}, {2}, set()]
    assert holders.held_ER.tolist() == [[True, True, False], [True, False, False], [False, False, True], [False] * 3]
