"""What two half batches in turn would gain: one computes while copies of the other travel.

    sudo python benchmarks/emulated_cluster.py --rate 200mbit -- \\
        benchmarks/half_batches.py TRACE [index-order PLACEMENT ...] [--batch 256] [--rounds 6] [--rate 25e6]

Steps of recorded routing in `dispatch-combine` (see `bench replay`), by each placement in three ways: the whole batch;
both halves one after the other; both halves in turn, each with a group of its own: where one is about to wait for an
exchange, the other goes on. One of them runs at a time (they are threads that hand a baton to each other), as it would
be in an engine, so that a busy machine does not give them more of its processors.

Beside seconds (medians, in alternation) stand processor seconds of a rank, which other programs do not change, and the
seconds that bytes between hosts take at --rate (bytes a second each way). From these follows a bound without a
clock: a step takes at least as long as its bytes on the wire, and as its processor time on a core of its own.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeplace.launch.benches.replay import nodes_of_launcher
from moeplace.placement.cluster import even_slots
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.placement_file import load_placement
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.comm.group import PendingExchange, RankGroup
from moeplace.runtime.measure.replay import RecordedSteps, Replay, ReplayShape, ReplayTensors

WAYS = ("whole", "halves", "in turn")
Step = Callable[[int], Any]


class Baton:
    """Two threads of which one runs, until it is about to wait for an exchange or has ended."""

    _mine = threading.local()

    def __init__(self) -> None:
        self._turns, self._ended = [threading.Semaphore(1), threading.Semaphore(0)], [False, False]

    def run(self, number: int, work: Callable[[], Any]) -> None:
        """In one of the threads: do it when it is its turn."""
        torch.set_num_threads(1)
        self._turns[number].acquire()
        Baton._mine.held = self, number
        try:
            work()
        finally:
            self._ended[number] = True
            self._turns[1 - number].release()

    @classmethod
    def hand_on(cls) -> None:
        """In one of the threads: let the other one run until it hands on. Elsewhere nothing happens."""
        baton, number = getattr(cls._mine, "held", (None, 0))
        if baton is not None and not baton._ended[1 - number]:
            baton._turns[1 - number].release()
            baton._turns[number].acquire()


def hand_on_before_waiting() -> None:
    """For all exchanges of this process from now on."""
    wait = PendingExchange.wait

    def hand_on_and_wait(pending: PendingExchange) -> None:
        Baton.hand_on()
        wait(pending)

    PendingExchange.wait = hand_on_and_wait  # type: ignore[method-assign]


def steps_of(trace: RoutingTrace, placement: Placement, node_aware: bool, batch: int, group: RankGroup) -> Step:
    """Steps of so many tokens."""
    shape, steps = ReplayShape(batch=batch), RecordedSteps.from_trace(trace, batch)
    tensors = ReplayTensors.random(shape, steps.num_experts, seed=0, device=group.device)
    options = {"shape": shape, "tensors": tensors, "group": group, "node_aware": node_aware}
    return Replay(steps, placement, "dispatch-combine", **options).step  # type: ignore[arg-type]


def ways_of(trace: RoutingTrace, placement: Placement, node_aware: bool, batch: int, group: RankGroup) -> list[Step]:
    """As `WAYS`."""
    groups = [group, group.background()]
    halves = [steps_of(trace, placement, node_aware, batch // 2, each) for each in groups]

    def one_by_one(index: int) -> None:
        for number, half in enumerate(halves):
            half(2 * index + number)

    def in_turn(index: int) -> None:
        baton = Baton()
        threads = [
            threading.Thread(target=baton.run, args=(number, lambda n=number: halves[n](2 * index + n)))
            for number in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return [steps_of(trace, placement, node_aware, batch, group), one_by_one, in_turn]


def measure(ways: list[Step], group: RankGroup, rounds: int) -> list[dict[str, float]]:
    """Medians of this rank, in alternation; bytes between nodes of a step of the first way."""
    taken: list[list[tuple[float, float]]] = [[] for _ in ways]
    for way in ways:
        way(0)  # groups connect, memory is taken
    for index in range(1, rounds + 1):
        for number in np.roll(range(len(ways)), index):
            group.counters.reset()
            start, worked = time.perf_counter(), time.process_time()
            ways[number](index)
            taken[number].append((time.perf_counter() - start, time.process_time() - worked))
            if number == 0:
                sent = group.counters.bytes_sent["inter_node"]
    medians = [[statistics.median(column) for column in zip(*pairs, strict=True)] for pairs in taken]
    return [{"seconds": a, "processor_seconds": b, "bytes_between": float(sent)} for a, b in medians]


def gather(found: list[dict[str, float]], group: RankGroup) -> list[dict[str, float]]:
    """Seconds of the slowest rank, processor seconds of the busiest, bytes of the fullest host."""
    everyone = [json.loads(text) for text in group.all_gather_bytes(json.dumps(found).encode(), kind="figures")]
    nodes = group.node_of_rank.tolist()
    rows = []
    for rows_R in zip(*everyone, strict=True):
        of_node = [
            sum(row["bytes_between"] for row, n in zip(rows_R, nodes, strict=True) if n == node) for node in set(nodes)
        ]
        most = {name: max(row[name] for row in rows_R) for name in ("seconds", "processor_seconds")}
        rows.append({**most, "bytes_between": max(of_node)})
    return rows


def tell(name: str, rows: list[dict[str, float]], rate: float) -> None:
    """Lines of a placement, and the bound."""
    for way, row in zip(WAYS, rows, strict=True):
        gain = rows[0]["seconds"] / row["seconds"]
        print(f"{name:24}  {way:8}  {row['seconds']:7.3f}  {row['processor_seconds']:9.3f}  {gain:6.2f}", flush=True)
    wire = rows[0]["bytes_between"] / rate
    serial, least = wire + rows[0]["processor_seconds"], max(wire, rows[1]["processor_seconds"])
    print(
        f"{name:24}  wire {wire:.3f} s + processor {rows[0]['processor_seconds']:.3f} s = {serial:.3f} s; overlapped "
        f"at least {least:.3f} s: {1 - least / serial:.0%} less at most"
    )


def main() -> None:
    """Under torchrun; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("placements", nargs="*", default=["index-order"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rate", type=float, default=25e6, help="bytes a second between hosts, each way (25e6)")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    hand_on_before_waiting()
    everyone = RankGroup.from_environment(timeout=300)
    group = everyone.with_nodes(nodes_of_launcher(everyone.size))
    trace, found = load_trace(args.trace).split("test"), {}
    for name in args.placements:
        if name == "index-order":
            slots = even_slots(trace.num_experts, group.size)
            placement = index_order(trace.experts_per_layer, slots, group.node_of_rank, layer_ids=trace.layer_ids)
        else:
            placement = load_placement(name)
        ways = ways_of(trace, placement, name != "index-order", args.batch, group)
        rows = gather(measure(ways, group, args.rounds), group)
        found[name] = dict(zip(WAYS, rows, strict=True))
        if group.rank == 0:
            tell(Path(name).name, rows, args.rate)
    if args.json and group.rank == 0:
        Path(args.json).write_text(json.dumps(found, indent=1))
    group.agree({"benchmark": "done"})


if __name__ == "__main__":
    main()
