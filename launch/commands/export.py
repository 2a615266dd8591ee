"""`moeplace export`: the placement file that a serving engine loads."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moeplace.launch.options.layers import layer_range

if TYPE_CHECKING:
    from moeplace.placement.placement import Placement
    from moeplace.placement.placement_file import PlacementFile

HELP = "write a placement as the file that a serving engine loads"
EXAMPLE = "moeplace export p.json --to sglang --out sglang.json"
ENGINES = ("sglang", "vllm", "trtllm", "vllm-ascend", "omni", "exflow")
WITHOUT_DRAFT_LAYERS = ("sglang", "exflow")
TAKES_EMPTY_SLOTS = ("omni", "exflow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("placement", metavar="P", help="placement file")
    parser.add_argument("--to", required=True, choices=ENGINES, help="engine")
    parser.add_argument("--out", required=True, metavar="F", help="file to write (F.moeplace.json gets the provenance)")
    parser.add_argument(
        "--num-hidden-layers", type=int, metavar="N", help="decoder layers of the model, where P does not say it"
    )
    parser.add_argument(
        "--mtp-layers", type=int, default=0, metavar="N", help="add N draft (MTP) layers after the last decoder layer, "
        "experts in index order",
    )  # fmt: skip
    parser.add_argument(
        "--add-layers", type=layer_range, default=(), metavar="IDS", help="add decoder layers whose routers were not "
        "recorded, experts in index order: 0-2",
    )  # fmt: skip
    parser.add_argument(
        "--trace",
        metavar="T",
        help="judge replicas by the engine's own rule on this trace, not by what P says",
    )
    parser.add_argument("--json", metavar="J", help="write files, start flags and notes to J")


def run(args: argparse.Namespace) -> int:
    from moeplace.placement.cost.replica_rule import OWN_RULES
    from moeplace.placement.engines import write_engine_placement
    from moeplace.placement.placement_file import load_placement_file
    from moeplace.profiling.files import write_json

    file = load_placement_file(args.placement)
    placement = file.placement
    if args.num_hidden_layers is not None:
        placement = placement.replace(num_hidden_layers=args.num_hidden_layers)
    repeat = file.evidence.get("replica_rule", OWN_RULES[0]) not in OWN_RULES
    placement, notes = _fit(args, placement, repeat)
    provenance = {"command": shlex.join(["moeplace", *sys.argv[1:]]), "solver": file.solver, "evidence": file.evidence}
    export = write_engine_placement(args.out, placement, args.to, provenance=provenance, repeat=repeat)
    notes += [*export.notes, *_what_remains(args, file, repeat)]
    if args.json:
        write_json(args.json, {"files": list(export.files), "start": export.start, "notes": notes})
    print("\n".join(f"wrote {name}" for name in export.files))
    print(f"start {args.to} with: {export.start}")
    print("\n".join(f"note: {note}" for note in notes))
    return 0


def _what_remains(args: argparse.Namespace, file: "PlacementFile", repeat: bool) -> Iterator[str]:
    """Sentences on what replicas are worth where the engine chooses among them by its own rule."""
    from moeplace.placement.cost.replica_rule import OWN_RULES, RULES_OF_ENGINE, get_rule
    from moeplace.placement.engines.fitting import fill_empty_slots

    written, filled = fill_empty_slots(file.placement) if _fills(args, repeat) else (file.placement, 0)
    if not written.has_replicas:
        return
    if filled and not args.trace:
        yield "the plan's figures are without the replicas in its empty slots: give --trace to judge what is written"
        return
    figures = _judge(args.trace, written) if args.trace else file.evidence.get("by_replica_rule")
    if not figures:
        yield "replicas were not judged by the engine's rule, which moeplace's figures do not hold for: give --trace"
        return
    rule = file.evidence.get("replica_rule", OWN_RULES[0])
    own = figures[rule if rule in OWN_RULES and rule in figures else OWN_RULES[0]]
    for name in RULES_OF_ENGINE.get(args.to, ("random",)):
        found = figures[name]
        yield (
            f"by the replica rule of {get_rule(name).engine} ({name}) {found['ranks_per_token']:.3f} ranks per token "
            f"remain of the {own['ranks_per_token']:.3f} by moeplace's own, at imbalance "
            f"{found['imbalance_mean']:.3f} instead of {own['imbalance_mean']:.3f}"
        )


def _fills(args: argparse.Namespace, repeat: bool) -> bool:
    """Whether empty slots get replicas: the engine needs an expert in each, and repeats none of the rank."""
    from moeplace.placement.engines import REPEATS

    return args.to not in TAKES_EMPTY_SLOTS and not (repeat and args.to in REPEATS)


def _judge(path: str, placement: "Placement") -> dict[str, Any]:
    """Figures by rule, on the judging side of a trace."""
    from moeplace.launch.options.problem import figures_by_rule, one_side
    from moeplace.placement.cost.evaluation import cluster_of
    from moeplace.placement.problem import Problem
    from moeplace.profiling.traces.file import load_trace

    side, _ = one_side(load_trace(path), "test")
    problem = Problem.from_trace(side, cluster_of(placement), mode=placement.mode)
    return figures_by_rule(problem, placement, side)


def _fit(args: argparse.Namespace, placement: "Placement", repeat: bool) -> tuple["Placement", list[str]]:
    """The placement with the layers that the flags add and without empty slots, and what to say about it.

    With `repeat` slots stay empty that the engine's file fills with experts of their rank: the plan left them empty
    because a replica costs ranks where an engine draws among replicas.

    Raises:
        InputError: the engine has no rows for draft layers, or a layer is there already.
    """
    from moeplace.placement.engines import REPEATS
    from moeplace.placement.engines.fitting import add_layers, fill_empty_slots
    from moeplace.placement.repeats import repeat_experts
    from moeplace.profiling.errors import InputError

    notes = []
    if args.mtp_layers and args.to in WITHOUT_DRAFT_LAYERS:
        raise InputError(
            f"--mtp-layers ({args.mtp_layers}): {args.to} has no rows for draft layers, leave the flag out"
        )
    if args.mtp_layers < 0:
        raise InputError(f"--mtp-layers ({args.mtp_layers}) must not be negative")
    last = placement.num_hidden_layers
    added = (*args.add_layers, *range(last, last + args.mtp_layers))
    if added:
        placement = add_layers(placement, added)
        notes.append(f"decoder layers {', '.join(map(str, added))} were added, experts in index order")
    if _fills(args, repeat):
        placement, filled = fill_empty_slots(placement)
        if filled:
            notes.append(
                f"{filled} empty slots were filled with replicas, as {args.to} needs: they cost memory and help "
                "little, solve with fewer slots per rank or for longer"
            )
    elif repeat and args.to in REPEATS and (repeated := repeat_experts(placement)[1]):
        notes.append(f"{repeated} empty slots repeat an expert of their rank, which costs no traffic")
    return placement, notes
