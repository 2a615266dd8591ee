"""The solver's quality figures, one row per instance: `python benchmarks/solver_figures.py [NAME ...] [--trace NPZ]`.

Instances of the real trace fit on the even sequences and judge on the odd ones. Load-only instances are those of the
published comparisons: Zipf loads of 58 layers x 256 experts on 32 ranks with 288 slots, and the same after a drift.
Each row prints what was measured, the proven bound on the fitted tokens, and the wall seconds.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from moeplace.launch.tables import format_table
from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster
from moeplace.placement.migration.relabel import moves
from moeplace.placement.objective import load_imbalance
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve
from moeplace.placement.solvers.lpt import solve_lpt
from moeplace.placement.warm_up import warm_up
from moeplace.profiling.synthetic import traces as synthetic
from moeplace.profiling.traces.trace import RoutingTrace

Row = list[str | float | None]


def real_trace(path: Path) -> RoutingTrace:
    """DeepSeek-V2-Lite routing: 26 MoE layers x 64 experts, top-6."""
    with np.load(path) as arrays:
        ids = arrays["experts"]
        return RoutingTrace(
            ids, np.full(ids.shape[1], 64), sequence_ids=arrays["sequence_ids"], layer_ids=np.arange(1, 27)
        )


def on_trace(
    name: str, trace: RoutingTrace, cluster: Cluster, mode: str, cap: float, seconds: float, solver: str = "auto"
) -> Row:
    """Solve on the train side, judge on the test side."""
    problem = Problem.from_trace(trace.split("train"), cluster, mode=mode, objective="traffic", max_imbalance=cap)
    result = solve(problem, solver=solver, time_limit=seconds)
    e = problem.evaluate(result.placement, trace.split("test"))
    return [
        f"{name} {solver}", e.ranks_per_token, e.nodes_per_token, e.copies_per_token, e.stay_rate, e.imbalance_mean,
        result.objective, result.lower_bound, result.status, result.seconds,
    ]  # fmt: skip


def zipf_loads() -> np.ndarray:
    """(58, 256) loads: probability 1/i, permuted per layer, a million assignments per layer."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 257)
    share /= share.sum()
    return np.stack([np.rint(rng.permutation(share) * 1e6) for _ in range(58)])


def zipf_trace() -> RoutingTrace:
    """A stand-in where no instance uses the real trace."""
    return synthetic.markov(np.full((2, 64), 1 / 64), num_tokens=64, top_k=2, stickiness=0.0, seed=0)


def on_loads() -> list[Row]:
    """Packing with replicas, and its repair after a drift of 2 % with at most 20 moves per layer."""
    cluster = Cluster.uniform(32, slots_per_rank=9)
    load_LE = zipf_loads()
    rows: list[Row] = []
    problem = Problem.from_load(load_LE, cluster)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        slots_LS = solve_lpt(problem, Budget(10.0)).slot_to_expert
        seconds.append(time.perf_counter() - started)
    placement = problem.placement(slots_LS)
    value = float(load_imbalance(problem, placement).mean())
    rows.append(["Zipf 58x256, 288 slots", None, None, None, None, value, value, 1.0, "", float(np.median(seconds))])
    drifted = load_LE * np.exp(0.02 * np.random.default_rng(7).standard_normal(load_LE.shape))
    again = Problem.from_load(drifted, cluster, previous=placement, max_moves=20, max_imbalance=1.004)
    started = time.perf_counter()
    result = solve(again, solver="lpt", time_limit=5.0)
    took = time.perf_counter() - started
    value = float(load_imbalance(again, result.placement).mean())
    label = f"  after 2 % drift, {moves(placement, result.placement).mean():.1f} moves/layer"
    rows.append([label, None, None, None, None, value, value, result.lower_bound, result.status, took])
    return rows


def large(trace: RoutingTrace, solver: str) -> Row:
    """58 x 256, top-8, 288 slots on 4 nodes of 8 ranks: a synthetic trace with the affinity of the real one."""
    made = synthetic.like(trace, num_layers=58, num_experts=256, top_k=8, num_tokens=20_000, seed=0)
    cluster = Cluster.uniform(32, slots_per_rank=9, ranks_per_node=8)
    return on_trace("58x256 top-8, 4 nodes", made, cluster, "dispatch-combine", 1.02, 60.0, solver)


def mixtral_chain() -> Row:
    """32 x 8 chain on 4 ranks, joint load and traffic: lognormal shares, every second transition to a partner."""
    share_LE = np.exp(0.5 * np.random.default_rng(0).standard_normal((32, 8)))
    share_LE /= share_LE.sum(axis=1, keepdims=True)
    made = synthetic.markov(share_LE, num_tokens=20_000, top_k=1, stickiness=0.5, seed=0)
    made = made.replace(sequence_ids=np.arange(made.num_tokens) // 128)
    return on_trace("Mixtral-size chain", made, Cluster.uniform(4, slots_per_rank=2), "coherent", 1.1, 30.0)


def main() -> None:
    """Run the instances that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("d8", "d4", "d2x4", "d72", "c8", "c4", "c8k6", "loads", "large", "mixtral")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--trace", type=Path, help="routing.npz of DeepSeek-V2-Lite; needed by all but loads and mixtral"
    )
    args = parser.parse_args()
    warm_up()
    needed = set(args.names or names) - {"loads", "mixtral"}
    if needed and args.trace is None:
        parser.error(f"--trace is needed for {', '.join(sorted(needed))}")
    trace = real_trace(args.trace) if needed else zipf_trace()
    flat8, flat4 = Cluster.uniform(8, slots_per_rank=8), Cluster.uniform(4, slots_per_rank=16)
    nodes, spare = Cluster.uniform(8, slots_per_rank=8, ranks_per_node=4), Cluster.uniform(8, slots_per_rank=9)
    dispatch, top1 = "dispatch-combine", trace.primary()
    runs = {
        "d8": lambda: [on_trace("8 ranks", trace, flat8, dispatch, 1.01, 30.0)],
        "d4": lambda: [on_trace("4 ranks", trace, flat4, dispatch, 1.01, 30.0)],
        "d2x4": lambda: [on_trace("2 nodes x 4", trace, nodes, dispatch, 1.01, 30.0)],
        "d72": lambda: [on_trace("72 slots", trace, spare, dispatch, 1.01, 30.0)],
        "c8": lambda: [on_trace("top-1 coherent, 8", top1, flat8, "coherent", 1.02, 30.0)],
        "c4": lambda: [on_trace("top-1 coherent, 4", top1, flat4, "coherent", 1.01, 30.0)],
        "c8k6": lambda: [on_trace("top-6 coherent, 8", trace, flat8, "coherent", 1.02, 30.0)],
        "loads": on_loads,
        "large": lambda: [large(trace, "eplb"), large(trace, "auto")],
        "mixtral": lambda: [mixtral_chain()],
    }
    header = ["instance", "ranks/token", "nodes/token", "copies/token", "stay", "imbalance", "fitted objective",
              "proven bound", "status", "seconds"]  # fmt: skip
    table: list[Row] = []
    for name in args.names or names:
        table += runs[name]()
        print(format_table(header, table[-1:]), flush=True)
    print()
    print(format_table(header, table))


if __name__ == "__main__":
    main()
