"""`moeplace plan`: how to get from one placement to another while serving goes on."""

import argparse
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeplace.placement.cluster import Cluster
    from moeplace.placement.placement import Placement

HELP = "plan the migration from one placement to another"
EXAMPLE = "moeplace plan old.json new.json --out plan.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD", help="placement file in force")
    parser.add_argument("new", metavar="NEW", help="placement file wanted, of any number of ranks")
    parser.add_argument("--out", metavar="M", help="plan file to write")
    parser.add_argument("--cluster", metavar="TOML", help="cluster of NEW: its links give the predicted seconds")
    parser.add_argument("--expert-bytes", type=int, metavar="B", help="bytes of one expert (default 1: counts experts)")
    parser.add_argument("--staging-bytes", type=int, metavar="B", help="most bytes a rank may stage (one expert)")
    parser.add_argument(
        "--lost-ranks", type=int, nargs="+", default=[], metavar="R", help="ranks of OLD whose memory is gone"
    )
    parser.add_argument(
        "--origin", type=int, nargs="+", metavar="R", help="for each rank of NEW its rank in OLD, -1 = it joins"
    )
    parser.add_argument(
        "--relabel",
        nargs="?",  # stands after OLD and NEW on the command line
        const="auto",
        choices=("auto", "per-layer", "common"),
        help="first exchange equal ranks of NEW so that the most bytes stay: in every layer by itself, or the same way "
        "in all layers, which leaves the stay rate as it is (auto: common for the coherent mode)",
    )
    parser.add_argument("--placement-out", metavar="P", help="with --relabel: placement file to write, what M leads to")
    parser.add_argument("--json", metavar="F", help="write the figures to F")


def run(args: argparse.Namespace) -> int:
    from moeplace.launch.tables import format_table
    from moeplace.placement.cluster import Cluster
    from moeplace.placement.migration.file import save_plan, summarize_plan
    from moeplace.placement.migration.layout import default_origin
    from moeplace.placement.migration.plan import plan_migration
    from moeplace.placement.placement_file import load_placement, load_placement_file, save_placement
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.files import write_json

    if args.placement_out and not args.relabel:
        raise InputError("--placement-out needs --relabel: without it the plan leads to NEW itself")
    old, wanted = load_placement(args.old), load_placement_file(args.new)
    new, lost = wanted.placement, tuple(args.lost_ranks)
    cluster = Cluster.from_toml(args.cluster) if args.cluster else None
    if cluster is not None and cluster.slots_of_rank.tolist() != new.slots_of_rank.tolist():
        raise InputError(f"{args.cluster} has the slots {cluster.slots_of_rank}, NEW needs {new.slots_of_rank}")
    origin = args.origin or default_origin(old.num_ranks, new.num_ranks, lost).tolist()
    if args.relabel:
        new = _relabel(old, new, cluster, origin, args)
    plan = plan_migration(
        old,
        new,
        cluster=cluster,
        expert_bytes=args.expert_bytes,
        staging_bytes=args.staging_bytes,
        lost_ranks=lost,
        origin=origin,
    )
    figures = {**summarize_plan(plan), "old": plan.old_digest, "new": plan.new_digest, "origin": origin}
    if args.placement_out:
        save_placement(args.placement_out, new, solver=wanted.solver, evidence=wanted.evidence)
    if args.out:
        save_plan(args.out, plan)
    if args.json:
        write_json(args.json, figures)
    unit = "experts" if args.expert_bytes is None else "bytes"
    print(format_table(("figure", "value", "unit"), _rows(figures, unit)))
    return 0


def _relabel(
    old: "Placement", new: "Placement", cluster: "Cluster | None", origin: list[int], args: argparse.Namespace
) -> "Placement":
    """`new` with equal ranks exchanged; warns when that changes what its traffic was measured to be."""
    import numpy as np

    from moeplace.placement.cluster import Cluster
    from moeplace.placement.migration.relabel import relabel_to
    from moeplace.profiling.errors import MoeplaceWarning

    how = args.relabel
    if how == "auto":
        how = "common" if new.mode == "coherent" else "per-layer"
    elif how == "per-layer" and new.mode == "coherent":
        warnings.warn(
            "relabelling every layer by itself changes the stay rate of the coherent mode: evaluate the result again",
            MoeplaceWarning,
            stacklevel=2,
        )
    shape = cluster or Cluster(new.node_of_rank, new.slots_of_rank, np.ones(new.num_ranks))
    slots = relabel_to(
        old,
        new.slot_to_expert,
        shape,
        per_layer=how == "per-layer",
        expert_bytes=args.expert_bytes,
        origin=np.asarray(origin),
    )
    return new.replace(slot_to_expert=slots)


def _rows(figures: dict[str, Any], unit: str) -> list[tuple[str, int | float, str]]:
    return [
        ("fetched by ranks", figures["bytes"], unit),
        ("  of it between nodes", figures["inter_node_bytes"], unit),
        ("  of it from the checkpoint", figures["checkpoint_bytes"], unit),
        ("least for this change of cluster", figures["least_bytes"], unit),
        ("copied inside ranks", figures["local_bytes"], unit),
        ("staged by a rank at most", figures["staging_bytes"], unit),
        ("transfers", figures["num_transfers"], "experts"),
        ("rounds", figures["num_rounds"], "rounds"),
        ("predicted time", figures["seconds"], "seconds"),
    ]
