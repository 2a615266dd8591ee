""" "flashlb": vllm-ascend's FlashLB, written anew from the description in its pull requests (vllm-ascend 3042, 6477).

Replicas and ranks are decided together. Experts are cut into groups, the heaviest first. A group's number of replicas
is tried around its fair share; every trial deals out the replicas of the group and of all lighter experts (the largest
risk per replica gets the next), packs them and is judged on the recorded steps; the best stays.

    risk      mean load + z standard deviations, of an expert or of a rank: experts that are busy together weigh more
              on one rank than experts that take turns, so the covariance of their loads counts
    packing   the riskiest replica goes to the rank with room whose risk is least afterwards
    judgement mean over steps of the busiest rank's load over the mean

The peer fills a window of steps while it serves. Here the tokens of a trace are cut into steps in their order; loads
alone are one step, and then risk is load. Two replicas of an expert never share a rank, as a `Placement` has it.

Shape letters: T steps, E experts of a layer, R ranks, S slots per layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.placement import EMPTY_SLOT
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft

STEPS = 16
"""Steps that a trace is cut into."""
Z = 0.674
"""Standard deviations in a risk: the upper quartile of a normal load."""
GROUPS, WIDTH = 4, 8
"""Groups of experts, and how far from its fair share a group's number of replicas is tried."""


def solve_flashlb(problem: Problem, budget: Budget) -> Draft:
    """Layer by layer; blind to traffic, nodes, previous placement, speeds and caps."""
    slots_LS = np.full((problem.num_layers, problem.cluster.num_slots), EMPTY_SLOT, np.int32)
    for layer, steps_TE in enumerate(loads_of_steps(problem)):
        slots_LS[layer] = Search(steps_TE, problem.cluster.slots_of_rank).best(budget)
    return Draft(slots_LS, "time_limit" if budget.expired else "feasible")


def loads_of_steps(problem: Problem) -> Iterator[np.ndarray]:
    """(T, E) loads of each layer: the tokens of the trace in so many steps, or the load itself."""
    for layer, experts in enumerate(problem.experts_per_layer):
        if problem.trace is None:
            yield np.asarray(problem.load_LE[layer : layer + 1, :experts], np.float64)
            continue
        parts = np.array_split(problem.trace.topk_ids[:, layer], min(STEPS, max(problem.trace.num_tokens, 1)))
        yield np.stack([np.bincount(ids[ids >= 0], minlength=experts) for ids in parts]).astype(np.float64)


@dataclass(eq=False)
class Search:
    """One layer.

    Attributes:
        steps_TE: (T, E) loads of steps.
        capacity_R: (R,) slots of each rank.
    """

    steps_TE: np.ndarray
    capacity_R: np.ndarray

    def __post_init__(self) -> None:
        self.mean_E = self.steps_TE.mean(axis=0)
        several = len(self.steps_TE) > 1
        experts = self.steps_TE.shape[1]
        self.covariance_EE = np.cov(self.steps_TE, rowvar=False) if several else np.zeros((experts, experts))
        self.covariance_EE = self.covariance_EE.reshape(experts, experts)
        self.risk_E = self.mean_E + Z * np.sqrt(np.diag(self.covariance_EE))

    def best(self, budget: Budget) -> np.ndarray:
        """(S,) expert of every slot."""
        experts, spare = len(self.risk_E), int(self.capacity_R.sum()) - len(self.risk_E)
        order, size = np.argsort(-self.risk_E, kind="stable"), -(-experts // GROUPS)
        count_E = self._dealt(np.ones(experts, np.int64), order, spare)
        row_S = self.packed(count_E)
        score = self.score(row_S)
        for start in range(0, experts - size, size):
            group, lighter = order[start : start + size], order[start + size :]
            left = spare - int((count_E[order[:start]] - 1).sum())
            fair = int((count_E[group] - 1).sum())
            for extra in range(max(fair - WIDTH, 0), min(fair + WIDTH, left) + 1):
                if budget.expired:
                    return row_S
                trial_E = count_E.copy()
                trial_E[order[start:]] = 1
                trial_E = self._dealt(self._dealt(trial_E, group, extra), lighter, left - extra)
                trial_S = self.packed(trial_E)
                value = self.score(trial_S)
                if value < score:
                    row_S, score, count_E = trial_S, value, trial_E
        return row_S

    def _dealt(self, count_E: np.ndarray, among: np.ndarray, extra: int) -> np.ndarray:
        """(E,) counts with `extra` replicas more for these experts: the largest risk per replica gets the next."""
        count_E = count_E.copy()
        for _ in range(extra):
            open_ = among[count_E[among] < len(self.capacity_R)]
            if not len(open_):
                break
            count_E[open_[np.argmax(self.risk_E[open_] / count_E[open_])]] += 1
        return count_E

    def packed(self, count_E: np.ndarray) -> np.ndarray:
        """(S,) expert of every slot, -1 = none fits: replicas by falling risk, each onto the least risky rank."""
        ranks, start_R = len(self.capacity_R), np.cumsum(self.capacity_R) - self.capacity_R
        mean_R, variance_R, held_R = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks, np.int64)
        shared_RE, on_RE = np.zeros((ranks, len(count_E))), np.zeros((ranks, len(count_E)), bool)
        row_S = np.full(int(self.capacity_R.sum()), EMPTY_SLOT, np.int64)
        share_E = self.mean_E / count_E
        for expert in np.repeat(by_risk := np.argsort(-self.risk_E / count_E, kind="stable"), count_E[by_risk]):
            part = 1.0 / count_E[expert]
            after_R = variance_R + part * (part * self.covariance_EE[expert, expert] + 2 * shared_RE[:, expert])
            risk_R = mean_R + share_E[expert] + Z * np.sqrt(np.maximum(after_R, 0.0))
            risk_R[(held_R >= self.capacity_R) | on_RE[:, expert]] = np.inf
            rank = int(risk_R.argmin())
            if not np.isfinite(risk_R[rank]):
                self._squeeze(int(expert), row_S, on_RE, held_R, start_R)
                continue
            row_S[start_R[rank] + held_R[rank]] = expert
            mean_R[rank] += share_E[expert]
            variance_R[rank] = after_R[rank]
            shared_RE[rank] += part * self.covariance_EE[expert]
            on_RE[rank, expert] = True
            held_R[rank] += 1
        return row_S

    def _squeeze(
        self, expert: int, row_S: np.ndarray, on_RE: np.ndarray, held_R: np.ndarray, start_R: np.ndarray
    ) -> None:
        """Seat an expert that every rank with room holds, in place: another rank gives it a slot."""
        for rank in np.flatnonzero(held_R < self.capacity_R):
            for other in np.flatnonzero(~on_RE[:, expert] & (held_R > 0)):
                for slot in range(start_R[other], start_R[other] + held_R[other]):
                    moved = row_S[slot]
                    if not on_RE[rank, moved]:
                        row_S[slot], row_S[start_R[rank] + held_R[rank]] = expert, moved
                        on_RE[other, moved], on_RE[other, expert], on_RE[rank, moved] = False, True, True
                        held_R[rank] += 1
                        return

    def score(self, row_S: np.ndarray) -> float:
        """Mean over steps of the busiest rank's load over the mean; 1 without load."""
        count_E = np.maximum(np.bincount(row_S[row_S >= 0], minlength=len(self.mean_E)), 1)
        part_TS = np.where(row_S >= 0, (self.steps_TE / count_E)[:, row_S], 0.0)
        rank_S = np.repeat(np.arange(len(self.capacity_R)), self.capacity_R)
        load_TR = np.stack([np.bincount(rank_S, part_S, len(self.capacity_R)) for part_S in part_TS])
        busy_T = load_TR.sum(axis=1) > 0
        return float((load_TR[busy_T].max(axis=1) / load_TR[busy_T].mean(axis=1)).mean()) if busy_T.any() else 1.0
