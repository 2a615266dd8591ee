"""Figures of the policy for engines: `python benchmarks/policy_figures.py [--repeats N] [--trace FILE]`, one thread.

58 layers x 256 experts, 288 slots, 32 ranks on 4 nodes: the load-only instances of the published comparisons. Each row
says what a re-plan reaches within its limits, what it fetches, and the processor seconds of one call (median), so that
other work on the machine counts little.

With `--trace`, the routing of a model (arrays `experts` and `sequence_ids`) on 8 ranks instead: the first half of its
sequences is the recorded trace, the second gives the loads of the window and the tokens that plans are judged by.
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.launch.tables import format_table
from moeplace.placement.cost.in_turn import InTurn
from moeplace.placement.cost.replica_rule import get_rule
from moeplace.placement.policy.balance import imbalance_over_steps
from moeplace.placement.rebalancing.plan import Plan, plan
from moeplace.policy import plan as plan_for_engine
from moeplace.profiling.traces.trace import RoutingTrace

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


@dataclass(frozen=True)
class Halves:
    """A model's routing, the first half of its sequences and the second."""

    recorded: RoutingTrace
    held_out: RoutingTrace

    @classmethod
    def of(cls, path: str) -> "Halves":
        """Of a file with the arrays `experts` (T, L, K) and `sequence_ids` (T,)."""
        with np.load(path) as arrays:
            ids_TLK, sequence_T = arrays["experts"], arrays["sequence_ids"]
        experts_L, names = np.full(ids_TLK.shape[1], int(ids_TLK.max()) + 1), np.unique(sequence_T)
        first_T = sequence_T < names[len(names) // 2]
        return cls(RoutingTrace(ids_TLK[first_T], experts_L), RoutingTrace(ids_TLK[~first_T], experts_L))

    @property
    def load_LE(self) -> np.ndarray:
        """(L, E) float64 of the held-out tokens."""
        experts, ids_TLK = int(self.held_out.experts_per_layer[0]), self.held_out.topk_ids
        rows = [np.bincount(ids_TLK[:, layer].ravel(), minlength=experts) for layer in range(ids_TLK.shape[1])]
        return np.stack(rows).astype(np.float64)

    def ranks_per_token(self, slots_LS: np.ndarray, rule: str, ranks: int) -> float:
        """Of held-out tokens, by an engine's rule, all ranks in one node."""
        slots, experts = slots_LS.shape[1], int(self.held_out.experts_per_layer[0])
        turn = InTurn(get_rule(rule), np.arange(slots) * ranks // slots, np.zeros(ranks, int), experts)
        found = 0
        for layer, row_S in enumerate(slots_LS):
            rank_TK = np.sort(turn.try_row(layer, row_S, self.held_out.layer(layer)), axis=1)
            found += len(rank_TK) + int(np.count_nonzero(np.diff(rank_TK, axis=1)))
            turn.take_row(row_S)
        return found / (len(slots_LS) * self.held_out.num_tokens)


def rows_with_trace(halves: Halves, rule: str, per_rank: int, repeats: int) -> list[Row]:
    """The start layout; plans by loads and with the trace from it; both after 10 % drift, with 8 moves a layer."""
    load_LE, ranks = halves.load_LE, 8
    start_LS = np.tile(np.arange(ranks * per_rank) % load_LE.shape[1], (len(load_LE), 1))
    drifted_LE = load_LE * np.exp(0.1 * np.random.default_rng(7).standard_normal(load_LE.shape))
    rows: list[Row] = []

    def add(label: str, loads_LE: np.ndarray, slots_LS: np.ndarray, moves: float | None, seconds: float | None) -> None:
        imbalance_L = imbalance_over_steps(loads_LE[None], slots_LS, ranks)
        reached = halves.ranks_per_token(slots_LS, rule, ranks)
        rows.append([label, reached, float(imbalance_L.mean()), float(imbalance_L.max()), moves, seconds])

    def planned(label: str, loads_LE: np.ndarray, **given: Any) -> np.ndarray:
        asked = {"ranks": ranks, "slots_per_rank": per_rank, "replica_rule": rule, "wait": True, **given}
        answer, seconds = plan_for_engine(loads_LE, **asked), []
        for _ in range(repeats):
            started = time.thread_time()
            plan_for_engine(loads_LE, **asked)
            seconds.append(time.thread_time() - started)
        assert answer.reason is None
        assert answer.note is None
        add(label, loads_LE, answer.map, float(answer.moves.mean()), float(np.median(seconds)))
        return answer.map

    add(f"{ranks * per_rank} slots, {rule}: start layout", load_LE, start_LS, None, None)
    planned("  by loads", load_LE, previous=start_LS)
    first_LS = planned("  with the trace", load_LE, previous=start_LS, trace=halves.recorded)
    planned("  with the trace, 16 moves", load_LE, previous=start_LS, trace=halves.recorded, max_moves=16)
    near = {"previous": first_LS, "max_moves": 8}
    add("  that plan, drifted by 10 %", drifted_LE, first_LS, None, None)
    planned("  by loads, 8 moves", drifted_LE, **near)
    planned("  with the trace, 8 moves", drifted_LE, **near, trace=halves.recorded)
    return rows


def main() -> None:
    """All rows of both loads, or those of a trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="calls of which the median counts (default: 5)")
    parser.add_argument("--trace", help="routing of a model; default: balance alone")
    arguments = parser.parse_args()
    if arguments.trace is None:
        print_balance(arguments.repeats)
        return
    halves, rows = Halves.of(arguments.trace), list[Row]()
    for per_rank in (8, 9):
        for rule in ("hash", "nearest-static"):
            rows += rows_with_trace(halves, rule, per_rank, arguments.repeats)
    columns = ["instance", "ranks per token", "imbalance", "worst layer", "moves", "seconds"]
    print(format_table(columns, rows))


def print_balance(repeats: int) -> None:
    """Balance alone, of Zipf and lognormal loads."""
    rows: list[Row] = []
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
