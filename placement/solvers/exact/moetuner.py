""" "moetuner-ilp": MoETuner's two integer programs, with the repairs that the printed model needs.

Source: Go, Mahajan, MoETuner, arXiv 2502.06643. With P_{e,l} the load, x_{c,e,l} = 1 if expert e of layer l is in
cluster c, y_{c,g,l} = 1 if that cluster is on rank g, B the bandwidth between ranks:

    ILP 1   min sum_l sum_c | sum_e P_{e,l} x_{c,e,l} - Tbar_l |,   Tbar_l = (1/R) sum_e P_{e,l}
    ILP 2   min sum_l max over (g1, g2) of C_{c1,c2,l} / B_{g1,g2} for the clusters c1 on g1 in l, c2 on g2 in l+1
            C_{c1,c2,l} = tokens from an expert of c1 to one of c2;   y_{.,.,l} a bijection of clusters and ranks

Repairs:

1. `sum_c x_{c,e,l} = 1` is missing in print (only "at least one expert per cluster" is there): added.
2. `max` carries no index: taken over pairs of ranks g1 != g2.
3. Local pairs cost nothing: if they did, the objective would be constant for uniform B.
4. The printed memory equation can contradict cluster sizes that ILP 1 has fixed: sizes are the ranks' slots instead.
5. The L1 deviation does not control the maximum: `balance="max"` minimises the busiest cluster, "l1" is
   the printed one.
6. How a token of K experts enters C is not stated: `pairs="primary"` counts its primary experts, "all" its K x K' pairs
   with weight 1 / (K K').
7. The traffic presumes that tokens stay where they ran, as in `coherent`; in `dispatch-combine` the second program
   does not describe what is paid, and a note says so.

ILP 1 falls apart by layer. ILP 2 is written with t_l >= C_{c1,c2,l} / B_{g1,g2} (y_{c1,g1,l} + y_{c2,g2,l+1} - 1),
which is exact because one cluster sits on a rank. With uniform B it needs no program: sort the entries of C_l
downwards and keep them local while they form a partial matching; the first that conflicts is the optimum of the
boundary, and boundaries compose forward. `objective="sum"` replaces the maximum by the sum of remote traffic; with
uniform B an assignment per boundary is then optimal. Ranks of unequal slots or speed may not be exchanged: the
mapping is then left as it is, and a note says so. What does not fit the time limit falls back, layer by layer, to
longest-first packing (ILP 1) and to the uniform solution (ILP 2), each with a note.

Shape letters: L MoE layers, E experts, R ranks (= clusters).
"""

import time
from itertools import pairwise

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.rebalancing.packing import pack
from moeplace.placement.result import Draft, Status
from moeplace.placement.solvers.exact.exflow import slots_of_ranks
from moeplace.placement.solvers.exact.optimizers import pulp, solve_program
from moeplace.profiling.errors import InputError

GAP = 0.025
"""The paper's tolerance for both programs."""
SECONDS_PER_CONSTRAINT = 2e-4
OPTIONS = {"balance": ("l1", "max"), "objective": ("max", "sum"), "pairs": ("primary", "all")}


def solve_moetuner(
    problem: Problem,
    budget: Budget,
    *,
    solver: str = "cbc",
    balance: str = "l1",
    objective: str = "max",
    pairs: str = "primary",
    gap: float = GAP,
) -> Draft:
    """Clusters of balanced load, then clusters onto ranks for traffic.

    Args:
        problem: replicas are not used: redundant slots stay empty.
        budget: two thirds for the first program, the rest for the second.
        solver: "cbc" or any solver that PuLP knows.
        balance: "l1" as printed, or "max" (repair 5).
        objective: of the second program, "max" as printed, or "sum".
        pairs: how a token of several experts counts (repair 6).
        gap: relative gap at which a program may stop.

    Raises:
        InputError: an option has an unknown value.
    """
    for name, value in (("balance", balance), ("objective", objective), ("pairs", pairs)):
        if value not in OPTIONS[name]:
            raise InputError(f"{name} {value!r} must be one of {', '.join(OPTIONS[name])}")
    notes = [f"tokens enter the traffic by {'primary experts' if pairs == 'primary' else 'all pairs of experts'}"]
    if problem.mode != "coherent":
        notes.append(f"the traffic of the second program is that of coherent mode, not of {problem.mode}")
    cluster_LE, packed = _balance_layers(problem, budget, solver, balance, gap)
    if packed:
        notes.append(f"{packed} of {problem.num_layers} layers were packed longest-first: the first program timed out")
    traffic_LRR = _cluster_traffic(problem, cluster_LE, pairs)
    cluster = problem.cluster
    rank_of_LR = np.tile(np.arange(problem.num_ranks), (problem.num_layers, 1))
    if np.ptp(cluster.slots_of_rank) or np.ptp(cluster.speed_of_rank):
        notes.append("ranks are unequal, so clusters keep the ranks they were sized for")
    else:
        rank_of_LR, note = _map_clusters(traffic_LRR, cluster.cost_RR, budget, solver, objective, gap)
        notes += [note] if note else []
    rank_LE = np.where(cluster_LE >= 0, np.take_along_axis(rank_of_LR, np.maximum(cluster_LE, 0), axis=1), -1)
    status: Status = "time_limit" if budget.expired else "feasible"
    return Draft(slots_of_ranks(rank_LE, cluster.slots_of_rank), status, notes=tuple(notes))


def _balance_layers(problem: Problem, budget: Budget, solver: str, balance: str, gap: float) -> tuple[np.ndarray, int]:
    """ILP 1: cluster of each expert (L, E), -1 beyond a layer's experts, and how many layers were only packed."""
    cluster = problem.cluster
    deadline = budget.remaining / 3  # what must be left when ILP 1 ends
    cluster_LE = np.full(problem.load_LE.shape, -1, np.int64)
    packed = 0
    for layer, count in enumerate(problem.experts_per_layer):
        load_E = problem.load_LE[layer, :count]
        start_E = pack(load_E, cluster.slots_of_rank, cluster.speed_of_rank)
        share = (budget.remaining - deadline) / (problem.num_layers - layer)
        sizes_R = np.bincount(start_E, minlength=problem.num_ranks)
        answer_E = None
        if share > 0.05:
            answer_E = balance_clusters(
                load_E, sizes_R, cluster.speed_of_rank, start_E, share, solver=solver, balance=balance, gap=gap
            )
        packed += answer_E is None
        cluster_LE[layer, :count] = start_E if answer_E is None else answer_E
        budget.report(0.6 * (layer + 1) / problem.num_layers)
    return cluster_LE, packed


def balance_clusters(
    load_E: np.ndarray,
    sizes_R: np.ndarray,
    speed_R: np.ndarray,
    start_E: np.ndarray,
    seconds: float,
    *,
    solver: str = "cbc",
    balance: str = "l1",
    gap: float = GAP,
) -> np.ndarray | None:
    """ILP 1 of one layer: the cluster of each expert (E,), or None if the program found nothing in time.

    Args:
        load_E: (E,) loads.
        sizes_R: (R,) experts per cluster (repair 4).
        speed_R: (R,) speeds; a cluster's fair share of the load is proportional.
        start_E: (E,) warm start.
        seconds: time limit.
        solver, balance, gap: see `solve_moetuner`.
    """
    experts, clusters = range(len(load_E)), range(len(sizes_R))
    program = pulp.LpProblem("moetuner1", pulp.LpMinimize)
    x = [[program.add_variable(f"x_{c}_{e}", cat="Binary") for e in experts] for c in clusters]
    for c in clusters:
        for e in experts:
            x[c][e].setInitialValue(int(start_E[e] == c))
        program += pulp.lpSum(x[c]) == int(sizes_R[c])  # repair 4
    for e in experts:
        program += pulp.lpSum(x[c][e] for c in clusters) == 1  # repair 1
    share_R = load_E.sum() * speed_R / speed_R.sum()
    held_R = np.bincount(start_E, load_E, minlength=len(sizes_R))
    over_R = held_R - share_R
    width = 1 if balance == "max" else len(sizes_R)
    deviation = [program.add_variable(f"dev_{c}", 0) for c in range(width)]
    for c in clusters:
        total = pulp.lpSum(float(load_E[e]) * x[c][e] for e in experts)
        if balance == "max":  # repair 5
            program += deviation[0] >= total * (1 / float(speed_R[c])) - float(load_E.sum() / speed_R.sum())
        else:
            deviation[c].setInitialValue(abs(over_R[c]))
            program += deviation[c] >= total - float(share_R[c])
            program += deviation[c] >= float(share_R[c]) - total
    if balance == "max":
        deviation[0].setInitialValue(max((over_R / speed_R).max(), 0.0))
    program.setObjective(pulp.lpSum(deviation))
    outcome = solve_program(program, time_limit=seconds, gap=gap, solver=solver, warm=True)
    if outcome == "none":
        return None
    return np.array([max(clusters, key=lambda c: x[c][e].value()) for e in experts])


def _cluster_traffic(problem: Problem, cluster_LE: np.ndarray, pairs: str) -> np.ndarray:
    """C (L-1, R, R): tokens from cluster to cluster between consecutive layers."""
    ranks = problem.num_ranks
    traffic_LRR = np.zeros((max(problem.num_layers - 1, 0), ranks, ranks))
    if problem.trace is None:
        return traffic_LRR
    if pairs == "primary":
        for layer, weight_EE in enumerate(problem.transitions_LEE):
            before, after = (np.eye(ranks)[np.maximum(c, 0)] * (c >= 0)[:, None] for c in cluster_LE[layer : layer + 2])
            traffic_LRR[layer] = before.T @ weight_EE @ after
        return traffic_LRR
    shares = [_shares(problem.trace.layer(layer), cluster_LE[layer], ranks) for layer in range(problem.num_layers)]
    return np.array([before.T @ after for before, after in pairwise(shares)]).reshape(traffic_LRR.shape)


def _shares(ids_TK: np.ndarray, cluster_E: np.ndarray, ranks: int) -> np.ndarray:
    """(T, R) share of each token's experts in each cluster."""
    share_TR = np.zeros((len(ids_TK), ranks))
    token, slot = np.nonzero(ids_TK >= 0)
    np.add.at(share_TR, (token, cluster_E[ids_TK[token, slot]]), 1.0)
    return share_TR / np.maximum(share_TR.sum(axis=1, keepdims=True), 1.0)


def _map_clusters(
    traffic_LRR: np.ndarray, cost_RR: np.ndarray, budget: Budget, solver: str, objective: str, gap: float
) -> tuple[np.ndarray, str]:
    """ILP 2: rank of each cluster (L, R), and a remark."""
    layers, ranks = len(traffic_LRR) + 1, len(cost_RR)
    start_LR = _uniform_chain(traffic_LRR, objective)
    remote = cost_RR[~np.eye(ranks, dtype=bool)]
    if ranks == 1 or layers == 1 or np.ptp(remote) == 0:
        return start_LR, ""
    constraints = (layers - 1) * ranks * ranks * (ranks - 1) ** 2
    if constraints * SECONDS_PER_CONSTRAINT > budget.remaining / 2:
        return start_LR, "the second program is too large for the limit: ranks are mapped as if all links were equal"
    answer_LR = _map_program(traffic_LRR, cost_RR, start_LR, budget, solver, objective, gap)
    if answer_LR is None:
        return start_LR, "the second program timed out: ranks are mapped as if all links were equal"
    costs = [mapping_cost(traffic_LRR, cost_RR, mapping_LR, objective) for mapping_LR in (answer_LR, start_LR)]
    return (answer_LR if costs[0] <= costs[1] else start_LR), ""


def mapping_cost(traffic_LRR: np.ndarray, cost_RR: np.ndarray, rank_LR: np.ndarray, objective: str) -> float:
    """The second program's objective for the rank of each cluster (L, R)."""
    total = 0.0
    for traffic_RR, before_R, after_R in zip(traffic_LRR, rank_LR, rank_LR[1:], strict=False):
        paid_RR = traffic_RR * cost_RR[before_R[:, None], after_R[None, :]]
        total += float(paid_RR.max() if objective == "max" else paid_RR.sum())
    return total


def _uniform_chain(traffic_LRR: np.ndarray, objective: str) -> np.ndarray:
    """Optimal ranks of all clusters (L, R) for equal links: best partner per boundary, composed forward."""
    rank_LR = [np.arange(traffic_LRR.shape[1])]
    for traffic_RR in traffic_LRR:
        local_RR = traffic_RR if objective == "sum" else _keep_largest_local(traffic_RR)
        before, after = linear_sum_assignment(local_RR, maximize=True)
        rank_R = np.empty_like(rank_LR[-1])
        rank_R[after] = rank_LR[-1][before]
        rank_LR.append(rank_R)
    return np.stack(rank_LR)


def _keep_largest_local(traffic_RR: np.ndarray) -> np.ndarray:
    """0/1 (R, R) partial matching of the largest entries, up to the first that conflicts."""
    kept_RR = np.zeros(traffic_RR.shape)
    for flat in np.argsort(-traffic_RR, axis=None, kind="stable"):
        before, after = np.unravel_index(flat, traffic_RR.shape)
        if kept_RR[before].any() or kept_RR[:, after].any():
            break
        kept_RR[before, after] = 1.0
    return kept_RR


def _map_program(
    traffic_LRR: np.ndarray,
    cost_RR: np.ndarray,
    start_LR: np.ndarray,
    budget: Budget,
    solver: str,
    objective: str,
    gap: float,
) -> np.ndarray | None:
    """ILP 2 over all layers at once; None if nothing was found in time."""
    started = time.monotonic()
    seconds, layers, ranks = budget.remaining, len(start_LR), range(len(cost_RR))
    program = pulp.LpProblem("moetuner2", pulp.LpMinimize)
    y = [[[program.add_variable(f"y_{m}_{c}_{g}", cat="Binary") for g in ranks] for c in ranks] for m in range(layers)]
    for m in range(layers):
        for c in ranks:
            for g in ranks:
                y[m][c][g].setInitialValue(int(start_LR[m, c] == g))
            program += pulp.lpSum(y[m][c]) == 1
            program += pulp.lpSum(y[m][k][c] for k in ranks) == 1
    terms = []
    for m, traffic_RR in enumerate(traffic_LRR):
        largest = program.add_variable(f"t_{m}", 0)
        terms += [largest] if objective == "max" else []
        for c1, c2 in np.argwhere(traffic_RR):
            paid = largest
            if objective == "sum":
                paid = program.add_variable(f"t_{m}_{c1}_{c2}", 0)
                terms.append(paid)
            for g1 in ranks:
                for g2 in ranks:
                    if g1 != g2:  # repairs 2 and 3
                        cost = float(traffic_RR[c1, c2] * cost_RR[g1, g2])
                        program += paid >= cost * (y[m][c1][g1] + y[m + 1][c2][g2] - 1)
    program.setObjective(pulp.lpSum(terms))
    left = seconds - (time.monotonic() - started)
    if solve_program(program, time_limit=left, gap=gap, solver=solver, warm=True) == "none":
        return None
    return np.array([[max(ranks, key=lambda g: y[m][c][g].value()) for c in ranks] for m in range(layers)])
