"""Figures of the policy for engines: `python benchmarks/policy_figures.py [--repeats N]`, one thread, kernels warm.

58 layers x 256 experts, 288 slots, 32 ranks on 4 nodes: the load-only instances of the published comparisons. Each row
says what a re-plan reaches within its limits, what it fetches, and the processor seconds of one call (median), so that
other work on the machine counts little.
"""

import argparse
import time

import numpy as np

from moeplace.launch.tables import format_table
from moeplace.placement.rebalancing.plan import Plan, plan

SHAPE = {"ranks": 32, "slots_per_rank": 9, "nodes": 4}
Row = list[str | float | None]


def loads(name: str) -> np.ndarray:
    """(58, 256) Zipf shares permuted per layer, or lognormal ones (sigma 1); a million assignments per layer."""
    rng = np.random.default_rng(0)
    if name == "zipf":
        share = 1 / np.arange(1, 257)
        return np.stack([np.rint(rng.permutation(share / share.sum()) * 1e6) for _ in range(58)])
    share_LE = np.exp(rng.standard_normal((58, 256)))
    return np.rint(share_LE / share_LE.sum(axis=1, keepdims=True) * 1e6)


def measured(label: str, load_LE: np.ndarray, repeats: int, **limits: object) -> tuple[Plan, Row]:
    """A plan, and its row."""
    made, seconds = plan(load_LE, **SHAPE, **limits), []  # type: ignore[arg-type]
    for _ in range(repeats):
        started = time.thread_time()
        plan(load_LE, **SHAPE, **limits)  # type: ignore[arg-type]
        seconds.append(time.thread_time() - started)
    mean, worst = made.imbalance_L.mean(), made.imbalance_L.max()
    return made, [label, mean, worst, made.moves_L.mean(), made.across_L.mean(), float(np.median(seconds))]


def main() -> None:
    """All rows of both loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="calls of which the median counts (default: 5)")
    repeats, rows = parser.parse_args().repeats, []
    for name in ("zipf", "lognormal"):
        load_LE, start_LS = loads(name), np.tile(np.arange(288) % 256, (58, 1))
        first, row = measured(f"{name}, from nothing", load_LE, repeats)
        rows.append(row)
        for moves in (64, 128):
            rows.append(
                measured(f"  start layout, {moves} moves", load_LE, repeats, previous=start_LS, max_moves=moves)[1]
            )
        for drift, moves, across in ((0.02, 16, None), (0.02, 16, 6), (0.1, 32, None)):
            drifted_LE = load_LE * np.exp(drift * np.random.default_rng(7).standard_normal(load_LE.shape))
            label = f"  + {drift:.0%}, {moves} moves" + (f", {across} across" if across else "")
            limits = {"previous": first.slot_to_expert, "max_moves": moves, "max_moves_across_nodes": across}
            rows.append(measured(label, drifted_LE, repeats, **limits)[1])
    print(format_table(["instance", "imbalance", "worst layer", "moves", "across nodes", "seconds"], rows))


if __name__ == "__main__":
    main()
