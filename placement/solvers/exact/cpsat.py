""" "cp-sat": one layer at a time with OR-tools, exact for small layers, with replicas, memory and migration price.

The model of a layer, x_{e,r} = 1 if rank r holds expert e, P load, s speed, b bytes:

    min   traffic + seconds * busiest + price * sum b_e x_{e,r} over ranks that did not hold e before
    s.t.  sum_r x_{e,r} >= 1 (+ lost ranks to survive)     every expert has a slot
          sum_e x_{e,r} <= C_r                             memory
          load_r <= cap * mean * s_r                       only without replicas, where loads are known beforehand
          sum of new x_{e,r} <= most moves

    load_r      sum_e P_e x_{e,r} / n_e with n_e = sum_r x_{e,r}: an expert's load splits evenly over its replicas
    traffic     `dispatch-combine`: sum over distinct k-sets t of count_t (sum_r u_{t,r} + w sum_n v_{t,n}), u_{t,r} and
                v_{t,n} = 1 if the set uses rank r, node n: the exact connectivity, every expert being used on some
                rank that holds it
                `coherent`: sum over neighbours' experts of transitions that change rank (or node), linear because the
                layers beside are fixed; layers alternate, forward and back, until a sweep gains nothing. Primary
                experts only: for K > 1 this is a surrogate, and a note says so
    busiest     max over ranks of load_r / s_r, alone where traffic does not count

Where a layer has more (k-set, rank) pairs than fit, only its most frequent k-sets enter, and a note says so. Every
layer starts from longest-first packing as a hint, so a valid placement is there from the beginning.

Deterministic for a seed: one worker, and a limit in CP-SAT's deterministic time beside the clock.

Shape letters: L MoE layers, E experts, K top-k, R ranks, N nodes, U distinct k-sets.
"""

import time
from dataclasses import dataclass

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.objective import load_imbalance, measure
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft, Status
from moeplace.placement.search.layout import seat_held
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.solvers.exact.optimizers import cp_model
from moeplace.profiling.traces.stats import distinct_ksets

MOST_SET_RANKS = 20_000
"""Most (k-set, rank) pairs of one layer's model."""
LOAD_UNITS = 10_000
"""Loads that are not whole numbers are rounded to 1/10,000 of the mean rank's."""
TERMS_PER_SECOND = 30_000
"""Terms written per second of a layer's share of the time limit, so that most of it is left for the search."""
MOST_SWEEPS = 4
TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class LayerAnswer:
    """Which rank holds which expert (E, R) 0/1, and whether it is proven optimal for the model."""

    held_ER: np.ndarray
    optimal: bool


def solve_cpsat(problem: Problem, budget: Budget) -> Draft:
    """Every layer by its own program; `coherent` alternates over layers with their neighbours fixed."""
    share = budget.time_limit / problem.num_layers
    layers = [_LayerModel(problem, layer, share) for layer in range(problem.num_layers)]
    slots_LS = np.stack([pack_slots(problem, layer) for layer in range(problem.num_layers)])
    held = [model.held_by(row_S) for model, row_S in zip(layers, slots_LS, strict=True)]
    chained = problem.mode == "coherent" and problem.num_layers > 1
    order = list(range(problem.num_layers))
    rounds = [order, order[::-1]] * (MOST_SWEEPS // 2) if chained else [order]
    proven, left = True, sum(len(order) for order in rounds)
    for order in rounds:
        changed = False
        for layer in order:
            seconds = budget.remaining / left
            left -= 1
            if seconds < 0.02:
                proven = False
                continue
            beside = (held[layer - 1] if layer else None, held[layer + 1] if layer + 1 < len(held) else None)
            answer = layers[layer].solve(held[layer], beside if chained else (None, None), seconds, budget.seed)
            changed |= not np.array_equal(answer.held_ER, held[layer])
            held[layer] = answer.held_ER
            proven &= answer.optimal
            budget.report(1 - left / (len(rounds) * len(order)))
        if not changed:
            break
    notes = sorted({note for model in layers for note in model.notes})
    rows = [seat_held(held_ER, problem.cluster.slots_of_rank) for held_ER in held]
    even = np.ptp(problem.cluster.speed_of_rank) == 0 or problem.max_imbalance is None
    exact = proven and even and not chained and not notes and not problem.redundant_slots.any()
    status: Status = "time_limit" if budget.expired else "feasible"
    if exact and problem.objective == "traffic" and not problem.move_price and not problem.survive:
        status = "optimal" if problem.mode == "dispatch-combine" and problem.trace is not None else status
    return Draft(_not_worse(problem, np.stack(rows), slots_LS), status, notes=tuple(notes))


def _not_worse(problem: Problem, found_LS: np.ndarray, start_LS: np.ndarray) -> np.ndarray:
    """What was found, but the start where that is better: programs round loads, and see primary experts only."""
    if problem.previous is not None:
        return found_LS
    found, start = problem.placement(found_LS), problem.placement(start_LS)
    if problem.trace is None:
        worse_L = load_imbalance(problem, found) > load_imbalance(problem, start)
        return np.where(worse_L[:, None], start_LS, found_LS)
    return start_LS if measure(problem, start)[1] < measure(problem, found)[1] else found_LS


class _LayerModel:
    """Data of one layer, in integers, and its program."""

    def __init__(self, problem: Problem, layer: int, seconds: float) -> None:
        self._problem, self._layer = problem, layer
        self._experts = int(problem.experts_per_layer[layer])
        self._ranks, self._cluster = problem.num_ranks, problem.cluster
        load_E = problem.load_LE[layer, : self._experts]
        whole = bool((load_E == np.rint(load_E)).all()) and np.ptp(self._cluster.speed_of_rank) == 0
        self._mean = max(float(load_E.sum() / self._cluster.speed_of_rank.sum()), 1e-300)
        self._unit, self._rounded = (1.0, 0) if whole else (self._mean / LOAD_UNITS, self._experts)
        self._load_E = np.rint(load_E / self._unit).astype(np.int64)
        self._replicas = bool(problem.redundant_slots[layer])
        self.notes: list[str] = []
        self._sets = self._count_sets(seconds)

    def held_by(self, row_S: np.ndarray) -> np.ndarray:
        """(E, R) 0/1 of a row of slots."""
        held_ER = np.zeros((self._experts, self._ranks), np.int64)
        used = row_S >= 0
        held_ER[row_S[used], self._cluster.rank_of_slot[used]] = 1
        return held_ER

    def _count_sets(self, seconds: float) -> tuple[np.ndarray, np.ndarray]:
        """Distinct k-sets (U, K) and counts (U,), no more than can be written down in a part of the time."""
        problem = self._problem
        if problem.trace is None or problem.mode != "dispatch-combine":
            return np.zeros((0, 1), np.int64), np.zeros(0, np.int64)
        sets_UK, count_U = distinct_ksets(problem.trace.layer(self._layer))
        terms = problem.top_k * self._ranks * (3 if self._replicas else 1)
        most = max(int(min(MOST_SET_RANKS / self._ranks, seconds * TERMS_PER_SECOND / terms)), 1)
        if len(count_U) > most:
            order = np.argsort(-count_U, kind="stable")[:most]
            self.notes.append(f"only the {most} most frequent k-sets of a layer enter its program")
            sets_UK, count_U = sets_UK[order], count_U[order]
        return sets_UK, count_U

    def solve(
        self, start_ER: np.ndarray, beside: tuple[np.ndarray | None, np.ndarray | None], seconds: float, seed: int
    ) -> LayerAnswer:
        """The best layer found in `seconds`; `start_ER` if nothing is found."""
        started = time.monotonic()
        model = cp_model.CpModel()
        self._replicas_made: dict[int, list] = {}  # type: ignore[type-arg]
        x = [[model.new_bool_var(f"x{e}_{r}") for r in range(self._ranks)] for e in range(self._experts)]
        for e in range(self._experts):
            for r in range(self._ranks):
                model.add_hint(x[e][r], int(start_ER[e, r]))
        self._constrain(model, x)
        terms = self._traffic(model, x, beside) + self._moves(model, x)
        balance = self._balance(model, x, start_ER, traffic=bool(terms))
        model.minimize(sum(terms) + balance)
        engine = cp_model.CpSolver()
        engine.parameters.num_workers = 1
        engine.parameters.random_seed = seed
        engine.parameters.max_time_in_seconds = max(seconds - (time.monotonic() - started), 0.01)
        engine.parameters.max_deterministic_time = seconds
        status = engine.solve(model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return LayerAnswer(start_ER, False)
        held_ER = np.array([[engine.value(x[e][r]) for r in range(self._ranks)] for e in range(self._experts)])
        return LayerAnswer(held_ER, status == cp_model.OPTIMAL)

    def _constrain(self, model: "cp_model.CpModel", x: list) -> None:  # type: ignore[type-arg]
        problem = self._problem
        for e in range(self._experts):
            if self._replicas:
                model.add(sum(x[e]) >= 1 + problem.survive)
            else:
                model.add_exactly_one(x[e])
        for r, capacity in enumerate(self._cluster.slots_of_rank):
            model.add(sum(x[e][r] for e in range(self._experts)) <= int(capacity))

    def _traffic(self, model, x, beside) -> list:  # type: ignore[no-untyped-def,type-arg]
        """Terms of the traffic, in the units of `_price_of_token`."""
        problem, price = self._problem, self._price_of_token()
        node_R, nodes = self._cluster.node_of_rank, self._cluster.num_nodes
        per_rank, per_node = price, round(price * problem.node_weight)
        terms = []
        for t, (experts, count) in enumerate(zip(*self._sets, strict=True)):
            u = [model.new_bool_var(f"u{t}_{r}") for r in range(self._ranks)]
            for e in experts[experts >= 0]:
                if self._replicas:
                    used = [model.new_bool_var(f"a{t}_{e}_{r}") for r in range(self._ranks)]
                    model.add_exactly_one(used)
                    for r in range(self._ranks):
                        model.add_implication(used[r], x[e][r])
                        model.add_implication(used[r], u[r])
                else:
                    for r in range(self._ranks):
                        model.add_implication(x[e][r], u[r])
            terms.append(int(count) * per_rank * sum(u))
            if per_node:
                v = [model.new_bool_var(f"v{t}_{n}") for n in range(nodes)]
                for r in range(self._ranks):
                    model.add_implication(u[r], v[node_R[r]])
                terms.append(int(count) * per_node * sum(v))
        if beside[0] is not None or beside[1] is not None:
            gain_ER = self._stay_gain(beside)
            terms += [-int(gain_ER[e, r]) * x[e][r] for e, r in np.argwhere(gain_ER)]
        return terms

    def _stay_gain(self, beside: tuple[np.ndarray | None, np.ndarray | None]) -> np.ndarray:
        """(E, R) integer units gained by expert e on rank r, given the layers beside."""
        problem, layer, price = self._problem, self._layer, self._price_of_token()
        if problem.top_k > 1:
            self.notes.append("traffic is that of primary experts only")
        gain_ER = np.zeros((self._experts, self._ranks))
        for side, held_ER in zip((-1, 1), beside, strict=True):
            if held_ER is None:
                continue
            weight_EE = problem.transitions_LEE[layer - 1].T if side < 0 else problem.transitions_LEE[layer]
            gain_ER += weight_EE[: self._experts, : len(held_ER)] @ held_ER
        if problem.node_weight:
            same_RR = self._cluster.node_of_rank[:, None] == self._cluster.node_of_rank
            gain_ER = gain_ER + problem.node_weight * gain_ER @ same_RR
        return np.rint(gain_ER * price).astype(np.int64)

    def _moves(self, model, x) -> list:  # type: ignore[no-untyped-def,type-arg]
        """Terms of the migration price; caps the number of new experts on ranks."""
        problem, previous = self._problem, self._problem.previous
        if previous is None or previous.num_ranks != self._ranks:
            return []
        had_ER = previous.copies_LER[self._layer]
        new = [(e, r) for e in range(self._experts) for r in range(self._ranks) if not had_ER[e, r]]
        if problem.max_moves is not None:
            model.add(sum(x[e][r] for e, r in new) <= problem.max_moves)
        if not problem.move_price or problem.expert_bytes is None:
            return []
        unit = self._objective_unit()
        size_E = problem.expert_bytes[self._layer]
        return [round(problem.move_price * float(size_E[e]) / unit) * x[e][r] for e, r in new]

    def _price_of_token(self) -> int:
        """Integer units of one token reaching one more rank; a busiest-load unit is 1 where both count."""
        return 100 if self._problem.objective == "traffic" else 10

    def _objective_unit(self) -> float:
        """Objective (mean over tokens and layers) of one integer unit."""
        problem = self._problem
        if problem.trace is None:
            return 1.0 / LOAD_UNITS
        return 1.0 / (problem.trace.num_tokens * problem.num_layers * self._price_of_token())

    def _balance(self, model, x, start_ER, *, traffic: bool):  # type: ignore[no-untyped-def]
        """The busiest rank's load in the objective: alone, or as a tie-break of the traffic under the cap."""
        problem, speed_R = self._problem, self._cluster.speed_of_rank
        loads = [self._rank_load(model, x, r) for r in range(self._ranks)]
        start_load_R = start_ER.T @ (self._load_E / np.maximum(start_ER.sum(axis=1), 1)) / speed_R
        top = int(self._load_E.sum() / min(speed_R.min(), 1)) + 1
        busiest = model.new_int_var(0, top, "busiest")
        for r in range(self._ranks):
            model.add(busiest >= loads[r] if speed_R[r] == 1 else 1000 * busiest >= round(1000 / speed_R[r]) * loads[r])
        if problem.max_imbalance is not None and not self._replicas:
            # the cap is tightened by what rounded loads may hide, unless the start then breaks it
            cap = problem.max_imbalance * self._mean / self._unit - self._rounded / 2 + TOLERANCE
            model.add(busiest <= int(max(cap, float(np.ceil(start_load_R.max())))))
        weight_of_load = {"traffic": 0, "seconds": self._seconds_weight()}[problem.objective] if traffic else 1
        return weight_of_load * busiest

    def _seconds_weight(self) -> int:
        """Units of one load unit on the busiest rank, where a copy of a token costs 2 / R of a rank's transfer."""
        problem = self._problem
        if problem.trace is None:
            return 1
        shape, expert = problem.shape, problem.calibration.expert
        link = problem.calibration.inter if self._cluster.num_nodes > 1 else problem.calibration.intra
        per_copy = 2 * shape.hidden_size * shape.dtype_bytes / link.bandwidth / self._ranks
        return max(round(self._price_of_token() * expert.per_token * self._unit / per_copy), 1)

    def _rank_load(self, model, x, rank: int):  # type: ignore[no-untyped-def]
        """Integer load of a rank; replicas share evenly."""
        if not self._replicas:
            return sum(int(self._load_E[e]) * x[e][rank] for e in range(self._experts))
        parts = []
        for e in range(self._experts):
            if not self._load_E[e]:
                continue
            part = model.new_int_var(0, int(self._load_E[e]), f"part{e}_{rank}")
            for replicas, has in enumerate(self._counts(model, x, e), start=1):
                model.add(part >= int(self._load_E[e]) // replicas).only_enforce_if(x[e][rank], has)
            parts.append(part)
        return sum(parts)

    def _counts(self, model, x, expert: int) -> list:  # type: ignore[no-untyped-def,type-arg]
        """has[n-1] = 1 if the expert has n replicas; made once per program."""
        made = self._replicas_made
        if expert not in made:
            most = min(self._ranks, int(self._cluster.num_slots - self._experts) + 1)
            made[expert] = [model.new_bool_var(f"n{expert}_{n + 1}") for n in range(most)]
            model.add_exactly_one(made[expert])
            model.add(sum(x[expert]) == sum((n + 1) * has for n, has in enumerate(made[expert])))
        return made[expert]
