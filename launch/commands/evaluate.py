"""`moeplace evaluate`: what a placement costs on a trace."""

import argparse

from moeplace.launch.options.problem import SPLITS, index_order_like
from moeplace.launch.tables import format_table
from moeplace.placement.modes import MODES

HELP = "what a placement costs on a trace, beside index order"
EXAMPLE = "moeplace evaluate t.trace p.json --split test"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("trace", metavar="T", help="routing trace")
    parser.add_argument("placement", metavar="P", help="placement file")
    parser.add_argument("--split", choices=SPLITS, default="test", help="tokens to judge by (default: %(default)s)")
    parser.add_argument("--mode", choices=MODES, help="default: its own")
    parser.add_argument("--batch", type=int, default=256, help="tokens of one step (default: %(default)s)")
    parser.add_argument(
        "--kv-dim", type=int, default=576, help="K/V elements per token and layer (default %(default)s)"
    )
    parser.add_argument("--calibration", metavar="C", help="measured links and expert time")
    parser.add_argument("--json", metavar="FILE", help="write the figures for machines")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print, write."""
    from moeplace.placement.cost.calibration import Calibration
    from moeplace.placement.cost.evaluation import cluster_of, evaluate
    from moeplace.placement.cost.steps import StepShape
    from moeplace.placement.placement_file import load_placement
    from moeplace.profiling.files import require_folder_of, write_json
    from moeplace.profiling.traces.file import load_trace

    require_folder_of(args.json)
    trace = load_trace(args.trace)
    placement = load_placement(args.placement)
    side = trace.split(args.split)
    calibration = Calibration.load(args.calibration) if args.calibration else None
    shape = StepShape(batch=args.batch, hidden_size=trace.hidden_size or StepShape().hidden_size, kv_dim=args.kv_dim)
    cluster = cluster_of(placement)
    ours, base = (
        evaluate(side, p, mode=args.mode, cluster=cluster, shape=shape, calibration=calibration).summary()
        for p in (placement, index_order_like(placement))
    )
    rows = [[name.replace("_", " "), base[name], ours[name]] for name in ours]
    print(format_table([f"{args.split} tokens", "index order", "placement"], rows))
    if args.json:
        write_json(args.json, {"split": args.split, "digest": placement.digest, **ours, "index_order": base})
    return 0
