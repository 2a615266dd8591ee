"""`moeplace report`: one self-contained page on a trace, placements and measurements."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeplace.launch.options.policy import add_policy_arguments, compared_policies, policy_of, require_tiers
from moeplace.launch.options.problem import SPLITS

if TYPE_CHECKING:
    from moeplace.launch.reports.tiers import Budgets, TierView
    from moeplace.placement.placement_file import PlacementFile

_BUDGETS = "12.5,25,37.5,50,75,100"
_MOST_STEPS = 4_000
"""Steps of a walk for a picture: its figures change in the third digit beyond."""
HELP = "draw placements of a trace, and measurements, as one self-contained HTML page"
EXAMPLE = "moeplace report t.trace --placement p.json --out r.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("trace", metavar="T", help="routing trace")
    parser.add_argument(
        "--placement", action="append", required=True, metavar="P", help="placement file (several: repeat the flag)"
    )
    parser.add_argument(
        "--measurements", metavar="F", help="report.json of the quickstart, or JSON of `moeplace bench`"
    )
    parser.add_argument(
        "--offload", metavar="F", help="JSON of `moeplace bench offload`: hit rate and seconds by budget"
    )
    parser.add_argument("--sweep", metavar="F", help="JSON of `moeplace compare --sweep`: traffic against balance")
    parser.add_argument("--events", metavar="F", help="event log of a service: its reviews and migrations")
    parser.add_argument(
        "--cluster", metavar="TOML", help="cluster with memory tiers: what sits where, and what other budgets are worth"
    )
    parser.add_argument("--batch", type=int, default=1, help="with it: tokens of one step (default: %(default)s)")
    parser.add_argument("--budgets", metavar="P,Q,...", help="with it: percentages to draw (default: an eighth and on)")
    add_policy_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="tokens to judge by (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="HTML", help="page to write")


def run(args: argparse.Namespace) -> int:
    """Read, draw, write."""
    from pathlib import Path

    from moeplace.launch.options.problem import judging_side
    from moeplace.launch.reports.front_chart import fronts_from_json
    from moeplace.launch.reports.report import Report, write_report
    from moeplace.launch.reports.tiers import budgets_from_json
    from moeplace.placement.placement_file import load_placement_file
    from moeplace.profiling.errors import FormatError
    from moeplace.profiling.files import read_json, require_folder_of
    from moeplace.profiling.traces.file import load_trace
    from moeplace.runtime.replanning.event_log import read_events

    require_folder_of(args.out)
    fronts = fronts_from_json(read_json(args.sweep), args.sweep) if args.sweep else []
    events = read_events(args.events) if args.events else []
    if args.events and not events:
        raise FormatError(f"{args.events} has no events")
    measured = [budgets_from_json(read_json(args.offload), args.offload)] if args.offload else []
    trace = load_trace(args.trace)
    loaded = {str(path): load_placement_file(path) for path in args.placement}
    names = [Path(path).stem for path in loaded]
    names = names if len(set(names)) == len(names) else list(loaded)
    placements = {"index order": _index_order_file(next(iter(loaded.values())))}
    placements |= dict(zip(names, loaded.values(), strict=True))
    document = read_json(args.measurements) if args.measurements else {}
    if not isinstance(document, dict) or (args.measurements and "runs" not in document):
        raise FormatError(f"{args.measurements} is not a file of measurements: it lacks 'runs'")
    side = judging_side(trace, args.trace, args.split)
    tokens = f"{side.num_tokens:,} of {trace.num_tokens:,} ({args.split})"
    conditions = {"model": trace.model or "unnamed model", "trace": str(args.trace), "tokens": tokens}
    conditions |= {
        name: f"{path}, {loaded[path].placement.digest[:19]}" for name, path in zip(names, loaded, strict=True)
    }
    document = {**document, "conditions": {**conditions, **document.get("conditions", {})}}
    tiers, budgets = _tiers(args, trace, side, dict(zip(names, loaded.values(), strict=True)))
    report = Report.of(
        side, placements, document, fronts=fronts, events=events, tiers=tiers, budgets=[*budgets, *measured]
    )
    write_report(args.out, report)
    print(f"{report.verdict}\nwrote {args.out}")
    return 0


def _tiers(
    args: argparse.Namespace, trace: Any, side: Any, placements: "Mapping[str, PlacementFile]"
) -> "tuple[list[TierView], list[Budgets]]":
    """What sits where, of every placement with tiers, and what other budgets are worth with the last of them."""
    from moeplace.launch.options.policy import budgets_of
    from moeplace.launch.progress import progress
    from moeplace.launch.reports.tiers import Budgets, TierView
    from moeplace.placement.cluster import Cluster
    from moeplace.placement.cost.steps import StepShape
    from moeplace.placement.tiers.budgets import sweep_budgets
    from moeplace.placement.tiers.demand import count_demand
    from moeplace.placement.tiers.evaluation import evaluate_tiers
    from moeplace.placement.tiers.terms import TierTerms

    cluster = Cluster.from_toml(args.cluster) if args.cluster else None
    require_tiers(args, None if cluster is None else cluster.memory)
    if cluster is None:
        return [], []
    nominal = StepShape()
    shape = StepShape(
        batch=args.batch, hidden_size=trace.hidden_size or nominal.hidden_size, kv_dim=trace.kv_dim or nominal.kv_dim
    )
    terms = TierTerms(cluster, shape)
    policy, asked_LE = policy_of(args), count_demand(side, batch=args.batch).activation_LE
    chosen = {name: file.placement for name, file in placements.items() if file.placement.tier is not None}
    views = [
        TierView(name, one, asked_LE, evaluate_tiers(side, one, policy, terms, steps=_MOST_STEPS, with_bound=False))
        for name, one in chosen.items()
    ]
    placement = list(chosen.values() or [file.placement for file in placements.values()])[-1]
    fit = trace.split("train") if args.split == "test" else side
    with progress("walking budgets") as report:
        points = sweep_budgets(
            side, placement, compared_policies(args), budgets_of(args.budgets or _BUDGETS), terms, fit=fit,
            steps=_MOST_STEPS, report=report,
        )  # fmt: skip
    return views, [Budgets(points)]


def _index_order_file(file: "PlacementFile") -> "PlacementFile":
    """Index order on the cluster of a placement, with what that placement's file says of it."""
    from moeplace.launch.options.problem import index_order_like
    from moeplace.placement.placement_file import PlacementFile

    return PlacementFile(index_order_like(file.placement), evidence=file.evidence.get("index_order") or {})
