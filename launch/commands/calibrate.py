"""`moeplace calibrate`: measure links and expert time of the ranks that torchrun started."""

import argparse
from typing import TYPE_CHECKING

from moeplace.launch.commands.bench_replay import add_shape_arguments

if TYPE_CHECKING:
    from moeplace.placement.cost.calibration import Calibration

HELP = "measure links and expert time on this cluster (run under torchrun)"
EXAMPLE = "torchrun --standalone --nproc-per-node 4 -m moeplace.launch.cli calibrate --out c.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="C", help="calibration file to write")
    parser.add_argument("--num-experts", type=int, default=64, metavar="E", help="experts per layer (64)")
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="experts per token (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of routing and weights")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for another rank")
    add_shape_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from moeplace.launch.benches.replay import calibrate_here, one_thread
    from moeplace.launch.commands.bench_replay import shape_of
    from moeplace.profiling.errors import InputError

    one_thread()
    if not 1 <= args.top_k <= args.num_experts:
        raise InputError(f"--top-k ({args.top_k}) must lie in 1..{args.num_experts}, the number of experts")
    calibration = calibrate_here(
        shape_of(args), num_experts=args.num_experts, top_k=args.top_k, seed=args.seed, timeout=args.timeout
    )
    if calibration is not None:  # rank 0 speaks for the group
        calibration.save(args.out)
        print(_format(calibration))
        if calibration.conditions["not measured"]:
            print(f"not measured on these ranks, defaults kept: {', '.join(calibration.conditions['not measured'])}")
    return 0


def _format(calibration: "Calibration") -> str:
    from moeplace.launch.tables import format_table

    rows: list[tuple[str, float, str]] = []
    for tier, link in (("inside nodes", calibration.intra), ("between nodes", calibration.inter)):
        rows += [
            (f"{tier}: latency", link.latency * 1e3, "ms"),
            (f"{tier}: bandwidth of a rank", link.bandwidth / 1e6, "MB/s"),
            (f"{tier}: bandwidth of a node", link.node_bandwidth / 1e6, "MB/s"),
        ]
    expert = calibration.expert
    rows += [
        ("experts of a layer: fixed", expert.fixed * 1e6, "us"),
        ("experts of a layer: per token", expert.per_token * 1e6, "us"),
        ("experts of a layer: per activated expert", expert.per_activated * 1e6, "us"),
    ]
    rows += [(f"rest of a layer: {mode}", s * 1e6, "us") for mode, s in calibration.mode_seconds_per_layer.items()]
    return format_table(("figure", "value", "unit"), rows)
