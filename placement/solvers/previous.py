"""Solving again from a placement in force: names that keep weights in place, a cap and a price on what moves.

Shape letters: L MoE layers, E experts, R ranks, S slots per layer.
"""

from dataclasses import replace

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.migration.relabel import least_bytes, moved_bytes, moved_bytes_by_layer, moves, relabel_to
from moeplace.placement.objective import measure
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.search.balancing import rebalance_layer
from moeplace.placement.search.layout import load_limits, packed_start, to_slots
from moeplace.placement.search.nets import layer_nets
from moeplace.placement.search.swaps import descend_within
from moeplace.profiling.errors import InfeasibleError


def keep_close(problem: Problem, draft: Draft, budget: Budget) -> Draft:
    """The draft with ranks renamed towards the previous placement, within the cap on moves, where moving pays.

    Raises:
        InfeasibleError: the change of cluster alone needs more moves than allowed.
    """
    previous = problem.previous
    assert previous is not None
    slots_LS = relabel_to(
        previous,
        draft.slot_to_expert,
        problem.cluster,
        per_layer=problem.mode != "coherent",
        expert_bytes=problem.expert_bytes,
    )
    same_shape = np.array_equal(previous.slots_of_rank, problem.cluster.slots_of_rank)
    if same_shape and problem.move_price > 0:
        slots_LS = _drop_unpaid(problem, previous, slots_LS)
    if problem.max_moves is not None:
        slots_LS = _cap_moves(problem, previous, slots_LS, same_shape)
    return replace(draft, slot_to_expert=slots_LS)


def moved_summary(problem: Problem, placement: Placement) -> dict[str, float] | None:
    """What a change from the previous placement moves, and the least that this change of cluster must move."""
    if problem.previous is None:
        return None
    fetched_L = moves(problem.previous, placement)
    return {
        "moves_per_layer_mean": float(fetched_L.mean()),
        "moves_per_layer_most": float(fetched_L.max()),
        "bytes": float(moved_bytes(problem.previous, placement, expert_bytes=problem.expert_bytes)),
        "least_bytes": float(least_bytes(problem.previous, problem.cluster, expert_bytes=problem.expert_bytes)),
    }


def _drop_unpaid(problem: Problem, previous: Placement, slots_LS: np.ndarray) -> np.ndarray:
    """Keep what does not pay for its bytes: layer by layer where layers are independent, else the whole placement."""
    new, old = problem.placement(slots_LS), previous.replace(mode=problem.mode)
    price_L = problem.move_price * moved_bytes_by_layer(previous, new, expert_bytes=problem.expert_bytes)
    by_layer = problem.trace is not None and problem.mode == "dispatch-combine" and problem.objective == "traffic"
    if by_layer and problem.node_weight == 0:
        old_L, new_L = (problem.evaluate(p).ranks_per_token_L for p in (old, new))
        keep_L = (old_L - new_L) / problem.num_layers < price_L
    else:  # the objective does not fall apart into layers: all or nothing
        gain = measure(problem, old)[1] - measure(problem, new)[1]
        keep_L = np.full(problem.num_layers, gain < price_L.sum())
    return np.where(keep_L[:, None], previous.slot_to_expert, slots_LS)


def _cap_moves(problem: Problem, previous: Placement, slots_LS: np.ndarray, same_shape: bool) -> np.ndarray:
    assert problem.max_moves is not None
    fetched_L = moves(previous, problem.placement(slots_LS))
    if (fetched_L > problem.max_moves).any() and not same_shape:
        layer = int(fetched_L.argmax())
        raise InfeasibleError(
            f"MoE layer {layer} needs {fetched_L[layer]} moves for this change of cluster, "
            f"but max moves is {problem.max_moves}"
        )
    capped = slots_LS.copy()
    for number in np.flatnonzero(fetched_L > problem.max_moves).tolist():
        capped[number] = _improve_within(problem, previous, number)
    return capped


def _improve_within(problem: Problem, previous: Placement, layer: int) -> np.ndarray:
    """(S,) the previous layer improved by at most `max_moves` fetched experts."""
    assert problem.max_moves is not None
    row = previous.slot_to_expert[layer].copy()
    cluster = problem.cluster
    plain = problem.trace is not None and problem.mode == "dispatch-combine" and len(set(row.tolist())) == len(row)
    if plain:
        assert problem.trace is not None
        nets = layer_nets(problem.trace.layer(layer), cluster.num_slots)
        rank_S = np.empty(len(row), np.int64)
        rank_S[row] = cluster.rank_of_slot
        limit_R = load_limits(problem, layer, packed_start(problem, layer), problem.max_imbalance)
        descend_within(
            nets,
            rank_S,
            cluster.node_of_rank,
            limit_R,
            node_weight=problem.node_weight,
            max_swaps=problem.max_moves // 2,
        )
        return relabelled_row(row, to_slots(rank_S, len(row)), cluster.rank_of_slot)
    experts = int(problem.experts_per_layer[layer])
    load_E = np.ascontiguousarray(problem.load_LE[layer, :experts])
    rebalance_layer(
        row, load_E, cluster.slots_of_rank, cluster.speed_of_rank,
        max_moves=problem.max_moves, target=problem.max_imbalance or 1.0, min_replicas=problem.survive + 1,
    )  # fmt: skip
    return row


def relabelled_row(old_S: np.ndarray, new_S: np.ndarray, rank_of_slot: np.ndarray) -> np.ndarray:
    """`new_S` with the experts of each rank put back into the slots they had in `old_S`."""
    row = new_S.copy()
    for rank in np.unique(rank_of_slot):
        slots = np.flatnonzero(rank_of_slot == rank)
        held = set(new_S[slots].tolist())
        stay = [s for s in slots if old_S[s] in held]
        arrivals = iter(sorted(held - {int(old_S[s]) for s in stay}))
        row[slots] = [old_S[s] if s in stay else next(arrivals) for s in slots]
    return row
