"""`moeplace solve`: find a placement, prove how good it is, judge it on held-out sequences."""

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from moeplace.launch.options.policy import add_policy_arguments, policy_of, require_tiers
from moeplace.launch.options.problem import (
    add_cluster_arguments,
    add_problem_arguments,
    build_cluster,
    figures_by_rule,
    held_out_figures,
    index_order_like,
    problem_options,
    split_sides,
)
from moeplace.launch.progress import progress
from moeplace.launch.tables import format_table
from moeplace.placement.modes import MODES

if TYPE_CHECKING:
    from moeplace.launch.solving.modes import ModeOutcome

HELP = "find a placement for a trace, with a proven bound"
EXAMPLE = "moeplace solve t.trace --ranks 8 --mode auto --out p.json"
_CONFIDENCE = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("trace", metavar="T", help="routing trace, or a load file (balance only)")
    parser.add_argument("--out", metavar="P", help="placement file to write")
    parser.add_argument("--json", metavar="FILE", help="write the result for machines")
    parser.add_argument("--solver", default="auto", help="one of the solvers that `moeplace compare` lists")
    add_cluster_arguments(parser)
    add_problem_arguments(parser)
    add_policy_arguments(parser)
    add_promise_arguments(parser)
    # The words of the command line, for the placement file; where layers are searched (`moeplace ray solve`).
    parser.set_defaults(argv=(), spread=None)


def add_promise_arguments(parser: argparse.ArgumentParser) -> None:
    """What `--max-imbalance` speaks of."""
    parser.add_argument(
        "--cap-on", choices=("fitted", "held-out"), default="fitted",
        help="what --max-imbalance caps: each layer on the fitted tokens (default), or as a promise with --confidence "
        "the mean over layers on as many unseen sequences as are fitted",
    )  # fmt: skip
    parser.add_argument("--confidence", type=float, metavar="P", help=f"of that promise (default: {_CONFIDENCE:g})")


def run(args: argparse.Namespace) -> int:
    """Solve, print, write."""
    from moeplace.launch.solving.modes import choose, mode_table, verdict
    from moeplace.profiling.errors import FormatError, InputError
    from moeplace.profiling.files import require_folder_of
    from moeplace.profiling.traces.file import load_trace

    require_folder_of(args.out, args.json)
    if args.confidence is not None and args.cap_on == "fitted":
        raise InputError(f"--confidence ({args.confidence:g}) is of a promise: it needs --cap-on held-out")
    try:
        trace = load_trace(args.trace)
    except FormatError as no_trace:
        return _solve_loads(args, no_trace)
    if args.split_by != "sequence":
        _report_tags(args, trace)
    sides = split_sides(trace, args.fit, mix_text=args.mix, seed=args.seed)
    outcomes = _solve_modes(args, sides)
    chosen = choose(outcomes)
    if len(outcomes) > 1:
        links = "calibrated" if args.calibration else "nominal"
        print(f"{mode_table(outcomes)}\n{verdict(outcomes, chosen, links=links)}")
        each = args.time_limit / len(outcomes)
        print(f"  (the limit of {args.time_limit:g} s was shared by {len(outcomes)} modes, {each:.3g} s each)\n")
    problem, result, held_out, baseline = chosen.problem, chosen.result, chosen.solved, chosen.baseline
    _print_result(problem, result, held_out, baseline, sides.name)
    evidence = {"split": sides.name, **held_out_figures(held_out), "index_order": held_out_figures(baseline)}
    if result.placement.has_replicas or problem.replica_rule.share is not None:
        evidence["by_replica_rule"] = figures_by_rule(problem, result.placement, sides.test)
    if problem.cluster.memory is not None:
        result, evidence["tiers"] = _plan_tiers(args, problem, result, sides)
    _write(args, problem, result, evidence)
    return 0


def _plan_tiers(args: argparse.Namespace, problem: Any, result: Any, sides: Any) -> tuple[Any, Any]:
    """Ranks and residency together, beginning with what was found; the result with tiers and its evidence."""
    from dataclasses import replace

    from moeplace.launch.solving.tiers import describe, solve_tiers

    with progress("planning memory tiers") as report:
        outcome = solve_tiers(problem, result.placement, policy_of(args), sides.test, seed=args.seed, report=report)
    print("\n" + describe(outcome, sides.name))
    plan = outcome.plan
    bound, seconds = plan.lower_bound, plan.evaluation.seconds
    if bound is None:  # fast memory for everything is no slower, unless hosts compute beside their devices
        alone = problem.cluster.memory.host.compute is None and result.objective_name == "seconds"
        bound = result.lower_bound if alone else 0.0
    tiered = replace(
        result, placement=plan.placement, objective_name="seconds", objective=seconds, lower_bound=bound,
        gap=1 - bound / seconds, status="feasible", seconds=result.seconds + plan.seconds, bounds={}, values={},
    )  # fmt: skip
    return tiered, outcome.evidence()


def _solve_modes(args: argparse.Namespace, sides: Any) -> "list[ModeOutcome]":
    """The mode that was asked for, or all of them with equal shares of the time."""
    from moeplace.launch.solving.modes import ModeOutcome

    modes, outcomes = MODES if args.mode == "auto" else (args.mode,), []
    for mode in modes:
        with progress(f"solving for {mode}") as report:
            problem, result = _solve_side(args, sides.train, mode, args.time_limit / len(modes), report)
        judged = (problem.evaluate(p, sides.test) for p in (result.placement, index_order_like(result.placement)))
        outcomes.append(ModeOutcome(problem, result, *judged))
    return outcomes


def _solve_side(args: argparse.Namespace, train: Any, mode: str, seconds: float, report: Any) -> tuple[Any, Any]:
    from moeplace.placement.problem import Problem
    from moeplace.placement.solve import solve

    cluster = build_cluster(args, train.num_experts)
    require_tiers(args, cluster.memory)
    problem = Problem.from_trace(train, cluster, mode=mode, **problem_options(args, train, cluster))
    options = {"seed": args.seed, "report": report, "spread": args.spread}
    if args.cap_on == "fitted":
        return problem, solve(problem, solver=args.solver, time_limit=seconds, **options)
    from moeplace.placement.studies.promise import solve_promised
    from moeplace.profiling.errors import InputError

    if cluster.memory is not None:
        raise InputError(
            "--cap-on held-out cannot be kept where memory has tiers: planning them moves experts afterwards"
        )
    confidence = _CONFIDENCE if args.confidence is None else args.confidence

    def search(capped: Any, limit: float) -> Any:
        return solve(capped, solver=args.solver, time_limit=limit, **options)

    found = solve_promised(problem, search, time_limit=seconds, confidence=confidence, seed=args.seed)
    return found[0], found[1]


def _report_tags(args: argparse.Namespace, trace: Any) -> None:
    """Hold out every workload (or adapter) in turn."""
    from moeplace.profiling.errors import InputError

    if args.mode == "auto":
        raise InputError(f"holding out {args.split_by}s needs one mode: dispatch-combine, coherent or allgather")
    rows = []
    tag_T, every = getattr(trace, args.split_by), getattr(trace, f"{args.split_by}_names")
    names = [] if tag_T is None else [name for index, name in enumerate(every) if (tag_T == index).any()]
    if len(names) < 2:
        raise InputError(f"splitting by {args.split_by} needs two tags or more, the trace has {names}")
    for name in names:
        train, test = trace.hold_out(name, by=args.split_by)
        with progress(f"holding out {name}") as report:
            problem, result = _solve_side(args, train, args.mode, args.time_limit / len(names), report)
        ours = problem.evaluate(result.placement, test)
        base = problem.evaluate(index_order_like(result.placement), test)
        rows.append([name, *_pair(base, ours)])
    header = [f"held-out {args.split_by}", "ranks/token", "-> solved", "stay", "-> solved", "imbalance", "-> solved"]
    print(format_table(header, rows), end="\n\n")


def _pair(base: Any, ours: Any) -> list[float]:
    names = ("ranks_per_token", "stay_rate", "imbalance_mean")
    return [value for name in names for value in (getattr(base, name), getattr(ours, name))]


def _print_result(problem: Any, result: Any, held_out: Any, baseline: Any, split: str) -> None:
    rows = []
    for name, label in (
        ("ranks_per_token", "ranks per token"),
        ("nodes_per_token", "nodes per token"),
        ("copies_per_token", "copies per token"),
        ("stay_rate", "stay rate"),
        ("imbalance_mean", "imbalance, mean"),
        ("imbalance_worst", "imbalance, worst layer"),
    ):
        rows.append([label, getattr(baseline, name), getattr(held_out, name)])
    rows.append(["predicted ms/step", baseline.predicted_seconds * 1e3, held_out.predicted_seconds * 1e3])
    print(format_table([f"{problem.mode}, {split} tokens", "index order", "solved"], rows))
    print(
        f"\nsolver {result.solver}: {result.status}, {result.objective_name} {result.objective:.6g} on fitted tokens, "
        f"proven >= {result.lower_bound:.6g} (gap {result.gap:.1%}), {result.seconds:.1f} s, seed {result.seed}"
    )
    for name, bound in result.bounds.items():
        print(f"  {name}: {result.values[name]:.6g}, proven >= {bound:.6g}")
    if result.moved:
        print(
            f"  moved from the previous placement: {result.moved['moves_per_layer_mean']:.1f} experts per layer "
            f"(at most {result.moved['moves_per_layer_most']:.0f}), "
            f"{result.moved['bytes']:.4g} bytes (least for this change of cluster: {result.moved['least_bytes']:.4g})"
        )
    if result.objective_name == "seconds" and problem.links_assumed:
        print(f"  links are not known: {_links(problem)} assumed; --calibration or --cluster has others")
    for note in result.notes:
        print(f"  note: {note}")


def _links(problem: Any) -> str:
    """Their bandwidths."""
    inside, between = problem.calibration.intra.bandwidth / 1e9, problem.calibration.inter.bandwidth / 1e9
    if problem.cluster.num_nodes == 1:
        return f"{inside:.3g} GB/s between ranks"
    return f"{inside:.3g} GB/s inside a node and {between:.3g} GB/s between nodes"


def _write(args: argparse.Namespace, problem: Any, result: Any, evidence: dict[str, Any]) -> None:
    from moeplace.placement.placement_file import save_placement
    from moeplace.placement.statement import tokens_digest
    from moeplace.profiling.files import write_json

    solver = {**result.summary(), "max_imbalance": args.max_imbalance, "command": shlex.join(["moeplace", *args.argv])}
    if not args.out and not args.json:
        return
    fitted = {"train": "test", "test": "train"}.get(evidence["split"], "all")
    fitting = {"tokens_digest": tokens_digest(problem), "split": fitted, "mix": args.mix, "seed": args.seed}
    proof: dict[str, Any] = {"problem": {**result.statement, **fitting}, "certificate": result.certificate}
    if result.placement.tier is not None:  # the certificate is of the placement without tiers
        proof = {}
    if args.out:
        save_placement(args.out, result.placement, solver=solver, evidence=evidence, **proof)
        print(f"wrote {args.out}")
    if args.json:
        write_json(args.json, {"solver": solver, "evidence": evidence, "digest": result.placement.digest, **proof})


def _solve_loads(args: argparse.Namespace, no_trace: Exception) -> int:
    """A file of loads instead of a trace: balance only."""
    import numpy as np

    from moeplace.placement.objective import load_imbalance
    from moeplace.placement.problem import Problem
    from moeplace.placement.solve import solve
    from moeplace.profiling.errors import FormatError, InputError
    from moeplace.profiling.traces.loads import load_load

    try:
        loads = load_load(args.trace)
    except FormatError:
        raise no_trace from None
    cluster = build_cluster(args, loads.load.shape[1])
    if args.cap_on != "fitted":
        raise InputError("--cap-on held-out needs a trace: loads say nothing of how sequences differ")
    mode = "dispatch-combine" if args.mode == "auto" else args.mode
    problem = Problem.from_load(
        loads.load,
        cluster,
        experts_per_layer=loads.experts_per_layer,
        mode=mode,
        layer_ids=loads.layer_ids,
        num_hidden_layers=loads.num_hidden_layers,
        **({"expert_bytes": np.full(loads.load.shape, loads.expert_bytes)} if loads.expert_bytes else {}),
        **problem_options(args, loads, cluster),
    )
    with progress("solving") as report:
        result = solve(problem, solver=args.solver, time_limit=args.time_limit, seed=args.seed, report=report)
    ours = load_imbalance(problem, result.placement)
    base = load_imbalance(problem, index_order_like(result.placement))
    rows = [["imbalance, mean", base.mean(), ours.mean()], ["imbalance, worst layer", base.max(), ours.max()]]
    print(format_table(["loads (fitted)", "index order", "solved"], rows))
    print("  note: loads alone say nothing of where tokens go: optimising traffic needs a routing trace")
    print(f"\nsolver {result.solver}: {result.status}, proven >= {result.lower_bound:.6g} (gap {result.gap:.2%})")
    evidence = {"split": "all", "imbalance_mean": float(ours.mean()), "imbalance_worst": float(ours.max())}
    _write(args, problem, result, evidence)
    return 0
