"""Further replicas for `coherent` mode with one expert per token: every expert on several ranks, where its tokens pass.

The chain search places one slot per expert; then each layer in turn gets its next replicas by one assignment problem.
A replica of expert e on rank r is worth the tokens that are on r when they need e, and those of e whose next expert is
on r. Then, from the first layer to the last, replicas change places until the loads keep the cap: with n[q, e] = tokens
on rank q that need e, a replica of e on q serves them, and the ranks of e share the others, those in the node first.

Shape letters: L MoE layers, E experts of a layer, R ranks, N nodes, S slots per layer.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.replica_choice import choose_ranks
from moeplace.placement.problem import Problem
from moeplace.placement.search.layout import seat_held
from moeplace.placement.search.packing import pack_slots
from moeplace.profiling.kernel_cache import njit

_FORBIDDEN = 1e15
_SWEEPS = 3
_MARGIN = 0.995
"""Share of a limit that swaps aim at: the split of tokens between replicas is even only on average."""


def first_cluster(problem: Problem) -> Cluster:
    """The cluster with the slots of each rank that first replicas may use: its share of the largest layer's experts."""
    slots_R, experts = problem.cluster.slots_of_rank, problem.num_experts
    share_R = np.minimum(-(-slots_R * experts // slots_R.sum()), slots_R)
    return problem.cluster.replace(slots_of_rank=share_R)


def add_surviving_replicas(problem: Problem, first_LER: np.ndarray) -> np.ndarray:
    """(L, E, R) bool: `survive` further replicas of every expert of `first_LER`, on new nodes while there are some."""
    held_LER = first_LER.copy()
    for _sweep in range(_SWEEPS):
        for layer in range(problem.num_layers):
            experts = int(problem.experts_per_layer[layer])
            held_ER = first_LER[layer, :experts].copy()
            for _ in range(problem.survive):
                worth_ER = _worth(problem, held_LER, layer)[:experts]
                chosen_ER = _assign_replicas(problem, held_ER, worth_ER)
                if chosen_ER is None:  # no room beside the first replicas: pack the layer anew
                    held_ER = _ranks_of(pack_slots(problem, layer), problem.cluster, experts)
                    break
                held_ER |= chosen_ER
            held_LER[layer, :experts] = held_ER
    return held_LER


def balance_replicas(problem: Problem, held_LER: np.ndarray, caps_L: np.ndarray, stop: np.ndarray) -> None:
    """Swap replicas, in place, layer by layer in model order, until the loads keep the caps or `stop` is set."""
    assert problem.trace is not None
    trace, cluster = problem.trace, problem.cluster
    nodes = min(problem.survive + 1, cluster.num_nodes)
    rank_TK = np.empty((trace.num_tokens, 1), np.int32)
    near_T, rotation_T = np.full(trace.num_tokens, -1, np.int32), np.arange(trace.num_tokens)
    for layer in range(problem.num_layers):
        if stop[0]:
            return
        ids_TK = trace.layer(layer)
        used = ids_TK[:, 0] >= 0
        arrive_QE = np.zeros((cluster.num_ranks + 1, held_LER.shape[1]))  # last row: nobody knows where they are
        np.add.at(arrive_QE, (near_T[used], ids_TK[used, 0]), 1.0)
        limit_R = caps_L[layer] * used.sum() / cluster.speed_of_rank.sum() * cluster.speed_of_rank
        worth_ER = _worth(problem, held_LER, layer)
        _swap_replicas(held_LER[layer], arrive_QE, worth_ER, cluster.node_of_rank, limit_R * _MARGIN, nodes, stop)
        choose_ranks(ids_TK, held_LER[layer], cluster.node_of_rank, near_T, rotation_T, rank_TK)
        near_T = np.where(used, rank_TK[:, 0], near_T).astype(np.int32)


def to_rows(problem: Problem, held_LER: np.ndarray) -> np.ndarray:
    """(L, S) int32 slot -> expert, experts in rising order on every rank."""
    return np.stack([seat_held(held_ER, problem.cluster.slots_of_rank) for held_ER in held_LER])


@njit(cache=True, nogil=True)
def _add_loads(e, sign, held_ER, arrive_QE, node_R, load_R):  # type: ignore[no-untyped-def]
    """Add to `load_R` the tokens of expert e that each rank serves, times `sign`."""
    num_ranks = len(node_R)
    for q in range(num_ranks + 1):
        if q < num_ranks and held_ER[e, q]:
            load_R[q] += sign * arrive_QE[q, e]
            continue
        near, ranks = 0, 0
        for r in range(num_ranks):
            ranks += held_ER[e, r]
            near += held_ER[e, r] and q < num_ranks and node_R[r] == node_R[q]
        for r in range(num_ranks):
            if held_ER[e, r] and (near == 0 or node_R[r] == node_R[q]):
                load_R[r] += sign * arrive_QE[q, e] / (near if near else ranks)


@njit(cache=True, nogil=True)
def _nodes_held(e, held_ER, node_R):  # type: ignore[no-untyped-def]
    nodes, last = 0, -1
    for r in range(len(node_R)):
        if held_ER[e, r] and node_R[r] != last:
            nodes += 1
            last = node_R[r]
    return nodes


@njit(cache=True, nogil=True)
def _swap_replicas(held_ER, arrive_QE, worth_ER, node_R, limit_R, min_nodes, stop):  # type: ignore[no-untyped-def]
    """While a rank is above its limit: the swap of replicas that ends most overload per token that no longer stays."""
    experts, num_ranks = held_ER.shape
    load_R, trial_R = np.zeros(num_ranks), np.zeros(num_ranks)
    for e in range(experts):
        _add_loads(e, 1.0, held_ER, arrive_QE, node_R, load_R)
    for _ in range(4 * experts):
        over = np.maximum(load_R - limit_R, 0.0).sum()
        if over <= 1e-9 * load_R.sum():  # what is left is rounding
            return
        best, move = 0.0, (-1, -1, -1, -1)
        for g in range(num_ranks):
            if stop[0]:
                return
            if load_R[g] <= limit_R[g]:
                continue
            for a in range(experts):
                if not held_ER[a, g]:
                    continue
                for h in range(num_ranks):
                    if h == g or held_ER[a, h] or load_R[h] > limit_R[h]:
                        continue
                    for b in range(experts):
                        if not held_ER[b, h] or held_ER[b, g]:
                            continue
                        trial_R[:] = load_R
                        _add_loads(a, -1.0, held_ER, arrive_QE, node_R, trial_R)
                        _add_loads(b, -1.0, held_ER, arrive_QE, node_R, trial_R)
                        held_ER[a, g], held_ER[a, h], held_ER[b, h], held_ER[b, g] = False, True, False, True
                        _add_loads(a, 1.0, held_ER, arrive_QE, node_R, trial_R)
                        _add_loads(b, 1.0, held_ER, arrive_QE, node_R, trial_R)
                        spread = (
                            _nodes_held(a, held_ER, node_R) >= min_nodes
                            and _nodes_held(b, held_ER, node_R) >= min_nodes
                        )
                        held_ER[a, g], held_ER[a, h], held_ER[b, h], held_ER[b, g] = True, False, True, False
                        ended = over - np.maximum(trial_R - limit_R, 0.0).sum()
                        if not spread or ended <= 1e-9 * over:
                            continue
                        lost = worth_ER[a, g] + worth_ER[b, h] - worth_ER[a, h] - worth_ER[b, g]
                        score = ended / (1.0 + max(lost, 0.0))
                        if score > best:
                            best, move = score, (a, g, b, h)
        a, g, b, h = move
        if a < 0:
            return
        held_ER[a, g], held_ER[a, h], held_ER[b, h], held_ER[b, g] = False, True, False, True
        load_R[:] = 0.0
        for e in range(experts):
            _add_loads(e, 1.0, held_ER, arrive_QE, node_R, load_R)


def _worth(problem: Problem, held_LER: np.ndarray, layer: int) -> np.ndarray:
    """(E, R) tokens that a replica of each expert on each rank keeps there, neighbours fixed."""
    share_LER = held_LER / np.maximum(held_LER.sum(axis=2, keepdims=True), 1)
    worth_ER = np.zeros(held_LER.shape[1:])
    if layer:
        worth_ER += problem.transitions_LEE[layer - 1].T @ share_LER[layer - 1]
    if layer + 1 < problem.num_layers:
        worth_ER += problem.transitions_LEE[layer] @ share_LER[layer + 1]
    return worth_ER


def _assign_replicas(problem: Problem, held_ER: np.ndarray, worth_ER: np.ndarray) -> np.ndarray | None:
    """(E, R) bool, a new rank per expert at most worth, on a new node while one is left; None = no room."""
    cluster = problem.cluster
    free_R = cluster.slots_of_rank - held_ER.sum(axis=0)
    on_node = [held_ER[:, cluster.node_of_rank == n].any(axis=1) for n in range(cluster.num_nodes)]
    on_node_EN: np.ndarray = np.stack(on_node, axis=1)
    full_E = np.asarray(on_node_EN.all(axis=1))
    barred_ER: np.ndarray = held_ER | (on_node_EN[:, cluster.node_of_rank] & ~full_E[:, None])
    columns = np.repeat(np.arange(cluster.num_ranks), np.maximum(free_R, 0))
    if len(columns) < len(held_ER):
        return None
    rows, slots = linear_sum_assignment(np.where(barred_ER, _FORBIDDEN, -worth_ER)[:, columns])
    chosen_ER = np.zeros_like(held_ER)
    chosen_ER[rows, columns[slots]] = True
    return None if (chosen_ER & barred_ER).any() else chosen_ER


def _ranks_of(slots_S: np.ndarray, cluster: Cluster, experts: int) -> np.ndarray:
    held_ER = np.zeros((experts, cluster.num_ranks), bool)
    used = slots_S >= 0
    held_ER[slots_S[used], cluster.rank_of_slot[used]] = True
    return held_ER
