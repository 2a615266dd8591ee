"""The evaluation against a reference in plain Python, and its closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.cost.replica_choice import NUM_ORDERS, preference_orders
from moeplace.placement.cost.steps import step_of_token
from moeplace.placement.modes import MODES, Mode
from moeplace.placement.objective import measure
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_trace
from tests.placement.random_placements import random_placement


def serving_ranks(ids, copies_ER, node_R, near, rotation):
    """The rule of `replica_choice`, word for word: {expert: rank}."""
    ranks = len(node_R)
    holders = {int(e): [r for r in range(ranks) if copies_ER[e, r]] for e in ids if e >= 0}
    order = preference_orders(ranks)[rotation % NUM_ORDERS].tolist()
    chosen = {e: held[0] for e, held in holders.items() if len(held) == 1}
    forced = set(chosen.values())
    for e, held in holders.items():
        if e not in chosen and forced & set(held):
            chosen[e] = near if near in forced & set(held) else next(r for r in order if r in forced & set(held))
    used = set(forced)
    while len(chosen) < len(holders):
        nodes = {int(node_R[r]) for r in used} | ({int(node_R[near])} if near >= 0 else set())

        def score(rank, nodes=nodes):
            held = sum(rank in held for e, held in holders.items() if e not in chosen)
            return (held, rank == near, int(node_R[rank]) in nodes)

        best = max(order, key=score)  # the first of the best
        used.add(best)
        chosen.update({e: best for e, held in holders.items() if e not in chosen and best in held})
    return chosen


def reference(trace: RoutingTrace, placement: Placement, mode: str) -> dict[str, float]:
    """The figures of section "what a placement costs", token by token."""
    tokens, layers, ranks = trace.num_tokens, trace.num_layers, placement.num_ranks
    node_R = placement.node_of_rank
    sums = dict.fromkeys(("d", "dn", "single", "copies", "stay", "node_stay", "pairs"), 0)
    load_LR = np.zeros((layers, ranks))
    for t in range(tokens):
        owner, before = -1, None
        for layer in range(layers):
            ids = trace.layer(layer)[t]
            near = owner if mode == "coherent" else -1
            chosen = serving_ranks(ids, placement.copies_LER[layer], node_R, near, t)
            used = sorted(set(chosen.values()))
            for rank in chosen.values():
                load_LR[layer, rank] += 1
            sums["d"] += len(used)
            sums["dn"] += len({int(node_R[r]) for r in used})
            sums["single"] += len(used) == 1
            primary = chosen.get(int(ids[0])) if ids[0] >= 0 else None
            if layer and primary is not None and before is not None:
                sums["pairs"] += 1
                sums["stay"] += primary == before
                sums["node_stay"] += node_R[primary] == node_R[before]
            before = primary
            if used:
                if layer:
                    sums["copies"] += (len(used) - 1) + (len(used) - (owner in used) if owner >= 0 else 0)
                held = {r: list(chosen.values()).count(r) for r in used}
                owner = max(used, key=lambda r: (held[r], r == owner, -r))
    imbalance_L = [row.max() / row.mean() if row.sum() else 1.0 for row in load_LR]
    cells, boundaries = tokens * layers, max(tokens * (layers - 1), 1)
    copies = {
        "coherent": sums["copies"] / boundaries,
        "dispatch-combine": 2 * sums["d"] / cells * (1 - 1 / ranks),
        "allgather": 2 * (ranks - 1),
    }
    return {
        "ranks_per_token": sums["d"] / cells,
        "nodes_per_token": sums["dn"] / cells,
        "single_rank_share": sums["single"] / cells,
        "copies_per_token": copies[mode],
        "stay_rate": sums["stay"] / max(sums["pairs"], 1),
        "node_stay_rate": sums["node_stay"] / max(sums["pairs"], 1),
        "imbalance_mean": float(np.mean(imbalance_L)),
        "imbalance_worst": float(np.max(imbalance_L)),
    }


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(1, 4),
    nodes=st.sampled_from([[0, 0, 0], [0, 0, 1], [0, 1, 1, 2]]),
    ragged=st.sampled_from([0.0, 0.3]),
    fill=st.sampled_from([0.0, 0.7, 1.0]),
    mode=st.sampled_from(MODES),
)
def test_agrees_with_the_reference(seed, top_k, nodes, ragged, fill, mode):
    """Every figure equals the token-by-token reference: replicas, ragged top-k, several nodes, all modes."""
    trace = skewed_trace(seed, tokens=15, layers=3, experts=6, top_k=top_k, ragged=ragged)
    rng = np.random.default_rng(seed)
    placement = random_placement(
        rng, layers=3, experts=6, slots_of_rank=[3] * len(nodes), node_of_rank=nodes, fill=fill
    )
    figures = evaluate(trace, placement, mode=mode).summary()
    for name, value in reference(trace, placement, mode).items():
        assert figures[name] == pytest.approx(value, abs=1e-12), name


def test_top1_coherent_copies_are_one_minus_stay_rate():
    """With one expert a token, a copy crosses exactly where the token does not stay."""
    trace = skewed_trace(3, tokens=200, layers=5, experts=8, top_k=1)
    placement = index_order(np.full(5, 8), np.full(4, 2), np.zeros(4, int), mode="coherent")
    result = evaluate(trace, placement)
    assert result.copies_per_token == pytest.approx(1 - result.stay_rate)
    assert result.collectives_per_layer == 1.0


def test_uniform_routing_meets_the_closed_form():
    """Random k-sets in index order: d = R (1 - C(E - C, K) / C(E, K)), stay = 1/R."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((4000, 3, 16)), axis=2)[:, :, :4]
    trace = RoutingTrace(ids, np.full(3, 16))
    result = evaluate(trace, index_order(np.full(3, 16), np.full(4, 4), np.zeros(4, int)))
    expected = 4 * (1 - (12 * 11 * 10 * 9) / (16 * 15 * 14 * 13))
    assert result.ranks_per_token == pytest.approx(expected, abs=0.02)
    assert result.stay_rate == pytest.approx(0.25, abs=0.02)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), mode=st.sampled_from(MODES))
def test_order_of_experts_and_tokens_does_not_matter(seed, mode):
    """Renaming experts in trace and placement, or doubling the trace, changes no mean."""
    trace = skewed_trace(seed, tokens=20, layers=2, experts=6, top_k=2)
    rng = np.random.default_rng(seed)
    placement = random_placement(rng, layers=2, experts=6, slots_of_rank=[3, 3], fill=0.0)
    names = rng.permutation(6)
    renamed = trace.replace(topk_ids=names[trace.topk_ids])
    moved = placement.replace(
        slot_to_expert=np.where(placement.slot_to_expert < 0, -1, names[placement.slot_to_expert])
    )
    doubled = trace.replace(topk_ids=np.concatenate([trace.topk_ids] * 2))
    first = evaluate(trace, placement, mode=mode).summary()
    for other in (evaluate(renamed, moved, mode=mode), evaluate(doubled, placement, mode=mode)):
        for name in ("ranks_per_token", "copies_per_token", "stay_rate", "imbalance_mean"):
            assert other.summary()[name] == pytest.approx(first[name])


def test_steps_are_lanes_of_consecutive_tokens():
    """11 tokens in 3 lanes: lane i reads tokens 3i, 3i+1, 3i+2; two tokens fill no step."""
    assert step_of_token(11, 3).tolist() == [0, 1, 2] * 3 + [-1, -1]
    assert step_of_token(2, 256).tolist() == [0, 0]


def test_slower_links_cost_more_and_one_rank_costs_no_exchange():
    """Prediction grows with latency and falls with bandwidth; one rank has no collectives."""
    trace = skewed_trace(1, tokens=100, layers=2, experts=4, top_k=2)
    placement = index_order(np.full(2, 4), np.full(2, 2), np.zeros(2, int))
    fast = Cluster.uniform(2, slots_per_rank=2, intra=Link(1e-6, 1e12))
    slow = fast.replace(intra=Link(1e-3, 1e6))
    assert (
        evaluate(trace, placement, cluster=slow).predicted_seconds
        > evaluate(trace, placement, cluster=fast).predicted_seconds
    )
    alone = evaluate(trace, index_order(np.full(2, 4), np.array([4]), np.zeros(1, int)))
    assert (alone.collectives_per_layer, alone.copies_per_token, alone.ranks_per_token) == (0.0, 0.0, 1.0)


def test_refuses_another_model():
    """A placement for other layers or experts is refused by name."""
    trace = skewed_trace(1, experts=4)
    with pytest.raises(InputError, match="another model: experts_per_layer"):
        evaluate(trace, index_order(np.full(2, 6), np.full(2, 3), np.zeros(2, int)))


@pytest.mark.parametrize("mode", MODES)
def test_null_experts_cost_nothing_anywhere(mode: Mode) -> None:
    """A token's null expert is as good as none: evaluation, problem and solver see the same."""
    rng = np.random.default_rng(5)
    ids_TLK = np.argsort(rng.random((200, 3, 6)), axis=2)[:, :, :2]  # ids 4 and 5 are null
    with_null = RoutingTrace(ids_TLK, np.full(3, 4), null_experts=2)
    without = RoutingTrace(np.where(ids_TLK < 4, ids_TLK, -1), np.full(3, 4))
    cluster = Cluster.uniform(2, slots_per_rank=2)
    placement = index_order(with_null.experts_per_layer, cluster.slots_of_rank, cluster.node_of_rank)
    first, second = (evaluate(trace, placement, mode=mode) for trace in (with_null, without))
    assert first.summary() == second.summary()
    problems = [Problem.from_trace(trace, cluster, mode=mode) for trace in (with_null, without)]
    assert np.array_equal(problems[0].load_LE, problems[1].load_LE)
    assert np.array_equal(problems[0].transitions_LEE, problems[1].transitions_LEE)
    found = solve(problems[0], time_limit=0.5).placement
    assert measure(problems[0], found)[1:] == measure(problems[1], found)[1:]
