"""--policy and what belongs to it: how fast memory is used where experts do not fit."""

import argparse
from typing import Any

POLICY_NAMES = ("pinned", "lru", "lfu", "score", "lookahead")
"""Names of `placement.tiers.policy`, which a parser need not import."""


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """--policy, --accuracy, --look-ahead."""
    group = parser.add_argument_group("memory tiers", "where the cluster file has the tables [fast] and [host]")
    group.add_argument(
        "--policy", choices=POLICY_NAMES,
        help="pinned: what is resident stays; lru, lfu, score: caches; lookahead: pinned, and predicted experts are "
        "fetched early (default: pinned)",
    )  # fmt: skip
    group.add_argument(
        "--accuracy", type=float, metavar="A", help="share of the next layer's experts that a predictor names, "
        "with any policy (`moeplace profile` measures it; lookahead: 0.85 where nothing is said)",
    )  # fmt: skip
    group.add_argument("--look-ahead", type=int, metavar="N", help="layers that it looks ahead (default: 1)")


def budgets_of(text: str) -> tuple[float, ...]:
    """Shares of all experts from a list of percentages.

    Raises:
        InputError: one does not lie in 0..100.
    """
    from moeplace.profiling.errors import InputError

    shares = []
    for word in text.split(","):
        try:
            share = float(word.strip().rstrip("%")) / 100
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise InputError(f"budget {word.strip()!r} must be a percentage above 0 and up to 100")
        shares.append(share)
    return tuple(shares)


def compared_policies(args: argparse.Namespace) -> list[Any]:
    """Policies that curves over budgets compare: the one of the flags, or pinning, a cache, and foresight."""
    from moeplace.placement.tiers.policy import FATE_ACCURACY, Policy, Predictor

    if args.policy is not None or args.accuracy is not None:
        return [policy_of(args)]
    foresight = Predictor(FATE_ACCURACY, 1 if args.look_ahead is None else args.look_ahead)
    return [Policy("pinned"), Policy("lru"), Policy("lookahead", foresight)]


def require_tiers(args: argparse.Namespace, memory: Any) -> None:
    """Refuse these flags for a cluster without memory tiers, before long work.

    Raises:
        InputError: one is given, and `memory` is None.
    """
    from moeplace.profiling.errors import InputError

    for flag in ("policy", "accuracy", "look_ahead", "budgets", "alike"):
        value = getattr(args, flag, None)
        if memory is None and value is not None:
            raise InputError(
                f"--{flag.replace('_', '-')} ({value}) needs memory tiers: a cluster file (--cluster) with the tables "
                "[fast] and [host]"
            )


def policy_of(args: argparse.Namespace) -> Any:
    """The `Policy` that the flags name."""
    from moeplace.placement.tiers.policy import FATE_ACCURACY, Policy, Predictor

    accuracy, layers = args.accuracy, 1 if args.look_ahead is None else args.look_ahead
    if accuracy is None and args.policy == "lookahead":
        accuracy = FATE_ACCURACY
    return Policy(args.policy or "pinned", None if accuracy is None else Predictor(accuracy, layers))


def add_tier_arguments(parser: Any) -> None:
    """--fast-slots and what belongs to it, for what serves."""
    parser.add_argument(
        "--fast-slots", type=int, metavar="N", help="experts per layer in the fast memory of a rank, the others are "
        "fetched from host memory when they are needed (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--host-slots", type=int, metavar="N", help="with it: experts per layer in host memory, the others are read "
        "from the checkpoint (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--fast-policy", choices=POLICY_NAMES, help="with it: what stays, what is fetched ahead (default: lookahead)",
    )  # fmt: skip


def tier_limits(args: argparse.Namespace) -> Any:
    """`TierLimits` of the arguments of `add_tier_arguments`; None = everything is in fast memory.

    Raises:
        InputError: a number is out of range, or another of these flags comes without --fast-slots.
    """
    from moeplace.profiling.errors import InputError
    from moeplace.runtime.experts.tier_limits import TierLimits

    if args.fast_slots is None:
        for flag in ("host_slots", "fast_policy"):
            if getattr(args, flag) is not None:
                raise InputError(f"--{flag.replace('_', '-')} ({getattr(args, flag)}) needs --fast-slots")
        return None
    return TierLimits(args.fast_slots, host_slots=args.host_slots, policy=args.fast_policy or "lookahead")
