"""`moeplace report`: one self-contained page on a trace, placements and measurements."""

import argparse
from typing import TYPE_CHECKING

from moeplace.launch.options.problem import SPLITS

if TYPE_CHECKING:
    from moeplace.placement.placement_file import PlacementFile

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
    parser.add_argument("--sweep", metavar="F", help="JSON of `moeplace compare --sweep`: traffic against balance")
    parser.add_argument("--events", metavar="F", help="event log of a service: its reviews and migrations")
    parser.add_argument("--split", choices=SPLITS, default="test", help="tokens to judge by (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="HTML", help="page to write")


def run(args: argparse.Namespace) -> int:
    """Read, draw, write."""
    from pathlib import Path

    from moeplace.launch.options.problem import judging_side
    from moeplace.launch.reports.front_chart import fronts_from_json
    from moeplace.launch.reports.report import Report, write_report
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
    report = Report.of(side, placements, document, fronts=fronts, events=events)
    write_report(args.out, report)
    print(f"{report.verdict}\nwrote {args.out}")
    return 0


def _index_order_file(file: "PlacementFile") -> "PlacementFile":
    """Index order on the cluster of a placement, with what that placement's file says of it."""
    from moeplace.launch.options.problem import index_order_like
    from moeplace.placement.placement_file import PlacementFile

    return PlacementFile(index_order_like(file.placement), evidence=file.evidence.get("index_order") or {})
