"""Arguments shared by the commands that state a problem, and the problem they state."""

import argparse
from dataclasses import dataclass
from typing import Any

from moeplace.launch.options.calibration import calibration_for, load_calibration
from moeplace.launch.options.layers import slot_counts
from moeplace.placement.modes import MODES

SPLITS = ("all", "train", "test")
RULES = ("moeplace", "balanced", "nearest-static", "random", "hash")
"""Names of `placement.cost.replica_rule`, which a parser need not import."""


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """--ranks and what else describes the cluster."""
    group = parser.add_argument_group("cluster")
    group.add_argument("--ranks", type=int, help="ranks, one GPU each")
    group.add_argument("--ranks-per-node", type=int, help="ranks of one node (default: all)")
    group.add_argument(
        "--slots-per-rank", type=slot_counts, metavar="C", help="slots per layer and rank, or one number a rank: 44,84 "
        "(default: each expert once)",
    )  # fmt: skip
    group.add_argument("--cluster", metavar="TOML", help="cluster description instead of the flags above")
    group.add_argument("--topology", metavar="GRAPHML", help="graph of GPUs, switches and links (GraphML)")
    group.add_argument("--calibration", metavar="C", help="measured links and expert time (`moeplace calibrate`)")


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """Mode, objective, constraints and budget."""
    parser.add_argument(
        "--mode", choices=(*MODES, "auto"), default="dispatch-combine",
        help="execution mode to solve for; auto: solve for each of them, sharing the time limit, and say which to run "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--objective", choices=("seconds", "traffic"), default="seconds", help="default: %(default)s")
    parser.add_argument("--max-imbalance", type=float, metavar="X", help="hard cap on a layer's training imbalance")
    parser.add_argument(
        "--replica-budget", choices=("per-layer", "global"), default="per-layer",
        help="global: share the redundant slots of all layers out to those that gain most; every rank holds as many "
        "experts over all layers as before (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--leave-empty", action="store_true",
        help="leave redundant slots empty where filling them lengthens the predicted step or the way (default: an "
        "expert in every slot, as engines need it)",
    )  # fmt: skip
    add_replica_rule(parser)
    parser.add_argument("--survive", type=int, default=0, metavar="N", help="ranks that may be lost at once")
    parser.add_argument("--previous", metavar="P", help="placement now in force, to stay near")
    parser.add_argument("--max-moves", type=int, metavar="M", help="most experts fetched per layer")
    parser.add_argument("--move-price", type=float, default=0.0, help="objective units per moved byte (default: 0)")
    parser.add_argument(
        "--batch", type=int, default=256, help="tokens of one step over all ranks (default %(default)s)"
    )
    add_kv_argument(parser)
    parser.add_argument("--time-limit", type=float, default=10.0, metavar="S", help="seconds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit", choices=SPLITS, default="train",
                        help="tokens to fit to; the others judge (default: %(default)s)")  # fmt: skip
    parser.add_argument("--split-by", choices=("sequence", "workload", "adapter"), default="sequence",
                        help="otherwise hold out one tag at a time and report each (default: %(default)s)")  # fmt: skip
    parser.add_argument("--mix", metavar="A=3,B=1", help="fit to and judge on this mix of workloads or of adapters "
                        "(`base` = none) instead of the trace's own")  # fmt: skip


def add_kv_argument(parser: Any) -> None:
    """--kv-dim."""
    parser.add_argument(
        "--kv-dim", type=int, metavar="N", help="K/V elements per token and layer (default: what the trace or load "
        "file says of its model, else 576)",
    )  # fmt: skip


def add_replica_rule(parser: Any) -> None:
    """--replica-rule."""
    parser.add_argument(
        "--replica-rule", choices=RULES, default="moeplace",
        help="who serves an expert with several slots where the placement will run: moeplace's own runtime "
        "with ties spread evenly (moeplace) or by the load so far (balanced), SGLang with static (nearest-static) or "
        "dynamic dispatch (random), vLLM (hash) (default: %(default)s)",
    )  # fmt: skip


@dataclass(frozen=True)
class Sides:
    """The two sides of a trace, and what to call the one that judges."""

    train: Any
    test: Any
    name: str


def split_sides(trace: Any, fit: str, *, mix_text: str | None = None, seed: int = 0) -> Sides:
    """Train and test by sequence; the whole trace twice, with a warning, where it cannot be split.

    Args:
        trace: the trace.
        fit: side to fit to.
        mix_text: mix of workloads or adapters, see --mix; None = the trace's own.
        seed: of the mix.
    """
    from moeplace.profiling.traces.mix import mix, parse_mix

    if mix_text:
        trace = mix(trace, parse_mix(mix_text), seed=seed)
    if fit == "all":
        return Sides(trace, trace, "all")
    train, name = one_side(trace, fit, "fitted to and judged on all tokens")
    if name == "all":
        return Sides(trace, trace, "all")
    other = {"train": "test", "test": "train"}[fit]
    return Sides(train, trace.split(other), other)


def one_side(trace: Any, split: str, instead: str = "judged on all tokens") -> tuple[Any, str]:
    """One side of a trace and its name; the whole trace, with a warning, where it cannot be split."""
    import warnings

    from moeplace.profiling.errors import InputError, MoeplaceWarning

    try:
        return trace.split(split), split
    except InputError as error:
        warnings.warn(f"{error}: {instead}", MoeplaceWarning, stacklevel=3)
        return trace, "all"


def judging_side(trace: Any, path: Any, split: str) -> Any:
    """The tokens of a trace to judge by.

    Raises:
        InputError: the trace has no such side; the message names the flag that takes all of it.
    """
    from moeplace.profiling.errors import InputError

    try:
        return trace.split(split)
    except InputError as error:
        raise InputError(f"{path}: {error}: --split all judges on all tokens, fitted ones among them") from error


def build_cluster(args: argparse.Namespace, num_experts: int) -> Any:
    """The cluster that the flags describe, with calibrated links where given."""
    from moeplace.placement.cluster import Cluster, even_slots
    from moeplace.profiling.errors import FormatError, InputError

    if args.cluster:
        cluster = Cluster.from_toml(args.cluster)
    elif args.topology:
        import networkx as nx

        from moeplace.profiling.files import require_file

        try:
            graph = nx.read_graphml(require_file(args.topology))
        except (OSError, ValueError, KeyError, SyntaxError, nx.NetworkXError) as error:
            raise FormatError(f"{args.topology} is not GraphML: {error}") from error
        gpus = sum(data.get("kind") == "gpu" for _, data in graph.nodes(data=True))
        slots = args.slots_per_rank or (even_slots(num_experts, gpus).tolist() if gpus else 1)
        cluster = Cluster.from_graph(graph, slots_per_rank=slots)
    elif args.ranks is None:
        raise InputError("say how many ranks there are: --ranks N, --cluster FILE or --topology FILE")
    else:
        if args.ranks < 1:
            raise InputError(f"ranks ({args.ranks}) must be at least 1")
        slots = args.slots_per_rank
        if slots is None:
            slots = even_slots(num_experts, args.ranks).tolist()
            if not all(slots):
                raise InputError(
                    f"ranks ({args.ranks}) exceed the experts of a layer ({num_experts}): --slots-per-rank 1 gives "
                    f"every rank an expert, {args.ranks} slots of which {args.ranks - num_experts} hold replicas"
                )
            _say_uneven(num_experts, slots)
        cluster = Cluster.uniform(args.ranks, slots_per_rank=slots, ranks_per_node=args.ranks_per_node)
    calibration = load_calibration(args)
    return calibration.apply(cluster) if calibration else cluster


def _say_uneven(num_experts: int, slots: list[int]) -> None:
    """Warn, before any work, that no engine's file can say unequal ranks."""
    import warnings

    from moeplace.profiling.errors import MoeplaceWarning

    if min(slots) < max(slots):
        total = max(slots) * len(slots)
        warnings.warn(
            f"{num_experts} experts on {len(slots)} ranks: ranks hold {min(slots)} or {max(slots)}, which no engine's "
            f"file can say; --slots-per-rank {max(slots)} makes them equal ({total} slots, "
            f"{total - num_experts} redundant)",
            MoeplaceWarning,
            stacklevel=3,
        )


def step_shape(args: argparse.Namespace, known: Any) -> Any:
    """Sizes of a step: as the flags say, else as the trace or the load file knows them, else nominal ones."""
    from moeplace.placement.cost.steps import StepShape

    nominal = StepShape()
    kv_dim = args.kv_dim if args.kv_dim is not None else known.kv_dim or nominal.kv_dim
    return StepShape(batch=args.batch, hidden_size=known.hidden_size or nominal.hidden_size, kv_dim=kv_dim)


def problem_options(args: argparse.Namespace, known: Any, cluster: Any) -> dict[str, Any]:
    """Keyword arguments of `Problem.from_trace` or `from_load` that the flags and a trace or load file state."""
    from moeplace.placement.cost.calibration import Calibration
    from moeplace.placement.cost.replica_rule import get_rule
    from moeplace.placement.placement_file import load_placement

    shape = step_shape(args, known)
    calibration = calibration_for(args, known, shape, cluster.num_ranks)
    return {
        "objective": args.objective,
        "max_imbalance": args.max_imbalance,
        "survive": args.survive,
        "replica_budget": args.replica_budget,
        "leave_empty": args.leave_empty,
        "previous": load_placement(args.previous, running=True) if args.previous else None,
        "max_moves": args.max_moves,
        "move_price": args.move_price,
        "shape": shape,
        "calibration": calibration or Calibration(cluster.intra, cluster.inter),
        "replica_rule": get_rule(args.replica_rule),
    }


def index_order_like(placement: Any) -> Any:
    """The baseline on the cluster and model of `placement`."""
    from moeplace.placement.placement import index_order

    return index_order(
        placement.experts_per_layer,
        placement.slots_of_rank,
        placement.node_of_rank,
        layer_ids=placement.layer_ids,
        num_hidden_layers=placement.num_hidden_layers,
        mode=placement.mode,
    )


def held_out_figures(evaluation: Any) -> dict[str, Any]:
    """What the evidence of a placement file and the tables show of an evaluation."""
    names = (
        "ranks_per_token", "nodes_per_token", "copies_per_token", "stay_rate", "node_stay_rate",
        "single_rank_share", "imbalance_mean", "imbalance_worst", "activated_imbalance_mean", "predicted_seconds",
    )  # fmt: skip
    figures: dict[str, Any] = {name: round(float(getattr(evaluation, name)), 9) for name in names}
    return {"replica_rule": evaluation.replica_rule, **figures}


def figures_by_rule(problem: Any, placement: Any, trace: Any) -> dict[str, dict[str, float]]:
    """What a placement with replicas costs by the rule of each engine, shortly."""
    from moeplace.placement.cost.replica_rule import REPLICA_RULES

    names = ("ranks_per_token", "copies_per_token", "imbalance_mean", "predicted_seconds")
    judged = {
        name: problem.replace(replica_rule=rule).evaluate(placement, trace) for name, rule in REPLICA_RULES.items()
    }
    return {rule: {name: round(float(getattr(each, name)), 9) for name in names} for rule, each in judged.items()}
