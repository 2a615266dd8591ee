""" "viterbi": the proven optimum of small instances, by dynamic programming over all balanced partitions.

A state of a layer is a full placement of its experts: which rank holds which, exactly C_r on rank r (E = 8 on 4 ranks:
2,520 states). Layers meet only at their boundaries, so the best chain follows forward layer by layer:

    V_0(s) = cost_0(s),    V_{l+1}(s') = cost_{l+1}(s') + min over s of [ V_l(s) + travel_l(s, s') ]
    travel_l(s, s') = (1/T) sum_ij n_l(i,j) ( 1[s(i) != s'(j)] + w 1[node of s(i) != node of s'(j)] )

`coherent` with K = 1 is this chain with cost 0 (traffic is 1 - stay rate, and w times the same for nodes, per
boundary); `dispatch-combine` has no travel and cost_l(s) = mean d + w mean dn of the layer, exact over its distinct
k-sets; `allgather` has neither, and the load decides. A load cap removes states, so "traffic under a load cap" is
exact too; a load price adds `price * imbalance` to cost_l. Source: Viterbi 1967.

The travel of all pairs of states is one matrix product: states are rows of a 0/1 matrix H (states, E * R), and
stayed = H (n_l kron I_R) H'.

Shape letters: L MoE layers, E experts, R ranks, N nodes, M states of a layer.
"""

import math

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.profiling.errors import InputError
from moeplace.profiling.kernel_cache import njit
from moeplace.profiling.traces.stats import distinct_ksets

MOST_STATES = 6_000
"""Per layer; beyond it the pairs of states of one boundary no longer fit comfortably in memory and time."""
TOLERANCE = 1e-9


def fits(problem: Problem) -> bool:
    """Whether `solve_viterbi` solves this problem to proven optimality: traffic, no replicas, few enough states."""
    plain = problem.max_moves is None and not problem.move_price and not problem.survive
    chain = problem.mode != "coherent" or problem.top_k == 1
    full = (problem.redundant_slots == 0).all()
    if problem.trace is None or problem.objective != "traffic":
        return False
    if problem.mode == "coherent":  # a token without expert keeps its owner: not a chain of layers
        chain = chain and problem.transitions_LEE.sum() == problem.trace.num_tokens * (problem.num_layers - 1)
    return bool(plain and chain and full and count_states(problem.cluster.slots_of_rank) <= MOST_STATES)


def count_states(slots_R: np.ndarray) -> int:
    """Placements of one layer: E! / prod C_r!."""
    return math.factorial(int(slots_R.sum())) // math.prod(math.factorial(int(c)) for c in slots_R)


def solve_viterbi(problem: Problem, budget: Budget, *, load_price: float = 0.0) -> Draft:
    """The placement of least traffic (plus `load_price` times the sum of imbalances) under the load cap, proven.

    The cap of a layer is the larger of `max_imbalance` and the least imbalance of all its states. With a load price
    the result is optimal for the priced sum, and claims no bound on traffic.

    Raises:
        InputError: the problem has another objective, replicas, or too many states (see `fits`).
    """
    if not fits(problem):
        raise InputError(
            "viterbi needs the traffic objective, one slot per expert, K = 1 in coherent mode, free moves, "
            f"and at most {MOST_STATES} placements per layer; "
            f"this problem has {count_states(problem.cluster.slots_of_rank)} placements per layer"
        )
    states_ME = enumerate_states(problem.cluster.slots_of_rank)
    costs, kept = [], []
    for layer in range(problem.num_layers):
        imbalance_M = _imbalance(problem, layer, states_ME)
        cap = np.inf if problem.max_imbalance is None else max(problem.max_imbalance, imbalance_M.min())
        kept_M = np.flatnonzero(imbalance_M <= cap + TOLERANCE)
        kept.append(kept_M)
        price = 1.0 if problem.mode == "allgather" else load_price
        costs.append(_layer_cost(problem, layer, states_ME[kept_M]) + price * imbalance_M[kept_M])
    rank_LE, value = _best_chain(problem, states_ME, kept, costs, budget)
    slots_LS = np.argsort(rank_LE, axis=1, kind="stable").astype(np.int32)
    bound = None if load_price else (0.0 if problem.mode == "allgather" else value)
    return Draft(slots_LS, "optimal", bound, ((budget.elapsed, value),))


def enumerate_states(slots_R: np.ndarray) -> np.ndarray:
    """(M, E) int8 rank of each expert in every placement of one layer, in lexicographic order."""
    rows = np.zeros((1, 0), np.int8)
    left_MR = np.array([slots_R], np.int64)
    for _ in range(int(slots_R.sum())):
        grown, lefts = [], []
        for rank in range(len(slots_R)):
            open_M = left_MR[:, rank] > 0
            grown.append(np.column_stack([rows[open_M], np.full(open_M.sum(), rank, np.int8)]))
            left = left_MR[open_M].copy()
            left[:, rank] -= 1
            lefts.append(left)
        rows, left_MR = np.concatenate(grown), np.concatenate(lefts)
    return rows[np.lexsort(rows.T[::-1])]


def _imbalance(problem: Problem, layer: int, states_ME: np.ndarray) -> np.ndarray:
    """(M,) max over ranks of load / speed, over its mean."""
    load_E, speed_R = problem.load_LE[layer], problem.cluster.speed_of_rank
    load_MR = np.stack([(states_ME == rank) @ load_E for rank in range(problem.num_ranks)], axis=1)
    mean = load_E.sum() / speed_R.sum()
    return (load_MR / speed_R).max(axis=1) / mean if mean else np.ones(len(states_ME))


def _layer_cost(problem: Problem, layer: int, states_ME: np.ndarray) -> np.ndarray:
    """(M,) traffic inside a layer, as its share of the mean over layers: d + w dn in `dispatch-combine`, else 0."""
    if problem.mode != "dispatch-combine" or problem.trace is None:
        return np.zeros(len(states_ME))
    sets_UK, count_U = distinct_ksets(problem.trace.layer(layer))
    node_R = problem.cluster.node_of_rank
    cost_M = _distinct(states_ME, problem.num_ranks, sets_UK, count_U)
    if problem.node_weight:
        cost_M = cost_M + problem.node_weight * _distinct(node_R[states_ME], int(node_R[-1]) + 1, sets_UK, count_U)
    return cost_M / (problem.trace.num_tokens * problem.num_layers)


def _distinct(part_ME: np.ndarray, num_parts: int, sets_UK: np.ndarray, count_U: np.ndarray) -> np.ndarray:
    """(M,) sum over tokens of the number of distinct parts that their experts are on."""
    total_M = np.zeros(len(part_ME), np.int64)
    for part in range(num_parts):
        on_ME = np.pad(part_ME == part, ((0, 0), (0, 1)))  # the last column answers for -1
        total_M += on_ME[:, sets_UK].any(axis=2) @ count_U
    return total_M


def _best_chain(
    problem: Problem, states_ME: np.ndarray, kept: list[np.ndarray], costs: list[np.ndarray], budget: Budget
) -> tuple[np.ndarray, float]:
    """Rank of each expert (L, E) on the cheapest chain of states, and its cost."""
    layers = problem.num_layers
    if problem.mode != "coherent":
        best = [int(cost.argmin()) for cost in costs]
        states = [states_ME[kept_M[m]] for kept_M, m in zip(kept, best, strict=True)]
        return np.stack(states), float(sum(cost.min() for cost in costs))
    ranks = np.arange(problem.num_ranks)
    held_MX = (states_ME[:, :, None] == ranks).astype(np.float32).reshape(len(states_ME), -1)
    affinity_RR = np.eye(problem.num_ranks)
    if problem.node_weight:
        node_R = problem.cluster.node_of_rank
        affinity_RR = affinity_RR + problem.node_weight * (node_R[:, None] == node_R)
    total = max(int(problem.transitions_LEE.sum()), 1)
    value_M, back = costs[0], []
    for layer in range(1, layers):
        weight_EE = problem.transitions_LEE[layer - 1] / total
        moved = float(weight_EE.sum()) * (1.0 + problem.node_weight)
        gain_XX = np.kron(weight_EE, affinity_RR).astype(np.float64)
        before_MX = held_MX[kept[layer - 1]] @ gain_XX
        value_M, back_M = _extend(value_M, before_MX, held_MX[kept[layer]].astype(np.float64))
        value_M = value_M + costs[layer] + moved
        back.append(back_M)
        budget.report(layer / layers)
    state = int(value_M.argmin())
    path = [state]
    for back_M in reversed(back):
        path.append(int(back_M[path[-1]]))
    states = [states_ME[kept_M[m]] for kept_M, m in zip(kept, reversed(path), strict=True)]
    return np.stack(states), float(value_M.min())


def _extend(value_M: np.ndarray, before_MX: np.ndarray, after_PX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over all states s before: min of value(s) - before(s) . after(s'), and its argument; in blocks of states s'."""
    best_P = np.empty(len(after_PX))
    back_P = np.empty(len(after_PX), np.int32)
    for start in range(0, len(after_PX), 512):
        block = slice(start, start + 512)
        stayed_PM = after_PX[block] @ before_MX.T
        _reduce(stayed_PM, value_M, best_P[block], back_P[block])
    return best_P, back_P


@njit(cache=True, nogil=True)
def _reduce(stayed_PM: np.ndarray, value_M: np.ndarray, best_P: np.ndarray, back_P: np.ndarray) -> None:
    for p in range(stayed_PM.shape[0]):
        best = np.inf
        argument = -1
        for m in range(stayed_PM.shape[1]):
            value = value_M[m] - stayed_PM[p, m]
            if value < best:
                best = value
                argument = m
        best_P[p] = best
        back_P[p] = argument
