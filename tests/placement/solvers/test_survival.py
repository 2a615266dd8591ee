"""Replicas for tokens that travel with one expert: what serves whom, how they change places, what is worth a slot."""

import itertools

import numpy as np
import pytest

from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.search.ties import Ties
from moeplace.placement.solvers.replicas.on_the_way import add_replicas_on_the_way, search_surviving_chain
from moeplace.placement.solvers.replicas.survival import (
    _add_loads,
    _swap_replicas,
    add_surviving_replicas,
    balance_replicas,
    first_cluster,
    to_rows,
)
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_trace
from tests.placement.random_placements import random_placement
from tests.seeds import FIXED_AND_TODAY

GO_ON = np.zeros(1, np.uint8)
NODE_R = np.array([0, 0, 1, 1])
EXPERTS = 6


def chain(
    seed: int, slots: int | list[int], *, per_node: int | None = None, layers: int = 3, **options: object
) -> Problem:
    """Tokens with one expert a layer, on four ranks."""
    trace = skewed_trace(seed % 10**6, tokens=400, layers=layers, experts=EXPERTS, top_k=1)
    cluster = Cluster.uniform(4, slots_per_rank=slots, ranks_per_node=per_node)
    return Problem.from_trace(trace, cluster, mode="coherent", objective="traffic", **options)  # type: ignore[arg-type]


def random_holders(rng: np.random.Generator, slots: int) -> np.ndarray:
    """(E, R) bool, two ranks or more each, as many experts on every rank."""
    while True:
        held_ER = np.zeros((EXPERTS, 4), bool)
        for rank in range(4):
            held_ER[rng.permutation(EXPERTS)[:slots], rank] = True
        if (held_ER.sum(axis=1) >= 2).all():
            return held_ER


def loads_by_rule(held_ER: np.ndarray, arrive_QE: np.ndarray) -> np.ndarray:
    """(R,) tokens: where they are if the expert is there, else even over its ranks in the node, else over all."""
    load_R = np.zeros(4)
    for q, e in itertools.product(range(5), range(EXPERTS)):
        ranks = set(np.flatnonzero(held_ER[e]).tolist())
        near = {r for r in ranks if q < 4 and NODE_R[r] == NODE_R[q]}
        for r in ({q} & ranks) or near or ranks:
            load_R[r] += arrive_QE[q, e] / len(({q} & ranks) or near or ranks)
    return load_R


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_replicas_change_places_until_limits_hold(seed: int) -> None:
    """Loads are those of the rule; swaps end overload and leave experts their replicas and nodes, ranks their room."""
    print("seed", seed)
    rng, ended = np.random.default_rng(seed), 0
    for _ in range(30):
        held_ER, nodes = random_holders(rng, 4), int(rng.integers(1, 3))
        before, load_R = held_ER.copy(), np.zeros(4)
        arrive_QE, worth_ER = rng.integers(0, 30, (5, EXPERTS)).astype(float), rng.random((EXPERTS, 4)) * 20
        for e in range(EXPERTS):
            _add_loads(e, 1.0, held_ER, arrive_QE, NODE_R, load_R)
        np.testing.assert_allclose(load_R, loads_by_rule(held_ER, arrive_QE))
        limit_R = np.full(4, 1.08 * arrive_QE.sum() / 4)
        over = np.maximum(load_R - limit_R, 0).sum()
        _swap_replicas(held_ER, arrive_QE, worth_ER, NODE_R, limit_R, nodes, GO_ON)
        assert held_ER.sum(axis=0).tolist() == before.sum(axis=0).tolist()
        assert held_ER.sum(axis=1).tolist() == before.sum(axis=1).tolist()
        left = np.maximum(loads_by_rule(held_ER, arrive_QE) - limit_R, 0).sum()
        assert left < over or np.array_equal(held_ER, before)
        if over == 0:
            assert np.array_equal(held_ER, before)
        for e in np.flatnonzero((held_ER != before).any(axis=1)):
            assert len(set(NODE_R[held_ER[e]].tolist())) >= nodes
        ended += over > 0 and left == 0
    assert ended >= 4


def swap_score(
    trial_ER: np.ndarray, held_ER: np.ndarray, arrive_QE: np.ndarray, worth_ER: np.ndarray, limit_R: np.ndarray
) -> float:
    """Overload ended per token that no longer stays."""
    over, left = (np.maximum(loads_by_rule(held, arrive_QE) - limit_R, 0).sum() for held in (held_ER, trial_ER))
    lost = worth_ER[held_ER & ~trial_ER].sum() - worth_ER[trial_ER & ~held_ER].sum()
    return float((over - left) / (1 + max(lost, 0))) if over - left > 1e-9 * over else 0.0


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_the_first_swap_ends_most_overload_per_token_that_no_longer_stays(seed: int) -> None:
    """Of all swaps from a rank above its limit to one that is not, by their loads and what replicas are worth there."""
    print("seed", seed)
    rng, seen = np.random.default_rng(seed), 0
    for _ in range(20):
        held_ER = random_holders(rng, 4)
        arrive_QE, worth_ER = rng.integers(0, 30, (5, EXPERTS)).astype(float), rng.random((EXPERTS, 4)) * 20
        load_R = loads_by_rule(held_ER, arrive_QE)
        limit_R = np.full(4, load_R.max() - 0.97)  # above it by a token: one swap ends it, and no load equals it
        case = (held_ER.copy(), arrive_QE, worth_ER, limit_R)
        trials = [held_ER.copy()]
        for a, b, g, h in itertools.product(range(EXPERTS), range(EXPERTS), range(4), range(4)):
            if not (held_ER[a, g] and held_ER[b, h]) or held_ER[a, h] or held_ER[b, g]:
                continue
            if load_R[g] > limit_R[g] and load_R[h] <= limit_R[h]:
                trials.append(held_ER.copy())
                trials[-1][[a, b], [g, h]], trials[-1][[a, b], [h, g]] = False, True
        scores = [swap_score(trial, *case) for trial in trials]
        best = trials[int(np.argmax(scores))]
        if (loads_by_rule(best, arrive_QE) <= limit_R).all():  # nothing follows
            _swap_replicas(held_ER, arrive_QE, worth_ER, NODE_R, limit_R, 1, GO_ON)
            assert swap_score(held_ER, *case) == pytest.approx(max(scores))
            seen += max(scores) > 0
    assert seen >= 5


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize(("slots", "per_node", "survive"), [(4, None, 1), (3, 2, 1), (5, 1, 2)])
def test_every_expert_gets_its_replicas_on_other_ranks_and_nodes(
    seed: int, slots: int, per_node: int | None, survive: int
) -> None:
    """As many as asked for, within the ranks' room, the first where it was, on new nodes while there are some."""
    print("seed", seed)
    problem = chain(seed, slots, per_node=per_node, survive=survive)
    rng, narrow = np.random.default_rng(seed), first_cluster(problem)
    assert narrow.slots_of_rank.tolist() == [-(-slots * EXPERTS // (4 * slots))] * 4
    first = random_placement(
        rng, layers=3, experts=EXPERTS, slots_of_rank=[2] * 4, node_of_rank=narrow.node_of_rank.tolist(), fill=0.0
    )
    first_LER = first.copies_LER > 0
    held_LER = add_surviving_replicas(problem, first_LER)
    assert (held_LER.sum(axis=2) == survive + 1).all()
    assert (held_LER.sum(axis=1) <= slots).all()
    on_node = [held_LER[:, :, problem.cluster.node_of_rank == n].any(axis=2) for n in range(problem.cluster.num_nodes)]
    assert (np.sum(on_node, axis=0) >= min(survive + 1, problem.cluster.num_nodes)).all()
    if (held_LER & first_LER).sum() == first_LER.sum():
        rows_LS = to_rows(problem, held_LER)
        assert np.array_equal(problem.placement(rows_LS).copies_LER > 0, held_LER)


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_a_replica_stands_where_tokens_come_from_and_go_to(seed: int) -> None:
    """The last layer of two, whose neighbour has one replica each: no other way to assign keeps more tokens there."""
    print("seed", seed)
    problem = chain(seed, 3, layers=2, survive=1)
    rng = np.random.default_rng(seed)
    first = random_placement(rng, layers=2, experts=EXPERTS, slots_of_rank=[2, 2, 1, 1], fill=0.0)
    held_LER = add_surviving_replicas(problem, first.copies_LER > 0)
    worth_ER = problem.transitions_LEE[0].T @ (held_LER[0] / 2)
    chosen_ER = held_LER[1] & ~(first.copies_LER[1] > 0)
    free_R, lone = 3 - first.copies_LER[1].sum(axis=0), [int(np.flatnonzero(row)[0]) for row in first.copies_LER[1]]
    best = max(
        sum(worth_ER[e, r] for e, r in enumerate(ranks))
        for ranks in itertools.product(range(4), repeat=EXPERTS)
        if all(r != own for r, own in zip(ranks, lone, strict=True))
        and (np.bincount(ranks, minlength=4) <= free_R).all()
    )
    assert worth_ER[chosen_ER].sum() == pytest.approx(best)


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_loads_keep_a_cap_that_swaps_can_keep(seed: int) -> None:
    """By `evaluate`, layer by layer: no layer ends above both its cap and where it was."""
    print("seed", seed)
    problem = chain(seed, 4, per_node=2, survive=1)
    rng = np.random.default_rng(seed)
    held_LER = np.stack([random_holders(rng, 4) for _ in range(3)])
    before_L = problem.evaluate(problem.placement(to_rows(problem, held_LER))).imbalance_L
    balance_replicas(problem, held_LER, np.full(3, 1.2), GO_ON)
    after_L = problem.evaluate(problem.placement(to_rows(problem, held_LER))).imbalance_L
    assert after_L.max() <= max(1.25, before_L.max())
    assert after_L.mean() <= max(1.2, 0.9 * before_L.mean())


def tied(problem: Problem, start_LS: np.ndarray, most_moves: float, price: float) -> Ties:
    new_LER = problem.placement(start_LS).copies_LER == 0
    return Ties(start_LS, new_LER, np.full(problem.load_LE.shape, price), most_moves)


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize(
    ("cap", "moves", "price"), [(None, None, 0.0), (1.3, None, 0.0), (None, 2, 0.0), (None, 9, 0.02)]
)
def test_empty_slots_on_the_way_are_filled_where_it_pays(
    seed: int, cap: float | None, moves: int | None, price: float
) -> None:
    """Filled slots stay, tokens move less, by more than moves cost; caps and limits on moves are kept."""
    print("seed", seed)
    problem = chain(seed, 3)
    start = random_placement(np.random.default_rng(seed), layers=3, experts=EXPERTS, slots_of_rank=[3] * 4, fill=0.0)
    start_LS = start.slot_to_expert.astype(np.int32)
    ties = None if moves is None else tied(problem, start_LS, moves, price)
    found_LS = add_replicas_on_the_way(problem, Budget(100.0), start_LS, cap, ties)
    before, after = (problem.evaluate(problem.placement(rows)) for rows in (start_LS, found_LS))
    assert (found_LS == start_LS)[start_LS >= 0].all()
    added_L = (found_LS != start_LS).sum(axis=1)
    assert added_L[0] == 0
    assert after.copies_per_token + price * added_L.sum() <= before.copies_per_token
    assert moves is None or added_L.max() <= moves
    assert cap is None or (after.imbalance_L <= np.maximum(cap, before.imbalance_L) + 1e-6).all()
    if cap is None and price == 0.0:
        assert added_L.sum() > 0
    if moves is None:
        assert_busiest_ways(problem, start_LS, found_LS)
        loose_LS = add_replicas_on_the_way(problem, Budget(100.0), start_LS, 100.0)
        assert cap is not None or np.array_equal(loose_LS, found_LS)


def assert_busiest_ways(problem: Problem, start_LS: np.ndarray, found_LS: np.ndarray) -> None:
    """What ranks got in a layer are the experts that most tokens of their experts of the layer before go to."""
    assert problem.trace is not None
    ids_TL = problem.trace.topk_ids[:, :, 0]
    for layer in range(1, problem.num_layers):
        if np.array_equal(start_LS[layer], found_LS[layer]):
            continue
        for rank in range(4):
            before, own, new = (rows[3 * rank : 3 * rank + 3] for rows in (
                found_LS[layer - 1], start_LS[layer], found_LS[layer]))  # fmt: skip
            arrive_E = np.bincount(ids_TL[np.isin(ids_TL[:, layer - 1], before), layer], minlength=EXPERTS)
            added = sorted(set(new.tolist()) - set(own.tolist()))
            left = np.setdiff1d(np.arange(EXPERTS), new)
            assert all(arrive_E[added] > 0)
            if len(added) and len(left):
                assert arrive_E[added].min() >= arrive_E[left].max()


@pytest.mark.filterwarnings("ignore:overflow")
def test_chains_that_survive_travel_less_than_packed_ones() -> None:
    """Under a cap that packing keeps: every expert twice, the cap kept, never more copies, over all clearly fewer."""
    totals = np.zeros(2)
    for seed in range(3):
        trace = skewed_trace(seed, tokens=600, layers=3, experts=12, top_k=1)
        cluster = Cluster.uniform(4, slots_per_rank=6)
        problem = Problem.from_trace(trace, cluster, mode="coherent", objective="traffic", survive=1)
        packed = problem.evaluate(problem.placement(np.stack([pack_slots(problem, layer) for layer in range(3)])))
        assert packed.imbalance_L.max() <= 1.3
        slots_LS, _ = search_surviving_chain(problem, Budget(20.0), 1.3, 0.5)
        found = problem.evaluate(problem.placement(slots_LS))
        assert (problem.placement(slots_LS).replica_counts >= 2).all()
        assert (found.imbalance_L <= 1.3 + 1e-6).all()
        assert found.copies_per_token <= packed.copies_per_token
        totals += found.copies_per_token, packed.copies_per_token
    assert totals[0] < 0.95 * totals[1]


def test_the_busiest_way_is_served_first() -> None:
    """By hand: rank 0 has expert 0, whose tokens go to 2 (three of six), 3 (two) and 1 (one); one slot is empty there.

    A replica of 2 spares three moves of six tokens; with a second empty slot 3 spares two more; 1 is there already.
    """
    pairs = [(0, 2)] * 3 + [(0, 3)] * 2 + [(0, 1)] + [(1, 1), (2, 2), (3, 3)]
    trace = RoutingTrace(np.array(pairs)[:, :, None], np.full(2, 4))
    for slots, added in ((3, {2}), (4, {2, 3})):
        cluster = Cluster.uniform(2, slots_per_rank=slots)
        problem = Problem.from_trace(trace, cluster, mode="coherent", objective="traffic")
        row = [0, 1] + [-1] * (slots - 2) + [2, 3] + [-1] * (slots - 2)
        found_LS = add_replicas_on_the_way(problem, Budget(100.0), np.array([row, row], np.int32), None)
        assert set(found_LS[1, :slots].tolist()) == {0, 1} | added
        after = problem.evaluate(problem.placement(found_LS))
        assert after.copies_per_token == pytest.approx((5 - 3 - 2 * (slots == 4)) / 9)
