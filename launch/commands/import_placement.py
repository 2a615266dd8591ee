"""`moeplace import-placement`: a placement from the file of a serving engine."""

import argparse

from moeplace.launch.options.layers import layer_range

HELP = "read the placement file of a serving engine"
EXAMPLE = "moeplace import-placement sglang.json --from sglang --out p.json"
ENGINES = ("sglang", "vllm", "trtllm", "vllm-ascend", "omni", "exflow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="FILE", help="the engine's file; F.moeplace.json beside it is used if present"
    )
    parser.add_argument("--from", dest="engine", required=True, choices=ENGINES, help="engine")
    parser.add_argument("--out", required=True, metavar="P", help="placement file to write")
    parser.add_argument("--ranks", type=int, metavar="R", help="ranks, where FILE does not say it")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="ranks of a node (all in one)")
    parser.add_argument("--num-experts", type=int, metavar="E", help="experts per layer, where FILE does not say it")
    parser.add_argument(
        "--layer-ids", type=layer_range, metavar="IDS", help="decoder layers of the MoE layers: 1-26, 3,5,7"
    )
    parser.add_argument("--num-hidden-layers", type=int, metavar="N", help="decoder layers in all")
    parser.add_argument("--ignore-sidecar", action="store_true", help="read FILE as if it stood alone")


def run(args: argparse.Namespace) -> int:
    return run_import_placement(args)


def _one_number(experts: int | tuple[int, ...] | None) -> int | None:
    """Placement files of engines have one number of experts.

    Raises:
        InputError: there are several.
    """
    from moeplace.profiling.errors import InputError

    if isinstance(experts, tuple):
        raise InputError(f"--num-experts {','.join(map(str, experts))} must be one number for a placement file")
    return experts


def run_import_placement(args: argparse.Namespace) -> int:
    """Read `args.source` as a file of `args.engine` and write a placement file; returns the exit code."""
    from moeplace.placement.engines import read_engine_placement
    from moeplace.placement.placement_file import save_placement

    options = {
        "num_ranks": args.ranks,
        "ranks_per_node": args.ranks_per_node,
        "num_experts": _one_number(args.num_experts),
        "layer_ids": None if args.layer_ids is None else tuple(args.layer_ids),
        "num_hidden_layers": args.num_hidden_layers,
    }
    given = {name: value for name, value in options.items() if value is not None}
    placement = read_engine_placement(args.source, args.engine, ignore_sidecar=args.ignore_sidecar, **given)
    save_placement(args.out, placement, solver={"name": f"imported from {args.engine}"})
    print(
        f"{args.out}: {placement.num_layers} MoE layers, {placement.num_experts} experts, {placement.num_ranks} ranks, "
        f"{placement.num_slots} slots"
    )
    return 0
