"""`moeplace evaluate`: what a placement costs on a trace."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moeplace.launch.options.calibration import calibration_for
from moeplace.launch.options.policy import add_policy_arguments, budgets_of, compared_policies, policy_of, require_tiers
from moeplace.launch.options.problem import (
    SPLITS,
    add_kv_argument,
    add_replica_rule,
    build_cluster,
    index_order_like,
    one_side,
    step_shape,
)
from moeplace.launch.tables import Cell, format_table
from moeplace.placement.modes import MODES

if TYPE_CHECKING:
    from moeplace.placement.placement import Placement
    from moeplace.placement.tiers.alike import Batches
    from moeplace.placement.tiers.policy import Policy
    from moeplace.placement.tiers.precision import PrecisionPlan
    from moeplace.placement.tiers.terms import TierTerms
    from moeplace.profiling.traces.loads import LoadStats

HELP = "what a placement costs on a trace, beside index order"
EXAMPLE = "moeplace evaluate t.trace p.json --split test"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("trace", metavar="T", help="routing trace, or a load file (balance only)")
    parser.add_argument("placement", metavar="P", help="placement file")
    parser.add_argument("--split", choices=SPLITS, default="test", help="tokens to judge by (default: %(default)s)")
    parser.add_argument("--mode", choices=MODES, help="default: its own")
    parser.add_argument("--batch", type=int, default=256, help="tokens of one step (default: %(default)s)")
    add_kv_argument(parser)
    group = parser.add_argument_group("cluster", "links and speeds; by default the placement's nodes, nominal links")
    group.add_argument("--cluster", metavar="TOML", help="cluster description")
    group.add_argument("--topology", metavar="GRAPHML", help="graph of GPUs, switches and links (GraphML)")
    group.add_argument("--calibration", metavar="C", help="measured links and expert time")
    add_replica_rule(parser)
    add_policy_arguments(parser)
    parser.add_argument(
        "--precision",
        metavar="F",
        help="plan of `moeplace bench precision --out`: bytes of ranks, predicted error; with memory tiers, loads "
        "carry the bytes of each expert's precision",
    )
    parser.add_argument(
        "--budgets", metavar="P,Q,...", help="with memory tiers: hit rate and seconds with these percentages of a "
        "rank's experts in fast memory, under --policy or some of them side by side",
    )  # fmt: skip
    parser.add_argument(
        "--alike", type=int, metavar="N", help="with memory tiers: what batches of requests with alike experts gain "
        "over drawn ones, by N tokens of every sequence that has so many behind its first 16",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the figures for machines")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print, write."""
    from moeplace.placement.cost.evaluation import cluster_of, evaluate
    from moeplace.placement.cost.replica_rule import get_rule
    from moeplace.placement.placement_file import load_placement
    from moeplace.placement.tiers.alike import batch_alike
    from moeplace.placement.tiers.terms import TierTerms
    from moeplace.profiling.files import require_folder_of, write_json
    from moeplace.profiling.traces.file import load_trace
    from moeplace.profiling.traces.loads import load_if_load

    require_folder_of(args.json)
    placement = load_placement(args.placement)
    plan = _precision_plan(args.precision, placement) if args.precision else None
    loads = load_if_load(args.trace)
    if loads is not None:
        require_tiers(args, None)
        return _evaluate_loads(args, loads, placement, plan)
    trace = load_trace(args.trace)
    side, name = one_side(trace, args.split)
    shape = step_shape(args, trace)
    args.ranks, args.slots_per_rank = None, None
    named = bool(args.cluster or args.topology)
    cluster = build_cluster(args, trace.num_experts) if named else cluster_of(placement)
    require_tiers(args, cluster.memory)
    budgets = budgets_of(args.budgets) if args.budgets is not None else ()
    rule, calibration = get_rule(args.replica_rule), calibration_for(args, trace, shape, placement.num_ranks)
    ours, base = (
        evaluate(side, p, mode=args.mode, cluster=cluster, shape=shape, calibration=calibration, rule=rule).summary()
        for p in (placement, index_order_like(placement))
    )
    rows = [[key.replace("_", " "), base[key], ours[key]] for key in ours]
    print(format_table([f"{name} tokens", "index order", "placement"], rows))
    figures = {"split": name, "digest": placement.digest, **ours, "index_order": base}
    if cluster.memory is not None:
        terms = TierTerms(cluster, shape, mode=args.mode, calibration=calibration, rule=rule)
        title = f"{name} tokens"
        if plan is not None:
            exact = replace(terms, bytes_LE=plan.costs.bytes_LEP[:, :, 0])
            figures["tiers_exact"] = _evaluate_tiers(side, placement, policy_of(args), exact, f"{title}, exact experts")
            terms, title = replace(terms, bytes_LE=plan.bytes_LE), f"{title}, experts by the plan"
        figures["tiers"] = _evaluate_tiers(side, placement, policy_of(args), terms, title)
        if budgets:
            fit = trace.split("train") if name == "test" else side
            figures["budgets"] = _sweep_budgets(side, placement, compared_policies(args), budgets, terms, fit)
        if args.alike is not None:
            batches = batch_alike(side, batch=args.batch, steps=args.alike)
            figures["alike"] = _evaluate_alike(batches, placement, policy_of(args), terms)
    elif placement.tier is not None:
        print("(as if every expert were in fast memory: name the tiers with --cluster)")
    if plan is not None:
        figures["precision"] = _evaluate_precision(plan, placement)
    if args.json:
        write_json(args.json, figures)
    return 0


def _evaluate_alike(batches: "Batches", placement: "Placement", policy: "Policy", terms: "TierTerms") -> Any:
    """Print what batches of alike requests cost beside drawn ones; the figures."""
    from moeplace.placement.tiers.evaluation import evaluate_tiers

    rows: list[list[Cell]] = []
    figures: dict[str, Any] = {"requests": batches.requests}
    for name, trace, active in zip(("alike", "drawn"), (batches.alike, batches.drawn), batches.active, strict=True):
        judged = evaluate_tiers(trace, placement, policy, terms, with_bound=False)
        rows.append([name, active, judged.hit_rate, judged.seconds * 1e3])
        figures[name] = {"active_experts": active, "hit_rate": judged.hit_rate, "seconds": judged.seconds}
    print(
        "\n" + format_table([f"batches of {batches.requests} requests", "active experts", "hit rate", "ms/step"], rows)
    )
    return figures


def _precision_plan(path: str, placement: "Placement") -> "PrecisionPlan":
    """The plan of --precision, for the experts of the placement.

    Raises:
        InputError: it is for others, or as `load_precision` raises.
    """
    import numpy as np

    from moeplace.placement.tiers.precision import load_precision
    from moeplace.profiling.errors import InputError

    plan = load_precision(path)
    if not np.array_equal(plan.costs.experts_per_layer, placement.experts_per_layer):
        raise InputError(f"{path} is for another number of layers or experts than the placement")
    return plan


def _evaluate_precision(plan: "PrecisionPlan", placement: "Placement") -> Any:
    """Print what experts in fewer bits take on each rank, and what they spoil; the figures."""
    import numpy as np

    from moeplace.placement.tiers.precision import bytes_by_rank

    bytes_R = bytes_by_rank(plan.costs, placement, plan.choice_LE)
    exact_R = bytes_by_rank(plan.costs, placement, np.zeros_like(plan.choice_LE))
    counts = ", ".join(f"{number} {name}" for name, number in plan.counts().items())
    share = bytes_R.sum() / exact_R.sum()
    print(
        f"\nprecision: {counts}; bytes of a rank {bytes_R.min():,} to {bytes_R.max():,} ({share:.1%} of exact ones); "
        f"predicted error {plan.error:.3e}, proven >= {plan.lower_bound:.3e} within the plan's budgets"
    )
    return {
        "experts": plan.counts(), "bytes_per_rank": bytes_R.tolist(), "exact_bytes_per_rank": exact_R.tolist(),
        "predicted_error": plan.error, "lower_bound": plan.lower_bound,
    }  # fmt: skip


def _evaluate_tiers(side: Any, placement: "Placement", policy: "Policy", terms: "TierTerms", title: str) -> Any:
    """Print what the placement costs where experts do not fit; the figures."""
    from moeplace.launch.solving.tiers import tier_table
    from moeplace.placement.tiers.evaluation import evaluate_tiers

    judged = evaluate_tiers(side, placement, policy, terms)
    assert judged.belady_hit_rate is not None
    print("\n" + tier_table({"placement": judged}, title))
    print(
        f"everything in fast memory: {judged.resident_seconds * 1e3:.4g} ms/step; without foresight no cache hits more "
        f"than {judged.belady_hit_rate:.3g}"
    )
    return judged.summary()


def _sweep_budgets(side: Any, placement: "Placement", policies: Any, budgets: Any, terms: "TierTerms", fit: Any) -> Any:
    """Print what other budgets would be worth; the figures."""
    from moeplace.launch.progress import progress
    from moeplace.launch.solving.tiers import budget_rows
    from moeplace.placement.tiers.budgets import sweep_budgets

    with progress("walking budgets") as report:
        points = sweep_budgets(side, placement, policies, budgets, terms, fit=fit, report=report)
    print("\n" + budget_rows(points))
    return [point.summary() for point in points]


def _evaluate_loads(
    args: argparse.Namespace, loads: "LoadStats", placement: "Placement", plan: "PrecisionPlan | None"
) -> int:
    """Balance alone: where tokens go, loads do not say."""
    import numpy as np

    from moeplace.placement.cost.evaluation import cluster_of
    from moeplace.placement.objective import load_imbalance
    from moeplace.placement.problem import Problem
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.files import write_json

    if not np.array_equal(np.asarray(loads.experts_per_layer), placement.experts_per_layer):
        raise InputError(
            f"{args.placement} is for {placement.num_layers} layers of {placement.num_experts} experts, {args.trace} "
            f"has {loads.num_layers} of {loads.num_experts}"
        )
    problem = Problem.from_load(loads.load, cluster_of(placement), experts_per_layer=loads.experts_per_layer)
    by_name = {}
    for name, one in (("index_order", index_order_like(placement)), ("placement", placement)):
        by_layer = load_imbalance(problem, one)
        by_name[name] = {"imbalance_mean": float(by_layer.mean()), "imbalance_worst": float(by_layer.max())}
    base, ours = by_name["index_order"], by_name["placement"]
    rows: list[list[Cell]] = [[name.replace("_", " "), base[name], ours[name]] for name in ours]
    print(format_table(["loads", "index order", "placement"], rows))
    print("(busiest rank against the mean; loads alone say nothing of where tokens go)")
    figures: dict[str, Any] = {"split": "all", "digest": placement.digest, **ours, "index_order": base}
    if plan is not None:
        figures["precision"] = _evaluate_precision(plan, placement)
    if args.json:
        write_json(args.json, figures)
    return 0
