"""Sweeps over the layers of a plan for several experts per token in `coherent` mode, on the exact objective.

The plan comes from the dispatch objective, which sees ranks per token and not who owns a token. Here a layer is
searched with its neighbours fixed (`owners`): layers of one parity at once, then those of the other, cooler from pass
to pass, and at the end every pair of experts in turn. The number of passes follows from the time and the problem's
size; the clock only cuts in. What a search does not see: a tie for the next layer's owner goes to the present one.

Shape letters: T tokens, L MoE layers, K top-k, R ranks, S slots.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.search.annealing import seed_state
from moeplace.placement.search.layout import load_limits, packed_start, padded_load, to_slots
from moeplace.placement.solvers.chain.owners import OwnedLayer, follow_owners, price_of_reaching, swap_owned
from moeplace.profiling.parallel import workers

HOT = 0.012
"""First temperature, as a share of the mean expert's load: lukewarm, a fifth of that of a layer's own search."""
FEWEST_PASSES, MOST_PASSES = 2, 24
_SECONDS_PER_TOKEN = 10e-9
"""Pricing a swap that keeps the caps, per token and expert squared: 2.5 s of CPU time for 5 passes over a third of
DeepSeek-V2-Lite's tokens, 26 layers on 8 ranks, load held to 1.02."""
_FILL = 0.7
_KEY = 4242


def applies(problem: Problem) -> bool:
    """Whether a plan of the problem can be swept: tokens with several experts that move, one slot per expert."""
    several = problem.mode == "coherent" and problem.top_k > 1
    return several and problem.num_layers > 1 and not (problem.redundant_slots > 0).any()


def sweep_owners(
    problem: Problem, budget: Budget, slots_LS: np.ndarray, cap: float | None, seconds: float
) -> np.ndarray:
    """(L, S) slots after the sweeps; whether they are better, the caller judges on all tokens.

    Args:
        problem: `applies` to it.
        budget: clock and seed.
        slots_LS: the plan to begin with.
        cap: on imbalance, None = any; a layer above it gets no worse.
        seconds: what this may take.
    """
    sweep = _Sweep.of(problem, slots_LS, cap, 1)
    plan = _planned(problem, seconds, sweep.allowed)
    if plan.stride > 1:
        sweep = _Sweep.of(problem, slots_LS, cap, plan.stride)
    with budget.alarm(min(seconds, budget.remaining)) as stop, ThreadPoolExecutor(workers()) as pool:
        for number in range(plan.passes):
            last = number == plan.passes - 1
            temperature = 0.0 if last else sweep.hot * (1.0 - number / (plan.passes - 1.0)) ** 2
            proposals = -1 if last and plan.share == 1.0 else int(plan.share * sweep.pairs)
            for parity in (0, 1):
                sweep.half(pool, parity, proposals, temperature, budget, number, stop)
            if stop[0]:
                break
    return sweep.slots(problem)


class _Plan(NamedTuple):
    """Passes, the share of all pairs that each of them tries, and the stride of the tokens looked at."""

    passes: int
    share: float
    stride: int


def _planned(problem: Problem, seconds: float, allowed: float) -> _Plan:
    """What fits into a time if `allowed` is the share of swaps that keep the caps, the only ones that cost something.

    All tokens if that leaves four passes, else fewer, but no fewer than 64 for each slot; then fewer pairs.
    """
    assert problem.trace is not None
    tokens, slots, top_k = problem.trace.num_tokens, problem.cluster.num_slots, problem.top_k
    per_swap = 2 * tokens * top_k / slots * top_k * _SECONDS_PER_TOKEN
    one_pass = problem.num_layers * slots * (slots - 1) / 2 * per_swap * max(allowed, 0.01) / workers()
    affordable = _FILL * seconds / max(one_pass, 1e-9)
    stride = int(np.clip(np.ceil(4 / max(affordable, 1e-9)), 1, max(tokens // (64 * slots), 1)))
    passes = int(np.clip(affordable * stride, FEWEST_PASSES, MOST_PASSES))
    return _Plan(passes, float(min(affordable * stride / passes, 1.0)), stride)


@dataclass(eq=False)
class _Sweep:
    """The plan as ranks, and the tokens of every layer; `rank_LS` changes."""

    rank_LS: np.ndarray
    ids: list[np.ndarray]
    tokens_of: list[tuple[np.ndarray, np.ndarray]]
    load_LS: np.ndarray
    limit_LR: np.ndarray
    pair_RR: np.ndarray
    hot: float

    @classmethod
    def of(cls, problem: Problem, slots_LS: np.ndarray, cap: float | None, stride: int) -> "_Sweep":
        trace, layers = problem.trace, range(problem.num_layers)
        assert trace is not None
        seen = trace if stride == 1 else trace.select(slice(None, None, stride))
        ids = [seen.layer(layer) for layer in layers]
        slots = problem.cluster.num_slots
        starts = [packed_start(problem, layer) for layer in layers]
        return cls(
            rank_LS=np.stack([_ranks(problem, row_S) for row_S in slots_LS]),
            ids=ids,
            tokens_of=[_by_expert(ids_TK, slots) for ids_TK in ids],
            load_LS=np.stack([padded_load(problem, layer) for layer in layers]),
            limit_LR=np.stack([load_limits(problem, layer, start_S, cap) for layer, start_S in enumerate(starts)]),
            pair_RR=np.ascontiguousarray(problem.prices.pair_RR),
            hot=HOT * seen.num_tokens * seen.top_k / slots,
        )

    @property
    def pairs(self) -> int:
        """Of entries of a layer."""
        return self.rank_LS.shape[1] * (self.rank_LS.shape[1] - 1) // 2

    @property
    def allowed(self) -> float:
        """Share of all pairs whose swap adds no load above the limits, mean over layers."""
        shares = []
        for rank_S, load_S, limit_R in zip(self.rank_LS, self.load_LS, self.limit_LR, strict=True):
            over_S = (np.bincount(rank_S, load_S, minlength=len(limit_R)) - limit_R)[rank_S]
            amount_SS = load_S[:, None] - load_S
            before_SS = np.maximum(over_S, 0.0)[:, None] + np.maximum(over_S, 0.0)
            after_SS = np.maximum(over_S[:, None] - amount_SS, 0.0) + np.maximum(over_S + amount_SS, 0.0)
            shares.append(float(((after_SS <= before_SS + 1e-9) & (rank_S[:, None] != rank_S)).mean()))
        return float(np.mean(shares))

    def half(
        self, pool: ThreadPoolExecutor, parity: int, proposals: int, temperature: float, budget: Budget, number: int,
        stop: np.ndarray,
    ) -> None:  # fmt: skip
        """Search all layers of one parity, their neighbours as they are."""
        ranks, layers = len(self.pair_RR), len(self.ids)
        before = [np.full(len(self.ids[0]), -1, np.int32)]
        for ids_TK, rank_S in zip(self.ids[:-1], self.rank_LS[:-1], strict=True):
            before.append(follow_owners(ids_TK, rank_S, before[-1], ranks))

        def one(layer: int) -> None:
            if stop[0]:
                return
            state = seed_state(budget.rng(_KEY, layer, number))
            layer_now = self.layer(layer, before[layer])
            swap_owned(self.rank_LS[layer], layer_now, proposals, temperature, stop, state)

        list(pool.map(one, range(parity, layers, 2)))

    def layer(self, layer: int, before_T: np.ndarray) -> OwnedLayer:
        """One layer between its neighbours as they are."""
        first_E, token_of = self.tokens_of[layer]
        if layer + 1 < len(self.ids):
            next_TR = price_of_reaching(self.ids[layer + 1], self.rank_LS[layer + 1], self.pair_RR)
        else:
            next_TR = np.zeros((len(before_T), len(self.pair_RR)), np.float32)
        return OwnedLayer(self.ids[layer], first_E, token_of, before_T, next_TR, self.pair_RR, self.load_LS[layer],
                          self.limit_LR[layer])  # fmt: skip

    def slots(self, problem: Problem) -> np.ndarray:
        """(L, S) int32."""
        return np.stack([to_slots(r, int(e)) for r, e in zip(self.rank_LS, problem.experts_per_layer, strict=True)])


def _ranks(problem: Problem, row_S: np.ndarray) -> np.ndarray:
    """(S,) rank of each expert, then of each empty slot."""
    rank_of_slot = problem.cluster.rank_of_slot
    filled, empty = np.flatnonzero(row_S >= 0), np.flatnonzero(row_S < 0)
    rank_S = np.empty(len(row_S), np.int64)
    rank_S[row_S[filled]] = rank_of_slot[filled]
    rank_S[len(filled) :] = rank_of_slot[empty]
    return rank_S


def _by_expert(ids_TK: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """(first_E, token_of) of `OwnedLayer`."""
    token, slot = np.nonzero(ids_TK >= 0)
    expert = ids_TK[token, slot]
    order = np.argsort(expert, kind="stable")
    first_E = np.concatenate([[0], np.cumsum(np.bincount(expert, minlength=slots))]).astype(np.int64)
    return first_E, token[order].astype(np.int32)
