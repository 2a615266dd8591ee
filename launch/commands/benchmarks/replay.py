"""`moeplace bench replay`: recorded routing through the runtime, several placements and modes in alternation."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeplace.launch.benches.replay import ReplayOptions

HELP = "replay a trace on the ranks that torchrun started, placements and modes side by side"
DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", help="trace file")
    parser.add_argument(
        "--runs",
        required=True,
        metavar="A,B,...",
        help="PLACEMENT:MODE each, the first is the baseline; PLACEMENT is a file or index-order; MODE is "
        "dispatch-combine, coherent or allgather; dispatch-combine/plain (default for index-order) and "
        "dispatch-combine/node-aware "
        "(default for files, top-k > 1, several nodes) fix the form",
    )
    parser.add_argument(
        "--replica-rule",
        choices=("moeplace", "balanced"),
        default="moeplace",
        help="who serves an expert with several slots, in every run (default: %(default)s)",
    )
    parser.add_argument("--split", choices=("test", "train", "all"), default="test", help="side of the trace (test)")
    parser.add_argument("--top-k", type=int, metavar="K", help="keep the first K experts of every token")
    parser.add_argument("--json", metavar="F", help="write conditions and figures to F")
    parser.add_argument("--calibration", metavar="C", help="predict from this file instead of measuring first")
    parser.add_argument("--steps", type=int, default=24, metavar="N", help="timed steps of each run (24)")
    parser.add_argument("--block", type=int, default=3, metavar="N", help="steps of a run before the next one (3)")
    parser.add_argument(
        "--kv-pieces",
        type=int,
        metavar="N",
        help="pieces of a step's K/V exchange (default: one per layer between nodes, one per two layers within one)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and hidden states")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for another rank")
    add_shape_arguments(parser)


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of a step."""
    parser.add_argument("--batch", type=int, default=256, metavar="B", help="tokens of a step over all ranks (256)")
    parser.add_argument("--hidden", type=int, default=2048, metavar="D", help="hidden size (2048)")
    parser.add_argument("--expert-hidden", type=int, default=64, metavar="H", help="hidden size of experts (64)")
    parser.add_argument("--kv-dim", type=int, default=576, metavar="C", help="K/V elements per token and layer (576)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of what travels (bfloat16)")


def run(args: argparse.Namespace) -> int:
    from moeplace.launch.benches.replay import replay_bench
    from moeplace.profiling.files import write_json

    report = replay_bench(_options(args))
    if report is not None:  # rank 0 speaks for the group
        if args.json:
            write_json(args.json, report)
        print(format_report(report))
    return 0


def _options(args: argparse.Namespace) -> "ReplayOptions":
    from moeplace.launch.benches.replay import ReplayOptions

    return ReplayOptions(
        trace=args.trace,
        runs=args.runs,
        split=args.split,
        top_k=args.top_k,
        calibration=args.calibration,
        steps=args.steps,
        block=args.block,
        kv_pieces=args.kv_pieces,
        seed=args.seed,
        timeout=args.timeout,
        replica_rule=args.replica_rule,
        shape=shape_of(args),
    )


def shape_of(args: argparse.Namespace) -> Any:
    """`ReplayShape` of the arguments of `add_shape_arguments`."""
    import torch

    from moeplace.runtime.measure.replay import ReplayShape

    return ReplayShape(args.batch, args.hidden, args.expert_hidden, args.kv_dim, getattr(torch, args.dtype))


def format_report(report: dict[str, Any]) -> str:
    """The figures as a table."""
    from moeplace.launch.tables import format_table

    header = ("run", "s/step", "tokens/s", "speedup", "predicted", "error", "coll/layer", "MB between", "MB inside")
    rows = [
        (
            f"{run['placement']}:{run['mode']}{'/' + run['form'] if run['form'] else ''}",
            run["seconds_per_step"],
            run["tokens_per_second"],
            run["speedup"],
            run["predicted_seconds"],
            run["prediction_error"],
            run["collectives_per_layer"],
            run["bytes_inter_node"] / 1e6,
            run["bytes_intra_node"] / 1e6,
        )
        for run in report["runs"]
    ]
    busiest = "; ".join(
        f"{run['placement']}:{run['mode']} rank {run['busiest_rank']['rank']}, "
        f"{run['busiest_rank']['bytes_inter_node'] / 1e6:.2f} MB between nodes, "
        f"{run['busiest_rank']['tokens_per_layer']:.1f} tokens a layer"
        for run in report["runs"]
    )
    return f"{format_table(header, rows)}\nbusiest rank of a step: {busiest}"
