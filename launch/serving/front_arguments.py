"""The flags of `moeplace serve` and `moeplace ray serve`."""

import argparse

from moeplace.launch.options.policy import add_tier_arguments
from moeplace.launch.options.precision import add_precision_arguments
from moeplace.placement.modes import MODES

OWN_RULES = ("moeplace", "balanced")
"""Those of `placement.cost.replica_rule`, which a parser need not import."""
DTYPES = ("float64", "float32", "bfloat16", "float16")


def add_engine_arguments(parser: "argparse._ActionsContainer") -> None:
    """What the ranks serve, and how."""
    parser.add_argument("--placement", metavar="P", help="placement file (default: experts in index order)")
    parser.add_argument("--mode", choices=("auto", *MODES), default="auto", help="execution mode (default: auto)")
    parser.add_argument(
        "--trace",
        metavar="T",
        help="recorded routing, from which auto predicts every mode, and --replan the promise; readable by every rank",
    )
    parser.add_argument("--calibration", metavar="C", help="measured links and expert time, for --trace and --replan")
    parser.add_argument(
        "--node-aware",
        action=argparse.BooleanOptionalAction,
        help="dispatch-combine sends one copy per node, forwarded inside it (default: if tokens have several experts)",
    )
    parser.add_argument(
        "--replica-rule",
        choices=OWN_RULES,
        help="who serves an expert with several slots: moeplace spreads ties evenly, balanced by the load so far "
        "(default: the rule that P was solved for, if it is one of these, else moeplace)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling, where a request does not say")
    _add_sequence_arguments(parser)
    add_tier_arguments(parser)
    add_precision_arguments(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="number type (default: the checkpoint's)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare a short pass with the plain model before serving (default: if no recorded pass vouches for the "
        "model's family; see docs/models.md)",
    )
    parser.add_argument(
        "--threads-per-rank",
        type=int,
        metavar="N",
        help="cores that a rank may use (default: all, shared out to ranks)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what ranks compute on: cuda = a GPU for each; auto = GPUs where there are any (default)",
    )
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for another rank")


def _add_sequence_arguments(parser: "argparse._ActionsContainer") -> None:
    """How many sequences, how long, and what memory they take."""
    parser.add_argument("--max-sequences", type=int, default=64, metavar="N", help="sequences in flight at once")
    parser.add_argument("--max-length", type=int, metavar="N", help="positions of a sequence, completion included")
    parser.add_argument(
        "--max-prefill-tokens",
        type=int,
        default=512,
        metavar="N",
        help="tokens of a pass that serves prompts, beside a token of every sequence that goes on (default: 512)",
    )
    parser.add_argument(
        "--prefix-reuse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a prompt takes over the K/V of another one that begins with the same tokens (default: yes)",
    )
    parser.add_argument(
        "--alike",
        type=int,
        default=0,
        metavar="N",
        help="when a place is free, let in that one of the first N + 1 that wait whose experts are most like those of "
        "the batch; no request is overtaken more than N times (default: 0, as they come)",
    )
    parser.add_argument(
        "--kv-bytes", type=int, metavar="B", help="K/V memory of a rank, claimed as sequences grow (default: no limit)"
    )


def check_trace_arguments(args: argparse.Namespace) -> None:
    """Check that recorded routing and a calibration are of use.

    Raises:
        InputError: nothing would look at them.
    """
    from moeplace.profiling.errors import InputError

    if args.replan:
        return
    if args.trace and args.mode != "auto":
        raise InputError(f"--trace {args.trace} needs --mode auto or --replan; --mode {args.mode} predicts nothing")
    if args.calibration and not args.trace:
        raise InputError(f"--calibration {args.calibration} needs --trace or --replan")


def add_front_arguments(group: "argparse._ActionsContainer") -> None:
    """What clients may do."""
    group.add_argument("--model-name", metavar="NAME", help="the model's name for clients (default: its folder's)")
    group.add_argument(
        "--api-key-file", metavar="F", help="bearer token that clients must send (default: $MOEPLACE_API_KEY, or none)"
    )
    group.add_argument(
        "--probe-tokens",
        type=int,
        default=0,
        metavar="N",
        help="with several ranks: check each switch of a re-placement by the logits of N tokens too (default: 0, by "
        "checksums and digests alone)",
    )
    group.add_argument(
        "--start-timeout", type=float, default=300.0, metavar="S", help="seconds for a rank to load once it runs (300)"
    )
    group.add_argument(
        "--state",
        metavar="DIR",
        help="folder in which requests outlive this process: started again with it, it takes them up again",
    )
    group.add_argument("--max-ranks", type=int, metavar="N", help="most ranks that clients may ask for, with --admin")
    _add_access(group)
    _add_limits(group)
    _add_ending(group)


def _add_access(group: "argparse._ActionsContainer") -> None:
    """Who may ask for what, and how that is kept secret and noted."""
    group.add_argument(
        "--admin", action="store_true", help="routes that change ranks and the placement, behind a token"
    )
    group.add_argument(
        "--admin-key-file",
        metavar="F",
        help="bearer token of those routes (default: $MOEPLACE_ADMIN_KEY, or that of clients)",
    )
    group.add_argument(
        "--client-keys", metavar="F", help="a line NAME TOKEN for each of several clients, who share the service fairly"
    )
    group.add_argument(
        "--dashboard", action="store_true", help="a live page at /dashboard; its data needs the same bearer token"
    )
    group.add_argument("--tls-certificate", metavar="F", help="PEM file: answer by HTTPS, with --tls-key")
    group.add_argument("--tls-key", metavar="F", help="PEM file of the certificate's key")
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="of what is logged to standard error"
    )
    group.add_argument("--access-log", action="store_true", help="log a line for every answer")


def _add_limits(group: "argparse._ActionsContainer") -> None:
    """How much, and how long."""
    group.add_argument("--max-body-bytes", type=int, default=1 << 20, metavar="B", help="of a request")
    group.add_argument("--max-prompt-tokens", type=int, metavar="N", help="of a prompt (default: what fits)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="most that may be asked for (default: what fits)")
    group.add_argument(
        "--max-concurrent", type=int, default=256, metavar="N", help="completions at once; others wait (default: 256)"
    )
    group.add_argument(
        "--max-queue", type=int, default=1024, metavar="N", help="completions that may wait; beyond: status 429 (1024)"
    )
    group.add_argument("--queue-timeout", type=float, metavar="S", help="most seconds that a request may wait")
    group.add_argument("--request-timeout", type=float, metavar="S", help="most seconds that a request may take")
    group.add_argument(
        "--stall-timeout", type=float, default=60.0, metavar="S", help="seconds without a byte taken by a client"
    )


def _add_ending(group: "argparse._ActionsContainer") -> None:
    """What happens after SIGTERM."""
    group.add_argument(
        "--drain-grace",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds after SIGTERM in which requests are still taken while /readyz fails already (default: 0)",
    )
    group.add_argument(
        "--drain-timeout", type=float, default=30.0, metavar="S", help="seconds to finish what runs after that"
    )


def replica_rule_of(args: argparse.Namespace) -> str:
    """The rule asked for, else that of the placement file where the runtime knows it, else the default one."""
    from moeplace.placement.placement_file import load_placement_file

    if args.replica_rule is None and args.placement:
        solved_for = load_placement_file(args.placement).evidence.get("replica_rule")
        return solved_for if solved_for in OWN_RULES else OWN_RULES[0]
    return args.replica_rule or OWN_RULES[0]
