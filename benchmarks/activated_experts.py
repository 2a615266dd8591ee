"""What a search on activated experts per step would gain: swaps that minimise the work of the slowest rank exactly.

    python benchmarks/activated_experts.py TRACE [--ranks 8 16 32] [--batch 8 32 128] [--time-limit 10] [--layers 6]

A rank spends time on every token of a step and on every expert that the step activates (it reads its weights); what a
small step waits for is the rank with most activated experts. `solve` predicts that and chooses between plans by it, but
no search moves experts for it. Here one does: from the plan of `solve`, experts of two ranks change places as long as
the work of the slowest rank, summed over drawn steps of the fitted tokens, falls. Slots per rank stay as they are, the
load has no cap and ways are not looked at: it is the most that such a term can gain. Both are judged on the held-out
steps that `evaluate` forms.

Shape letters: T tokens, K top-k, S steps, E experts, R ranks.
"""

import argparse
from dataclasses import replace

import numpy as np

from moeplace.placement.cluster import Cluster, even_slots
from moeplace.placement.cost.calibration import ExpertTime
from moeplace.placement.cost.steps import cut_lanes, default_shape
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve
from moeplace.profiling.kernel_cache import njit
from moeplace.profiling.traces.file import load_trace

STEPS = 1024
"""Drawn from the fitted tokens."""
SWEEPS = 20


def main() -> None:
    """Print a row per number of ranks and batch."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--time-limit", type=float, default=10.0)
    parser.add_argument("--layers", type=int, default=6, help="spread over the model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    trace = load_trace(args.trace)
    fitted, held_out = trace.split("train"), trace.split("test")
    print("ranks  batch  work of the slowest rank, plan / searched / an even share (us)  gain")
    for ranks in args.ranks:
        for batch in args.batch:
            cluster = Cluster.uniform(ranks, slots_per_rank=even_slots(trace.num_experts, ranks).tolist())
            shape = replace(default_shape(trace), batch=batch)
            problem = Problem.from_trace(fitted, cluster, objective="seconds", shape=shape)
            plan = solve(problem, time_limit=args.time_limit, seed=args.seed).placement
            rows = []
            for layer in np.linspace(0, trace.num_layers - 1, args.layers).astype(int):
                experts = int(trace.experts_per_layer[layer])
                rank_E = np.empty(experts, np.int64)
                rank_E[plan.slot_to_expert[layer]] = plan.rank_of_slot
                rng = np.random.default_rng(args.seed)
                drawn = rng.integers(0, fitted.num_tokens, (STEPS, batch))
                searched_E = rank_E.copy()
                swap_while_it_helps(work_of(fitted.layer(layer), drawn, experts), searched_E, ranks, SWEEPS)
                lanes = cut_lanes(held_out.num_tokens, batch)
                formed = np.arange(lanes.length)[:, None] + np.arange(lanes.width) * lanes.length
                held_SE = work_of(held_out.layer(layer), formed, experts)
                even = held_SE.sum(axis=1).mean() / ranks
                rows.append([slowest(held_SE, rank_E, ranks), slowest(held_SE, searched_E, ranks), even])
            before, after, even = 1e6 * np.mean(rows, axis=0)
            gain = 100 * (1 - after / before)
            print(f"{ranks:5d}  {batch:5d}  {before:8.2f} / {after:8.2f} / {even:8.2f}  {gain:6.2f} %", flush=True)


def work_of(ids_TK: np.ndarray, steps_SB: np.ndarray, experts: int) -> np.ndarray:
    """(S, E) seconds that each step costs the rank of each expert, by the nominal calibration."""
    ids_SX = ids_TK[steps_SB].reshape(len(steps_SB), -1)
    tokens_SE = np.zeros((len(steps_SB), experts + 1))
    np.add.at(tokens_SE, (np.arange(len(ids_SX))[:, None], ids_SX), 1)  # -1, no expert, is counted in the last column
    tokens_SE, expert = tokens_SE[:, :experts], ExpertTime()
    return expert.per_token * tokens_SE + expert.per_activated * (tokens_SE > 0)


def slowest(work_SE: np.ndarray, rank_E: np.ndarray, ranks: int) -> float:
    """Mean over steps of the slowest rank's work."""
    on_RE = rank_E == np.arange(ranks)[:, None]
    return float((work_SE @ on_RE.T).max(axis=1).mean())


@njit(cache=True, nogil=True)
def swap_while_it_helps(work_SE, rank_E, ranks, sweeps):  # type: ignore[no-untyped-def]
    """Change rank_E; every pair of experts on two ranks is tried in every sweep."""
    steps, experts = work_SE.shape
    work_SR = np.zeros((steps, ranks))
    for e in range(experts):
        work_SR[:, rank_E[e]] += work_SE[:, e]
    best = 0.0
    for s in range(steps):
        best += work_SR[s].max()
    for _ in range(sweeps):
        swapped = False
        for e in range(experts):
            for f in range(e):
                r, q = rank_E[e], rank_E[f]
                if r == q:
                    continue
                total = 0.0
                for s in range(steps):
                    change = work_SE[s, f] - work_SE[s, e]
                    most = max(work_SR[s, r] + change, work_SR[s, q] - change)
                    for other in range(ranks):
                        if other != r and other != q:
                            most = max(most, work_SR[s, other])
                    total += most
                    if total >= best:
                        break
                if total < best - 1e-12:
                    best, swapped = total, True
                    change_S = work_SE[:, f] - work_SE[:, e]
                    work_SR[:, r] += change_S
                    work_SR[:, q] -= change_S
                    rank_E[e], rank_E[f] = q, r
        if not swapped:
            break


if __name__ == "__main__":
    main()
