""" "exflow-ilp": ExFlow's integer program, with tokens collapsed into expert pairs.

Source: Yao et al., ExFlow, arXiv 2401.08383, equations 8-12. Its variables, with P parts (nodes, then ranks),
x^p_{l,e} = 1 if expert e of layer l is on part p, and R_{k,l} = 1 if token k changes part after layer l:

    min  sum_k sum_{l<L} R_{k,l}                                        (8)
    s.t. sum_e x^p_{l,e} = E / P             for all l, p               (9)   here: the part's slots
         sum_p x^p_{l,e} = 1                 for all l, e               (10)
         R_{k,l} >= x^p_{l,i} - x^p_{l+1,j}  for all p                  (11)  i, j: the token's experts in l, l + 1
         R_{k,l} >= x^p_{l+1,j} - x^p_{l,i}  for all p                  (12)

What differs from print, none of it changes the optimum:

* Pair aggregation: R depends on the pair (i, j) only, so one continuous z_{l,i,j} with weight n_l(i,j) replaces the R
  of all tokens with that pair: at most (L-1) E^2 of them, however many tokens.
* `formulation="stay"` states the same with y^p_{l,i,j} <= x^p_{l,i}, y^p_{l,i,j} <= x^p_{l+1,j}, maximising sum n y,
  P times the variables and a tighter relaxation.
* Symmetry: in the first layer, expert 0 is on part 0 where parts are equal.
* Slots need not be equal, and a part may keep some empty: (9) becomes <= where there are more slots than experts.

Stages, as released: parts = nodes, then inside each node parts = its ranks. A program too large to be written within
the limit is cut into windows of consecutive layers, the layers beside a window held at the incumbent. The incumbent
starts as a greedy chain: each layer the exact assignment given the layer before.

The paper balances counts, not load: so does this solver, and it ignores a load cap. It uses no replicas.

Shape letters: L MoE layers, E experts, P parts.
"""

import time

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft, Status
from moeplace.placement.search.layout import seat_held
from moeplace.placement.solvers.exact.optimizers import pulp, solve_program
from moeplace.profiling.errors import InputError

SECONDS_PER_CONSTRAINT = 2e-4
"""Writing one constraint through PuLP and reading it into CBC, generously."""
FORMULATIONS = ("change", "stay")


def solve_exflow(problem: Problem, budget: Budget, *, solver: str = "cbc", formulation: str = "change") -> Draft:
    """Least changes of node, then of rank, between the primary experts of consecutive layers.

    Args:
        problem: without a trace every placement costs nothing, and the greedy start is returned.
        budget: its time is split evenly over the stages and nodes that are left.
        solver: "cbc" or any solver that PuLP knows.
        formulation: "change" (equations 11-12) or "stay".

    Raises:
        InputError: the formulation is unknown, or PuLP cannot use the solver.
    """
    if formulation not in FORMULATIONS:
        raise InputError(f"formulation {formulation!r} must be one of {', '.join(FORMULATIONS)}")
    cluster = problem.cluster
    nodes, weight_LEE = cluster.num_nodes, problem.transitions_LEE.astype(float)
    members_LE = np.arange(problem.num_experts) < problem.experts_per_layer[:, None]
    stages = (nodes if nodes > 1 else 0) + nodes
    node_LE = np.where(members_LE, 0, -1)
    proven, notes = True, []
    for index in range(-1 if nodes > 1 else 0, nodes):  # -1: the stage of the nodes
        inside = members_LE if index < 0 else node_LE == index
        if index < 0:
            capacity_P = np.bincount(cluster.node_of_rank, cluster.slots_of_rank).astype(np.int64)
        else:
            capacity_P = cluster.slots_of_rank[cluster.node_of_rank == index]
        share = budget.remaining / max(stages, 1) * (nodes if index < 0 else 1)
        stages -= nodes if index < 0 else 1
        part_LE = greedy_chain(weight_LEE, inside, capacity_P)
        stage = _Stage(weight_LEE, inside, capacity_P, solver, formulation)
        part_LE, optimal, note = stage.solve(part_LE, budget, share)
        proven &= optimal
        notes += [note] if note else []
        if index < 0:
            node_LE, rank_LE = part_LE, np.full_like(part_LE, -1)
        else:
            first = int(np.flatnonzero(cluster.node_of_rank == index)[0])
            rank_LE = part_LE + first if nodes == 1 else np.where(inside, part_LE + first, rank_LE)
    status: Status = "time_limit" if budget.expired else "feasible"
    if proven and nodes == 1 and _is_its_objective(problem):
        status = "optimal"
    return Draft(slots_of_ranks(rank_LE, cluster.slots_of_rank), status, notes=tuple(dict.fromkeys(notes)))


def _is_its_objective(problem: Problem) -> bool:
    """Whether what the program minimises is the problem's objective, and nothing else constrains it."""
    free = (
        problem.max_imbalance is None and problem.max_moves is None and not problem.move_price and not problem.survive
    )
    if problem.trace is None or problem.mode != "coherent" or problem.top_k > 1 or problem.redundant_slots.any():
        return False
    every_token = problem.transitions_LEE.sum() == problem.trace.num_tokens * (problem.num_layers - 1)
    return bool(free and every_token and problem.objective == "traffic")


def slots_of_ranks(rank_LE: np.ndarray, slots_R: np.ndarray) -> np.ndarray:
    """(L, S) int32 slot -> expert from the rank of each expert (-1 beyond a layer's experts), in order of index."""
    ranks = np.arange(len(slots_R))
    return np.stack([seat_held(rank_E[:, None] == ranks, slots_R) for rank_E in rank_LE])


def greedy_chain(weight_LEE: np.ndarray, inside_LE: np.ndarray, capacity_P: np.ndarray) -> np.ndarray:
    """(L, E) part of each expert inside (-1 outside): in order of index in layer 0, then each layer assigned exactly.

    Args:
        weight_LEE: (L-1, E, E) tokens from expert to expert.
        inside_LE: (L, E) which experts take part.
        capacity_P: (P,) most experts on each part.
    """
    part_LE = np.full(inside_LE.shape, -1, np.int64)
    seat_S = np.repeat(np.arange(len(capacity_P)), capacity_P)
    for layer, inside_E in enumerate(inside_LE):
        experts = np.flatnonzero(inside_E)
        if layer == 0:
            part_LE[0, experts] = seat_S[np.arange(len(experts)) * len(seat_S) // max(len(experts), 1)]
            continue
        gain_EP = np.stack(
            [weight_LEE[layer - 1][part_LE[layer - 1] == part].sum(axis=0) for part in range(len(capacity_P))], axis=1
        )
        row, seat = linear_sum_assignment(gain_EP[experts][:, seat_S], maximize=True)
        part_LE[layer, experts[row]] = seat_S[seat]
    return part_LE


class _Stage:
    """One integer program over some experts and parts, whole or window by window."""

    def __init__(
        self, weight_LEE: np.ndarray, inside_LE: np.ndarray, capacity_P: np.ndarray, solver: str, formulation: str
    ) -> None:
        self._inside, self._capacity = inside_LE, capacity_P
        self._solver, self._stay = solver, formulation == "stay"
        both = inside_LE[:-1, :, None] & inside_LE[1:, None, :]
        self._weight = np.where(both, weight_LEE, 0.0)
        self._pairs_L = np.count_nonzero(self._weight, axis=(1, 2))

    def solve(self, part_LE: np.ndarray, budget: Budget, seconds: float) -> tuple[np.ndarray, bool, str]:
        """Improve `part_LE` for `seconds`; returns the parts, whether they are proven optimal, and a remark."""
        layers, end = len(part_LE), budget.remaining - seconds
        if len(self._capacity) == 1 or not self._pairs_L.any():
            return part_LE, True, ""
        constraints = 2 * len(self._capacity) * self._pairs_L
        affordable = seconds / 3 / SECONDS_PER_CONSTRAINT
        if constraints.sum() <= affordable:
            better, outcome = self._window(part_LE, 0, layers, seconds)
            return better, outcome == "optimal", "" if outcome == "optimal" else "the integer program ended unproven"
        size = max(2, int(affordable / 4 // max(constraints.max(), 1)) + 1)
        if constraints.max() > affordable:
            return part_LE, False, "the integer program is too large for the limit: its greedy start stands"
        start = 0
        while budget.remaining > end:
            left = min(budget.remaining - end, seconds / 4)
            part_LE, _ = self._window(part_LE, start, min(start + size, layers), left)
            start += max(size // 2, 1)
            if start >= layers - 1:
                break
        return part_LE, False, f"the integer program was solved in windows of {size} layers"

    def _window(self, part_LE: np.ndarray, first: int, last: int, seconds: float) -> tuple[np.ndarray, str]:
        """Solve layers first..last-1 with the others fixed; returns the better of the incumbent and the answer."""
        started = time.monotonic()
        parts = range(len(self._capacity))
        whole = last - first == len(part_LE)
        program = pulp.LpProblem("exflow", pulp.LpMaximize if self._stay else pulp.LpMinimize)
        x = {
            (layer, e, p): program.add_variable(f"x_{layer}_{e}_{p}", cat="Binary")
            for layer in range(first, last)
            for e in np.flatnonzero(self._inside[layer]).tolist()
            for p in parts
        }
        for (layer, e, p), variable in x.items():
            variable.setInitialValue(int(part_LE[layer, e] == p))
        for layer in range(first, last):
            experts = np.flatnonzero(self._inside[layer]).tolist()
            full = len(experts) == self._capacity.sum()
            for p in parts:
                held = pulp.lpSum(x[layer, e, p] for e in experts)
                program += held == int(self._capacity[p]) if full else held <= int(self._capacity[p])  # (9)
            for e in experts:
                program += pulp.lpSum(x[layer, e, p] for p in parts) == 1  # (10)
        if whole and np.ptp(self._capacity) == 0:
            expert = int(np.flatnonzero(self._inside[first])[0])
            program += x[first, expert, int(part_LE[first, expert])] == 1  # symmetry: parts are equal
        terms = []
        for layer in range(max(first - 1, 0), min(last, len(part_LE) - 1)):
            terms += self._boundary(program, x, part_LE, layer, started + seconds / 3)
        if time.monotonic() > started + seconds / 3:  # writing it for the solver takes as long again
            return part_LE, "none"
        program.setObjective(pulp.lpSum(terms))
        left = seconds - (time.monotonic() - started)
        outcome = solve_program(program, time_limit=left, solver=self._solver, warm=True)
        if outcome == "none":
            return part_LE, outcome
        answer = part_LE.copy()
        for (layer, e, p), variable in x.items():
            if variable.value() > 0.5:
                answer[layer, e] = p
        return (answer, outcome) if self._stayed(answer) >= self._stayed(part_LE) else (part_LE, "feasible")

    def _boundary(self, program, x, part_LE, layer, deadline) -> list:  # type: ignore[no-untyped-def,type-arg]
        """Terms of the objective between a layer and the next; either side may be fixed. Incomplete past the
        deadline."""

        def at(side: int, expert: int, part: int):  # type: ignore[no-untyped-def]
            return x.get((side, expert, part), int(part_LE[side, expert] == part))

        terms = []
        for i, j in np.argwhere(self._weight[layer]):
            if time.monotonic() > deadline:
                break
            weight = float(self._weight[layer, i, j])
            if (layer, i, 0) not in x or (layer + 1, j, 0) not in x:  # linear: one side is fixed
                fixed, side, e = (
                    (int(part_LE[layer, i]), layer + 1, j)
                    if (layer, i, 0) not in x
                    else (int(part_LE[layer + 1, j]), layer, i)
                )
                terms.append(weight * x[side, e, fixed] if self._stay else weight * (1 - x[side, e, fixed]))
            elif self._stay:
                for p in range(len(self._capacity)):
                    y = program.add_variable(f"y_{layer}_{i}_{j}_{p}", 0, 1)
                    y.setInitialValue(int(part_LE[layer, i] == p == part_LE[layer + 1, j]))
                    program += y <= x[layer, i, p]
                    program += y <= x[layer + 1, j, p]
                    terms.append(weight * y)
            else:
                z = program.add_variable(f"z_{layer}_{i}_{j}", 0, 1)
                z.setInitialValue(int(part_LE[layer, i] != part_LE[layer + 1, j]))
                for p in range(len(self._capacity)):
                    program += z >= at(layer, i, p) - at(layer + 1, j, p)  # (11)
                    program += z >= at(layer + 1, j, p) - at(layer, i, p)  # (12)
                terms.append(weight * z)
        return terms

    def _stayed(self, part_LE: np.ndarray) -> float:
        same = (part_LE[:-1, :, None] == part_LE[1:, None, :]) & (part_LE[:-1, :, None] >= 0)
        return float((self._weight * same).sum())
