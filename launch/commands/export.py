"""`moeplace export`: the placement file that a serving engine loads."""

import argparse
import shlex
import sys

HELP = "write a placement as the file that a serving engine loads"
EXAMPLE = "moeplace export p.json --to sglang --out sglang.json"
ENGINES = ("sglang", "vllm", "trtllm", "vllm-ascend", "omni", "exflow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("placement", metavar="P", help="placement file")
    parser.add_argument("--to", required=True, choices=ENGINES, help="engine")
    parser.add_argument("--out", required=True, metavar="F", help="file to write (F.moeplace.json gets the provenance)")
    parser.add_argument(
        "--num-hidden-layers", type=int, metavar="N", help="decoder layers of the model, where P does not say it"
    )
    parser.add_argument("--json", metavar="J", help="write files, start flags and notes to J")


def run(args: argparse.Namespace) -> int:
    from moeplace.placement.engines import write_engine_placement
    from moeplace.placement.placement_file import load_placement_file
    from moeplace.profiling.files import write_json

    file = load_placement_file(args.placement)
    placement = file.placement
    if args.num_hidden_layers is not None:
        placement = placement.replace(num_hidden_layers=args.num_hidden_layers)
    provenance = {"command": shlex.join(["moeplace", *sys.argv[1:]]), "solver": file.solver, "evidence": file.evidence}
    export = write_engine_placement(args.out, placement, args.to, provenance=provenance)
    if args.json:
        write_json(args.json, {"files": list(export.files), "start": export.start, "notes": list(export.notes)})
    print("\n".join(f"wrote {name}" for name in export.files))
    print(f"start {args.to} with: {export.start}")
    print("\n".join(f"note: {note}" for note in export.notes))
    return 0
