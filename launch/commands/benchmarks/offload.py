"""`moeplace bench offload`: a checkpoint served with less fast memory than its experts take."""

import argparse
from typing import TYPE_CHECKING, Any

from moeplace.launch.commands.benchmarks.prompts import add_prompt_arguments, prompts_of
from moeplace.launch.options.policy import POLICY_NAMES
from moeplace.launch.options.precision import EXACT, add_precision_arguments, served_plan
from moeplace.launch.progress import progress
from moeplace.placement.modes import MODES

if TYPE_CHECKING:
    from moeplace.launch.benches.offload_alike import AlikeOptions

HELP = "serve with less fast memory than the experts take: budgets and policies side by side, measured and predicted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prompt_arguments(parser)
    parser.add_argument(
        "--budgets", default="50", metavar="P,Q,...", help="fast memory in percent of a rank's experts (50)"
    )
    parser.add_argument(
        "--policies", default="pinned,lru,score,lookahead", metavar="A,B,...",
        help=f"of {', '.join(POLICY_NAMES)} (default: %(default)s); the first run is the baseline",
    )  # fmt: skip
    parser.add_argument("--placement", metavar="P", help="placement file (default: index order)")
    add_precision_arguments(parser)
    parser.add_argument("--mode", choices=MODES, default="allgather", help="execution mode (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences side by side (1)")
    parser.add_argument("--prompt", type=int, default=32, metavar="N", help="tokens of a prompt (32)")
    parser.add_argument("--steps", type=int, default=48, metavar="N", help="decode steps that are timed (48)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that every serving is done (3)")
    parser.add_argument("--look-ahead", type=int, default=1, metavar="N", help="layers that lookahead looks ahead (1)")
    parser.add_argument("--transit", type=int, default=2, metavar="N", help="rows for what is on its way (2)")
    parser.add_argument(
        "--host-computes", action="store_true", help="let the host compute what it ends before a load would"
    )
    parser.add_argument(
        "--latency", type=float, default=2e-3, metavar="S", help="seconds of every load on the emulated link (0.002)"
    )
    parser.add_argument(
        "--bandwidth", type=float, metavar="B/S", help="bytes per second of that link (default: not limited)"
    )
    group = parser.add_argument_group(
        "with --alike",
        "more requests than places, let in as they come and alike ones first (serve --alike), side by side",
    )
    group.add_argument(
        "--alike",
        metavar="N,M,...",
        help="how often a request may be overtaken; 0, as they come, is served in any case",
    )
    group.add_argument("--requests", type=int, default=64, metavar="G", help="that wait at the start (64)")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of sampling their tokens (1)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of their order, lengths and tokens (0)")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for another rank")
    parser.add_argument("--json", metavar="F", help="write conditions and figures to F")


def run(args: argparse.Namespace) -> int:
    from moeplace.launch.benches.offload import offload_bench
    from moeplace.launch.benches.offload_alike import alike_bench
    from moeplace.launch.benches.offload_serving import OffloadOptions
    from moeplace.launch.options.policy import budgets_of
    from moeplace.placement.placement_file import load_placement
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.files import require_folder_of, write_json

    require_folder_of(args.json)
    policies = tuple(word.strip() for word in args.policies.split(","))
    unknown = [name for name in policies if name not in POLICY_NAMES]
    if unknown:
        raise InputError(f"policy {unknown[0]!r} must be one of {', '.join(POLICY_NAMES)}")
    for name, least in (("batch", 1), ("prompt", 8), ("steps", 2), ("rounds", 1), ("look_ahead", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} ({getattr(args, name)}) must be at least {least}")
    if not 0 < args.timeout < float("inf"):
        raise InputError(f"--timeout ({args.timeout}) must be positive and finite")
    alike = _alike_options(args)
    served = args.requests if alike else args.batch
    model, prompts = prompts_of(args, length=args.prompt, count=served + args.batch)
    options = OffloadOptions(
        model=model, prompts=prompts[:served], other_prompts=prompts[served:],
        budgets=budgets_of(args.budgets), policies=policies, look_ahead=args.look_ahead,  # type: ignore[arg-type]
        transit=args.transit, host_computes=args.host_computes, latency=args.latency, bandwidth=args.bandwidth,
        mode=args.mode, steps=args.steps, rounds=args.rounds, timeout=args.timeout,
        placement=load_placement(args.placement) if args.placement else None, precision=served_plan(args),
    )  # fmt: skip
    with progress("serving") as report:
        document = alike_bench(options, alike, report=report) if alike else offload_bench(options, report=report)
    if document is not None:  # rank 0 speaks for the group
        if args.json:
            write_json(args.json, document)
        print(format_alike(document) if alike else format_report(document))
    return 0


def _alike_options(args: argparse.Namespace) -> "AlikeOptions | None":
    """What --alike and its flags say; None = it is not given.

    Raises:
        InputError: a value breaks a rule.
    """
    from moeplace.launch.benches.offload_alike import AlikeOptions
    from moeplace.profiling.errors import InputError

    if args.alike is None:
        return None
    try:
        given = tuple(int(word) for word in args.alike.split(","))
    except ValueError:
        given = (-1,)
    if min(given) < 0:
        raise InputError(f"--alike {args.alike} must be whole numbers from 0 on, with commas between them")
    if args.batch < 2:
        raise InputError(f"--batch ({args.batch}) must be at least 2 with --alike: one request alone is like no other")
    if args.requests <= args.batch:
        raise InputError(f"--requests ({args.requests}) must be more than --batch ({args.batch}): else nobody waits")
    if not 0 <= args.temperature < float("inf"):
        raise InputError(f"--temperature ({args.temperature}) must not be negative, and finite")
    if args.seed < 0:
        raise InputError(f"--seed ({args.seed}) must not be negative")
    overtaken = (0, *(number for number in dict.fromkeys(given) if number))
    return AlikeOptions(overtaken, args.batch, args.temperature, args.seed)


def format_alike(document: dict[str, Any]) -> str:
    """The figures of --alike as a table."""
    from moeplace.launch.tables import format_table

    header = ("budget", "policy", "overtaken <=", "experts/layer", "hit rate", "KB/token", "bytes", "passes",
              "mean wait", "longest delay", "s (this machine, now)", "other tokens")  # fmt: skip
    rows = [
        (
            f"{run['budget']:.0%}", run["policy"], run["overtaken"], run["active_experts"], run["hit_rate"],
            run["bytes_per_token"] / 1e3, f"{run['bytes_share'] - 1:+.1%}", run["passes"], run["mean_wait"],
            run["longest_delay"], run["seconds"], run["other_tokens"],
        )
        for run in document["runs"]
    ]  # fmt: skip
    return (
        f"{format_table(header, rows)}\nwaits and delays are in passes, delays against requests that go as they come; "
        f"likeness of forecasts and of what was asked for correlate by {document['forecast_correlation']:.2f}"
    )


def format_report(document: dict[str, Any]) -> str:
    """The figures as a table."""
    from moeplace.launch.tables import format_table

    header = ("budget", "policy", "ms/step", "predicted", "error", "hit rate", "predicted", "late", "host", "KB/step",
              "predicted", "logits")  # fmt: skip
    rows = [
        (
            f"{run['budget']:.0%}", run["policy"], run["seconds_per_step"] * 1e3, run["predicted_seconds"] * 1e3,
            f"{run['prediction_error']:+.1%}", run["hit_rate"], run["predicted_hit_rate"], run["found"]["late"],
            run["found"]["host"], run["bytes_loaded"] / 1e3, run["predicted_bytes"] / 1e3,
            f"{run['logits_difference']:.1e}",
        )
        for run in document["runs"]
    ]  # fmt: skip
    plan, words = document["conditions"]["precision"], ""
    if plan != EXACT:
        counts = ", ".join(f"{number} {name}" for name, number in plan["experts"].items())
        words = f"inexact by a plan: {counts}; logits against its numbers in plain matrices\n"
    whole, base = document["everything_resident"], document["without_tiers"]
    return (
        f"{format_table(header, rows)}\n{words}"
        f"without tiers {base['seconds_per_step'] * 1e3:.3g} ms/step; everything in fast memory "
        f"{whole['seconds_per_step'] * 1e3:.3g} ms/step ({whole['overhead']:+.1%})"
    )
